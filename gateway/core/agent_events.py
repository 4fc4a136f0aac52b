"""What an event of the Agent Runtime means: the dialects of protocol.md section 3, read into one form."""

from __future__ import annotations

from typing import Literal, NamedTuple

from gateway.core.events import EventKind
from gateway.core.sse import ServerSentEvent

SkipReason = Literal["not_json", "not_object", "no_type"]


class AgentEvent(NamedTuple):
    """An event for the session's log. A NamedTuple because one is made per token (see ``events.Event``)."""

    kind: EventKind
    """``TOKEN`` for an ``assistant_message`` with a ``token`` that is not final, else ``AGENT``."""
    type: str
    data: bytes
    """A JSON object in UTF-8: first byte ``{``, one line, no null fields, no ``seq``. Safe to retain."""
    token: str | None = None
    """The text that an ``assistant_message`` adds to the answer, also when it is final."""
    is_final: bool = False
    """Whether an ``assistant_message`` says that the answer ends with it."""
    call_id: str | None = None
    """Of a ``tool_call``; None too when the runtime gave none, or one that is not a non-empty string."""
    requires_approval: bool = False
    """Of a ``tool_call``: whether a person has to decide before it is carried out."""


class TurnDone(NamedTuple):
    """The runtime says that the turn is over; nothing of it follows."""


class Skipped(NamedTuple):
    """An event that cannot be shown to anyone; to be counted, the stream goes on."""

    reason: SkipReason
    """Also the label of ``gateway_agent_events_skipped_total``."""


def interpret(event: ServerSentEvent) -> AgentEvent | TurnDone | Skipped:
    """Say what ``event`` is. Never raises, whatever the bytes are."""
    return Skipped("not_json") if event.data != b"[DONE]" else TurnDone()
