"""What the session state asks its shell to do."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from gateway.client.errors import ClientError
from gateway.client.events import Accepted, SessionEvent, Welcome


@frozen
class Welcomed:
    """The socket is live."""

    welcome: Welcome


@frozen
class Deliver:
    """Give ``event`` to the application."""

    event: SessionEvent
    size: int
    """Bytes it took on the wire, so that what waits for the application can be bounded."""


@frozen
class Transmit:
    """Send an object on the socket."""

    fields: Mapping[str, object] = field(repr=False)
    message_id: str | None = None
    """Of a message that will be answered."""


@frozen
class Answered:
    """Tell the sender of a message what became of it."""

    message_id: str
    answer: Accepted | ClientError


@frozen
class RenewToken:
    """Get a token and send it: the one in use is about to expire."""

    in_s: float


@frozen
class LeaveSoon:
    """The gateway is restarting: leave this socket and come back after ``after`` seconds."""

    after: float


@frozen
class Break:
    """The gateway broke the protocol: close the socket and resume on another."""

    reason: str


Effect = Welcomed | Deliver | Transmit | Answered | RenewToken | LeaveSoon | Break
