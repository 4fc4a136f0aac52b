"""The load of a soak and its samples: an hour of turns against one running process, in a process of its own.

    python -m gateway.bench.soak_load < assignment.json

Reads a ``SoakAssignment``; writes a ``Sample`` per line, the last one at the end of the time.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

import msgspec

from gateway.bench.gauges import HELD_BYTES, SESSIONS_LIVE, SOCKETS_OPEN, read_gauges
from gateway.bench.percentiles import percentiles_ms
from gateway.bench.process_figures import CannotMeasure, cpu_seconds, open_descriptors, resident_kilobytes
from gateway.bench.visitors import Tally, Visitor


class SoakAssignment(msgspec.Struct, kw_only=True, frozen=True):
    """What to do, and to whom. Times in seconds."""

    host: str
    port: int
    pid: int
    path: str
    dialects: tuple[str, ...]
    headers: tuple[str, ...] = ()
    store_file: str = ""
    """Whose size, with its journal, is sampled."""
    sessions: int
    pace: float
    seconds: float
    every: float
    """From sample to sample."""
    name: str
    """Begins the ids of its sessions."""
    seed: int = 0


class Sample(msgspec.Struct, kw_only=True, frozen=True):
    """The gateway at one moment, and what it had done by then."""

    at_s: float
    """Since the load began."""
    resident_mb: float
    descriptors: int
    store_mb: float | None
    """The database and its journal on disk."""
    sessions_live: float | None
    sockets_open: float | None
    held_mb: float | None
    """Of events for replay, by the gateway's own count."""
    cpu_s: float
    tokens: int
    turns: int
    sessions: int
    reconnects: int
    failures: int
    token_ms: dict[str, float] | None
    """Of the tokens since the last sample; what a socket missed while it was away is among them."""
    reasons: list[str]


async def soak(assignment: SoakAssignment) -> None:
    """Do it, a line of JSON for each sample."""
    tally, latencies = Tally(), list[int]()
    started = time.monotonic()
    cpu = cpu_seconds(assignment.pid)
    async with asyncio.TaskGroup() as group:
        for number in range(assignment.sessions):
            visitor = Visitor(
                host=assignment.host,
                port=assignment.port,
                path=assignment.path,
                headers=list(assignment.headers),
                dialects=assignment.dialects,
                pace=assignment.pace,
                name=f"{assignment.name}-{number}",
                randomness=random.Random(assignment.seed * 10_000 + number),
                tally=tally,
                latencies=latencies,
            )
            group.create_task(visitor.stay(started + assignment.seconds))
        taken = 0
        while taken * assignment.every < assignment.seconds:
            taken += 1
            at = min(taken * assignment.every, assignment.seconds)
            await asyncio.sleep(started + at - time.monotonic())
            sample = await _sample(assignment, tally, latencies, started, cpu)
            latencies.clear()
            sys.stdout.buffer.write(msgspec.json.encode(sample) + b"\n")
            sys.stdout.buffer.flush()


async def _sample(
    assignment: SoakAssignment, tally: Tally, latencies: list[int], started: float, cpu: float
) -> Sample:
    gauges = await asyncio.to_thread(read_gauges, assignment.host, assignment.port, assignment.headers)
    held = gauges.get(HELD_BYTES)
    return Sample(
        at_s=round(time.monotonic() - started, 1),
        resident_mb=round(resident_kilobytes(assignment.pid) / 1024, 2),
        descriptors=open_descriptors(assignment.pid),
        store_mb=_store_megabytes(assignment.store_file),
        sessions_live=gauges.get(SESSIONS_LIVE),
        sockets_open=gauges.get(SOCKETS_OPEN),
        held_mb=None if held is None else round(held / 2**20, 2),
        cpu_s=round(cpu_seconds(assignment.pid) - cpu, 2),
        tokens=tally.tokens,
        turns=tally.turns,
        sessions=tally.sessions,
        reconnects=tally.reconnects,
        failures=tally.failures,
        token_ms=percentiles_ms(latencies),
        reasons=list(tally.reasons),
    )


def _store_megabytes(store_file: str) -> float | None:
    if not store_file:
        return None
    parts = [Path(store_file + suffix) for suffix in ("", "-wal")]
    return round(sum(part.stat().st_size for part in parts if part.exists()) / 2**20, 2)


def main() -> int:
    """Do what standard input says."""
    assignment = msgspec.json.decode(sys.stdin.buffer.read(), type=SoakAssignment)
    problem: Exception | None = None
    try:
        asyncio.run(soak(assignment))
    except* (CannotMeasure, OSError) as group:
        problem = group.exceptions[0]
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
