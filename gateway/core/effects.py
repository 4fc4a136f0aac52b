"""What the session asks its runner to do: the right-hand side of ``(input, now) → effects``."""

from __future__ import annotations

from attrs import frozen

from gateway.core.errors import GatewayError
from gateway.core.storage import QueuedMessage


@frozen
class Accepted:
    """Tell the sender that its message is taken (once the store holds it)."""

    message_id: str | None
    turn_id: str | None
    duplicate: bool = False


@frozen
class Refused:
    """Tell the sender why its message was not taken."""

    error: GatewayError
    message_id: str | None = None
    call_id: str | None = None


@frozen
class StartTurn:
    """POST this message to the Agent Runtime (once the store holds that the turn has started)."""

    message: QueuedMessage
    resumes: bool = False
    """A turn that ran before a restart: continue its stream after ``last_event_id``."""
    last_event_id: str | None = None


@frozen
class StopTurn:
    """Close the upstream request of this turn; its end is in the log already."""

    turn_id: str


Effect = Accepted | Refused | StartTurn | StopTurn
