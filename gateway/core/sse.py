"""Server-Sent Events, parsed by the WHATWG rules."""

from __future__ import annotations

from attrs import frozen


@frozen
class ServerSentEvent:
    """One dispatched event."""

    event: str
    """The event name; ``message`` when the stream gave none."""
    data: bytes
    """The data lines joined by LF, as UTF-8 (invalid sequences replaced)."""
    event_id: str | None = None
    """The last event id as of this event; None when the stream never gave one."""
