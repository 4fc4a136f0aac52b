"""Containment: a crash in one branch ends that branch, is logged once and counted, and goes no further."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.ports import Telemetry


@contextmanager
def bulkhead(telemetry: Telemetry, where: str, **context: object) -> Iterator[None]:
    """Stop every ``Exception`` of the block here; ``Cancelled`` and ``KeyboardInterrupt`` pass.

    Trio wraps what a nursery raises in groups; a group of exceptions is stopped as a whole, and a group
    that also holds a cancellation or an interrupt goes on without the exceptions.
    """
    try:
        yield
    except* Exception as group:
        report_crash(telemetry, where, group, **context)


def report_crash(
    telemetry: Telemetry, where: str, group: BaseExceptionGroup[Exception], **context: object
) -> None:
    """Log and count a crash that was stopped, by its one cause if it has one."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    telemetry.error(f"{where}_crashed", cause=cause, **context)
    telemetry.count("gateway_bulkhead_catches_total", where=where)
