"""What a session tells the application: events, answers to messages, and the state of the connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attrs import field, frozen


class ResumePoint(NamedTuple):
    """Where in a session's history a client is: everything up to ``last_seq`` of ``epoch`` is known to it."""

    epoch: str
    last_seq: int


@frozen
class SessionEvent:
    """One event of the session, in order, each exactly once.

    ``snapshot`` is the one that stands for events which cannot be had any more: its ``fields`` hold
    ``reason``, ``turn``, ``text`` (the running answer so far) and ``pending`` (open tool calls), and what is
    on the screen of the current turn is to be replaced by it.
    """

    type: str
    epoch: str
    seq: int
    first_seq: int
    """Equal to ``seq``, but for a token that the gateway merged from ``first_seq`` … ``seq``."""
    fields: Mapping[str, object] = field(repr=False)
    """The event as the gateway sent it, ``type`` and ``seq`` included."""

    @property
    def token(self) -> str:
        """The text that an ``assistant_message`` adds to the answer; empty for all others."""
        token = self.fields.get("token") if self.type == "assistant_message" else None
        return token if isinstance(token, str) else ""

    @property
    def is_final(self) -> bool:
        """Whether an ``assistant_message`` ends the answer."""
        return self.type == "assistant_message" and self.fields.get("is_final") is True

    def text(self, name: str) -> str:
        """The field ``name`` if it is a string, else an empty one."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else ""


@frozen
class Accepted:
    """The gateway holds the message in its store and will carry it out, once."""

    message_id: str
    turn_id: str | None
    duplicate: bool
    """It had been accepted before: an earlier answer was lost on the way."""


@frozen
class Welcome:
    """What the gateway said when the latest socket was opened."""

    session_id: str
    epoch: str
    first_seq: int
    """The oldest event that the gateway can still replay."""
    last_seq: int
    resumed: bool
    turn_id: str | None
    turn_state: str
    """``idle``, ``running``, ``awaiting_tool`` or ``awaiting_approval``."""
    pending: Sequence[Mapping[str, object]] = field(repr=False)
    """Tool calls that wait for a client. Those newer than ``last_seq`` also come as events."""
    max_message_bytes: int
    dedupe_window: float
    """For how many seconds a message may be sent again under its id."""
    heartbeat: float
    """Seconds between the gateway's pings."""


@frozen
class Connecting:
    """A socket is being opened."""

    attempt: int
    """1 for the first since the last welcome."""


@frozen
class Connected:
    """The session is live: the gateway's welcome has come."""

    welcome: Welcome


@frozen
class Reconnecting:
    """The socket was lost; the next attempt comes by itself."""

    delay: float
    """Seconds until then."""
    attempt: int
    code: int
    """Close code, 1006 when there was none."""
    reason: str


@frozen
class Ended:
    """It is over: no attempt will follow."""

    code: int
    reason: str


ConnectionState = Connecting | Connected | Reconnecting | Ended
