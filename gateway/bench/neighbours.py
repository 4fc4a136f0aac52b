"""Starts and stops the process in which neighbours live."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

import msgspec

from gateway.bench.neighbour_load import NeighbourAssignment, NeighbourMeasurement
from gateway.bench.scenarios import Neighbours
from gateway.bench.socket_client import BenchError
from gateway.bench.subjects import Running, Subject, child_environment

_LIFE_SECONDS = 660.0
"""A process of neighbours that lives longer hangs."""


@contextmanager
def neighbours(
    wanted: Neighbours, subject: Subject, running: Running
) -> Iterator[Callable[[], NeighbourMeasurement]]:
    """They are there when this is entered; the function that it yields ends them. Raises ``BenchError``."""
    assignment = NeighbourAssignment(
        host=running.host,
        port=running.port,
        pid=running.pid,
        path=subject.path,
        dialect=subject.dialect,
        headers=subject.headers,
        readers=wanted.readers,
        stalled=wanted.stalled,
        plan=wanted.plan,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.bench.neighbour_load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment({}),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    failed = BenchError(f"the neighbours on {subject.name} failed; what they said is above")

    def finish() -> NeighbourMeasurement:
        stdin.close()
        said = stdout.read()
        if process.wait() or not said:
            raise failed
        return msgspec.json.decode(said, type=NeighbourMeasurement)

    guard = Timer(_LIFE_SECONDS, process.kill)
    guard.start()
    try:
        stdin.write(msgspec.json.encode(assignment) + b"\n")
        stdin.flush()
        if stdout.readline() != b"ready\n":
            raise failed
        yield finish
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        stdin.close()
        stdout.close()
