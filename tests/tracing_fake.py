"""A ``Tracing`` that remembers."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field

from gateway.core.trace_context import TraceContext
from gateway.trace_ports import Attributes, Span, Tracing

CALLER = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1")
"""A trace that a caller is in."""


@define
class RecordedSpan(Span):
    """One span as it was told."""

    name: str
    parent: TraceContext | None
    attributes: dict[str, object]
    number: int
    events: list[tuple[str, dict[str, object]]] = field(factory=list)
    error: str | None = None
    """None while it goes on."""

    @property
    def context(self) -> TraceContext:
        """The trace of its parent, or one of its own."""
        trace = self.parent.traceparent.split("-")[1] if self.parent is not None else f"{self.number:032x}"
        return TraceContext(
            f"00-{trace}-{self.number:016x}-01", self.parent.tracestate if self.parent else ""
        )

    @property
    def log_fields(self) -> Mapping[str, str]:
        """From its context."""
        _, trace_id, span_id, _ = self.context.traceparent.split("-")
        return {"trace_id": trace_id, "span_id": span_id}

    @property
    def happened(self) -> list[str]:
        """The names of its events."""
        return [name for name, _ in self.events]

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Remember."""
        assert self.error is None, "it is over"
        self.events.append((name, dict(attributes or {})))

    def end(self, attributes: Attributes, *, error: str = "") -> None:
        """Remember."""
        assert self.error is None, "it is over"
        self.attributes |= attributes
        self.error = error


class RecordingTracing(Tracing):
    """Keeps every span."""

    def __init__(self) -> None:
        self.spans: list[RecordedSpan] = []

    def begin(self, name: str, parent: TraceContext | None, attributes: Attributes) -> RecordedSpan:
        """Remember."""
        span = RecordedSpan(name, parent, dict(attributes), len(self.spans) + 1)
        self.spans.append(span)
        return span

    @property
    def only(self) -> RecordedSpan:
        """The one span that there is."""
        (span,) = self.spans
        return span
