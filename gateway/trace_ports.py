"""The Protocols of traces: spans of turns and REST calls, exported by whoever implements them.

Where traces are off there is no ``Tracing`` at all, so that nothing is spent on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gateway.core.trace_context import TraceContext

Attributes = Mapping[str, str | bool | int | float]
"""By name, as in OpenTelemetry's semantic conventions where those have one. Never a key, a token, or a
message's content."""


class Span(Protocol):
    """One piece of work that is under way. None of it raises, blocks or checkpoints."""

    @property
    def context(self) -> TraceContext | None:
        """What to send on with every request that belongs to this work."""
        ...

    @property
    def log_fields(self) -> Mapping[str, str]:
        """``trace_id`` and ``span_id``, for the log lines of this work."""
        ...

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something happened now."""
        ...

    def end(self, attributes: Attributes, *, error: str = "") -> None:
        """It is over; to be called once. ``error`` is the code of a failure that is the server's."""
        ...


class Tracing(Protocol):
    """Begins spans."""

    def begin(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        """Begin to serve a request, in the trace of ``parent`` or in a new one. Neither raises nor blocks.

        ``name`` is one of few: never a session, a subject or an address.
        """
        ...
