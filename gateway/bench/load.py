"""The load and its measurement: one scenario against one running process, in a process of its own.

    python -m gateway.bench.load < assignment.json > measurement.json

Reads an ``Assignment``, writes a ``Measurement``; a problem goes to standard error with exit code 1.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Coroutine
from typing import Any, Literal

import msgspec

from gateway.bench.emitter import Plan
from gateway.bench.percentiles import median_p99_ms, percentiles_ms
from gateway.bench.process_figures import CannotMeasure, cpu_seconds, resident_kilobytes
from gateway.bench.socket_client import DIALECTS, BenchError, SocketClient, connect, upgrade_request

CONNECTING_AT_ONCE = 50
SETTLE_SECONDS = 1.0
"""Between the last upgrade and the figures of an idle process, and before a load begins."""
ANSWER_SECONDS = 60.0
"""An answer may take so much longer than its plan before the run counts as failed."""

Percentiles = dict[str, float]


class Assignment(msgspec.Struct, kw_only=True, frozen=True):
    """What to do, and to whom. Times in seconds."""

    kind: Literal["stream", "idle", "resume"]
    host: str
    port: int
    pid: int
    path: str
    """With ``%d`` for the session's number."""
    dialect: str = "v1"
    headers: tuple[str, ...] = ()
    sessions: int = 1
    tokens: int = 0
    pace: float = 0.0
    hold: float = 0.0
    """Idle: how long CPU time is measured."""
    steady: bool = False
    """Stream: measure CPU from when all answers have begun until the first ends: without what turns cost."""


class Measurement(msgspec.Struct, kw_only=True, frozen=True):
    """What was measured; None where the scenario does not measure it."""

    sessions: int
    wall_s: float
    tokens: int = 0
    tokens_per_s: float | None = None
    cpu_us_per_token: float | None = None
    cpu_percent: float | None = None
    """Of one core, over ``wall_s``."""
    first_token_ms: Percentiles | None = None
    """From sending the message to its first token; the emitter answers at once."""
    token_ms: Percentiles | None = None
    """From the emitter's clock to arrival, of all other tokens."""
    second_p99_ms: float | None = None
    """The median of the p99s of each second: what the machine does now and then besides is not in it."""
    resume_ms: Percentiles | None = None
    """From connecting again to the last of the events missed."""
    kb_per_socket: float | None = None
    neighbour_tokens_per_s: float | None = None
    """Of the clients beside those measured, if there were any that read."""
    closed_after_s: float | None = None
    """The last of the clients that never read: from asking until its connection was closed."""
    still_open: int | None = None
    """How many that never read were not closed."""
    given_up_after_s: float | None = None
    """The first of them: until it was served no more, by the gateway's own count."""
    kb_per_stalled: float | None = None
    """Memory of a client that never reads, with its session and what that keeps for it, until then."""
    resident_mb: float = 0.0
    """At the end."""


async def measure(assignment: Assignment) -> Measurement:
    """Do it. Raises ``BenchError``, ``CannotMeasure`` and ``OSError``."""
    _allow_descriptors(assignment.sessions + 100)
    if assignment.kind == "resume":
        return await _measure_resume(assignment)
    latencies: list[int] = []
    before = resident_kilobytes(assignment.pid)
    clients = await _connect_all(assignment, latencies)
    await asyncio.sleep(SETTLE_SECONDS)
    kb_per_socket = (resident_kilobytes(assignment.pid) - before) / assignment.sessions
    if assignment.kind == "idle":
        cpu, wall = cpu_seconds(assignment.pid), time.monotonic()
        await asyncio.sleep(assignment.hold)
        cpu, wall = cpu_seconds(assignment.pid) - cpu, time.monotonic() - wall
        measurement = Measurement(
            sessions=assignment.sessions,
            wall_s=round(wall, 2),
            cpu_percent=round(cpu / wall * 100, 2),
            kb_per_socket=round(kb_per_socket, 1),
            resident_mb=round(resident_kilobytes(assignment.pid) / 1024, 1),
        )
    else:
        measurement = await _measure_stream(assignment, clients, latencies, kb_per_socket)
    for client in clients:
        client.cut()
    return measurement


async def _measure_stream(
    assignment: Assignment, clients: list[SocketClient], latencies: list[int], kb_per_socket: float
) -> Measurement:
    plan = Plan(assignment.tokens, assignment.pace)
    nonce = time.monotonic_ns()
    messages = [message(assignment.dialect, plan, f"{nonce}-{index}") for index in range(len(clients))]
    cpu, wall = cpu_seconds(assignment.pid), time.monotonic()
    answers = [client.ask(text) for client, text in zip(clients, messages, strict=True)]
    marks: list[int] = []
    marking = asyncio.ensure_future(_mark_seconds(latencies, marks))
    before = 0
    if assignment.steady:
        await _all_done([client.had_first_token for client in clients], 0.0)
        cpu, wall, before = cpu_seconds(assignment.pid), time.monotonic(), _tokens(clients)
        await asyncio.wait(answers, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        cpu, wall, tokens = cpu_seconds(assignment.pid) - cpu, time.monotonic() - wall, _tokens(clients)
    await _all_done(answers, plan.tokens * plan.pace)
    if not assignment.steady:
        cpu, wall, tokens = cpu_seconds(assignment.pid) - cpu, time.monotonic() - wall, _tokens(clients)
    marking.cancel()
    if _tokens(clients) != assignment.sessions * plan.tokens:
        raise BenchError(f"{_tokens(clients)} tokens came of {assignment.sessions * plan.tokens}")
    tokens -= before
    if tokens <= 0:
        raise BenchError("the first answer had ended before the last one began: give them more tokens")
    return Measurement(
        sessions=assignment.sessions,
        wall_s=round(wall, 2),
        tokens=tokens,
        tokens_per_s=round(tokens / wall),
        cpu_us_per_token=round(cpu / tokens * 1e6, 2),
        cpu_percent=round(cpu / wall * 100, 2),
        first_token_ms=percentiles_ms([client.first_latency for client in clients]),
        token_ms=percentiles_ms(latencies),
        second_p99_ms=median_p99_ms(latencies, marks),
        kb_per_socket=round(kb_per_socket, 1),
        resident_mb=round(resident_kilobytes(assignment.pid) / 1024, 1),
    )


async def _mark_seconds(latencies: list[int], marks: list[int]) -> None:
    while True:
        marks.append(len(latencies))
        await asyncio.sleep(1.0)


def _tokens(clients: list[SocketClient]) -> int:
    return sum(client.tokens for client in clients)


async def _measure_resume(assignment: Assignment) -> Measurement:
    """Each session loses its socket after the first token and comes back when all others have been said."""
    wait = 0.5
    plan = Plan(assignment.tokens + 1, assignment.pace, wait)
    latencies: list[int] = []
    clients = await _connect_all(assignment, latencies)
    nonce = time.monotonic_ns()
    for index, client in enumerate(clients):
        client.cuts_at_first_token = True
        client.ask(message(assignment.dialect, plan, f"{nonce}-{index}"))
    await _all_done([client.had_first_token for client in clients], wait)
    await asyncio.sleep(wait + plan.tokens * plan.pace)
    await until_quiet(assignment.pid)
    times: list[int] = []
    wall = time.monotonic()
    for index, client in enumerate(clients):
        query = f"?epoch={client.epoch}&last_seq={client.last_seq}" if client.epoch else ""
        started = time.monotonic_ns()
        again = await _connect(assignment, index, latencies, query)
        await _all_done([again.answered], 0.0)
        times.append(time.monotonic_ns() - started)
        if again.tokens != assignment.tokens:
            raise BenchError(f"{again.tokens} events came after the cut, {assignment.tokens} were missed")
        again.cut()
    return Measurement(
        sessions=assignment.sessions,
        wall_s=round(time.monotonic() - wall, 2),
        tokens=assignment.tokens * assignment.sessions,
        resume_ms=percentiles_ms(times),
        resident_mb=round(resident_kilobytes(assignment.pid) / 1024, 1),
    )


async def until_quiet(pid: int) -> None:
    """Wait until the process has hardly used its CPU for a moment: all turns are over."""
    for _ in range(600):
        cpu = cpu_seconds(pid)
        await asyncio.sleep(0.1)
        if cpu_seconds(pid) - cpu < 0.01:
            return
    raise BenchError("the gateway did not come to rest within a minute")


async def _connect_all(assignment: Assignment, latencies: list[int]) -> list[SocketClient]:
    places = asyncio.Semaphore(CONNECTING_AT_ONCE)

    async def connect_one(index: int) -> SocketClient:
        async with places:
            try:
                return await _connect(assignment, index, latencies)
            except (BenchError, OSError):
                # One of 10 000 that a busy machine kept waiting for too long would cost all others.
                await asyncio.sleep(SETTLE_SECONDS)
                return await _connect(assignment, index, latencies)

    return await asyncio.gather(*(connect_one(index) for index in range(assignment.sessions)))


async def _connect(assignment: Assignment, index: int, latencies: list[int], query: str = "") -> SocketClient:
    path = assignment.path.replace("%d", str(index))
    host = f"{assignment.host}:{assignment.port}"
    request = upgrade_request(host, path, assignment.dialect, list(assignment.headers), query)
    return await connect(
        assignment.host, assignment.port, request, assignment.dialect, latencies, within=ANSWER_SECONDS
    )


async def _all_done(answers: list[asyncio.Future[None]], expected: float) -> None:
    try:
        async with asyncio.timeout(expected + ANSWER_SECONDS):
            await asyncio.gather(*answers)
    except TimeoutError:
        over = sum(answer.cancelled() is False and answer.done() for answer in answers)
        raise BenchError(f"{over} of {len(answers)} answers came to their end in time") from None


def message(dialect: str, plan: Plan, message_id: str) -> bytes:
    """The user's message that asks for ``plan``, in the dialect's encoding."""
    return _encoded(dialect, {"type": "user_message", "content": str(plan), "role": "user"}, message_id)


def cancel(dialect: str, message_id: str) -> bytes:
    """The message that stops the running turn, in the dialect's encoding."""
    return _encoded(dialect, {"type": "cancel"}, message_id)


def _encoded(dialect: str, fields: dict[str, str], message_id: str) -> bytes:
    if dialect != "v1":
        fields["id"] = message_id
    return msgspec.msgpack.encode(fields) if dialect == "v2-msgpack" else msgspec.json.encode(fields)


def _allow_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise BenchError(f"{wanted} open files are needed, {hard} are allowed: raise `ulimit -n`")
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """Do what standard input says."""
    assignment = msgspec.json.decode(sys.stdin.buffer.read(), type=Assignment)
    if assignment.dialect not in DIALECTS:
        sys.stderr.write(f"no such dialect: {assignment.dialect}\n")
        return 1
    return report(measure(assignment))


def report(measuring: Coroutine[Any, Any, msgspec.Struct]) -> int:
    """Measure, and write what came of it to standard output; 1 when it failed, which standard error says."""
    try:
        measurement = asyncio.run(measuring)
    except (BenchError, CannotMeasure, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(measurement))
    return 0


if __name__ == "__main__":
    sys.exit(main())
