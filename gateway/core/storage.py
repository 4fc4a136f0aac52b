"""What a session store is given and gives back. Plain values; the rules are in ``ports.SessionStore``."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec
from attrs import field, frozen

from gateway.core.events import Event
from gateway.core.trace_context import TraceContext

NOBODY = ""
"""In place of an owner: the session is known and nobody's yet, as services leave it that own nothing."""


class TurnState(enum.Enum):
    """State of a session's turn, as v2 clients see it in ``welcome`` and ``snapshot``."""

    IDLE = "idle"
    RUNNING = "running"
    AWAITING_TOOL = "awaiting_tool"
    AWAITING_APPROVAL = "awaiting_approval"


@frozen
class PendingCall:
    """A tool call that the client has not answered yet."""

    call_id: str
    requires_approval: bool
    data: bytes = field(repr=False)
    """The ``tool_call`` event as JSON."""


@frozen
class QueuedMessage:
    """A client message that was accepted and whose turn has not started."""

    turn_id: str
    message_id: str | None
    """The ``id`` of a v2 message; None from v1."""
    overtakes: bool
    """Goes before queued ``user_message``s: ``tool_result`` and ``hitl_decision``."""
    body: bytes = field(repr=False)
    """What the Agent Runtime is sent as ``message``: a JSON object."""
    subject: str
    request_id: str
    accepted_at: float
    trace: TraceContext | None = field(default=None, eq=False)
    """The trace of its socket's handshake. Not stored: a restart ends it."""


@frozen
class LedgerEntry:
    """One line of the idempotency ledger: this ``id`` was accepted and became this turn."""

    message_id: str
    turn_id: str
    accepted_at: float
    """Unix seconds; entries older than the dedupe window may be dropped."""


@frozen
class Decision:
    """An approval that has its one winner."""

    call_id: str
    decision: str
    decided_at: float


@frozen
class SessionRecord:
    """The small state of a session, replaced as a whole when any of it changes (never per token)."""

    epoch: str
    touched_at: float
    turn_id: str | None = None
    turn_state: TurnState = TurnState.IDLE
    turn_first_seq: int = 0
    """Seq of the ``turn_started`` of the turn; the running answer is made of the tokens after it."""
    turn_message: QueuedMessage | None = None
    """The message that the running turn was started with, for continuing it after a restart."""
    resumable: bool = False
    """Whether the runtime said that the running turn's stream can be resumed."""
    unsent: bool = False
    """Whether the running turn's message never went to the runtime: whoever has the session next sends it."""
    pending: tuple[PendingCall, ...] = ()
    text_prefix: str = field(default="", repr=False)
    """The part of the running answer whose events are already trimmed."""


class SessionCommit(msgspec.Struct, frozen=True):
    """One atomic step of one session. Empty fields change nothing.

    A msgspec Struct because one is made per session and group commit (see ``events.Event``).
    """

    session_id: str
    record: SessionRecord | None = None
    events: tuple[Event, ...] = ()
    """Appended; the first seq is one more than the last stored."""
    last_event_id: str | None = None
    """The runtime's ``id:`` as of these events; empty: none yet, as a turn begins; None: unchanged."""
    queued: tuple[QueuedMessage, ...] = ()
    """Added to the queue, at its end."""
    dequeued: tuple[str, ...] = ()
    """Turn ids that leave the queue."""
    ledger: tuple[LedgerEntry, ...] = ()
    decisions: tuple[Decision, ...] = ()
    trimmed_to: int | None = None
    """Events with this seq and below are dropped."""
    reset: bool = False
    """Before anything else, drop the session's events, queue, ledger and decisions (a new epoch begins)."""

    @property
    def is_of_events(self) -> bool:
        """Whether it changes nothing but events, trims and event ids, as all but a few do."""
        return not (
            self.record is not None
            or self.queued
            or self.dequeued
            or self.ledger
            or self.decisions
            or self.reset
        )


@frozen
class StoredSession:
    """Everything that a store holds of one session."""

    session_id: str
    owner: str
    """A subject, or ``NOBODY``."""
    record: SessionRecord | None
    """None when the session was only claimed so far."""
    first_seq: int
    """Seq of the oldest event held; ``last_seq + 1`` when none is."""
    last_seq: int
    """Seq of the newest event ever stored in this epoch; 0 when there was none."""
    events: tuple[Event, ...] = field(default=(), repr=False)
    last_event_id: str | None = None
    queue: tuple[QueuedMessage, ...] = ()
    """In the order they were accepted."""
    ledger: tuple[LedgerEntry, ...] = ()
    decisions: tuple[Decision, ...] = ()


class CommitRefused(Exception):
    """Some sessions' commits do not fit what the store holds of them; the others of the call are stored.

    Either the caller has a bug, or the store lost the session's past while the caller still had it in
    memory (its file was corrupt and begun anew). In both cases the session goes on only by claiming it
    and committing ``reset=True`` with a new epoch. Of a refused session, what stood before the unfit commit
    in the same call is stored, that commit and all after it are not. Trying again will not help.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        why = "; ".join(sorted(set(reasons.values())))
        super().__init__(
            f"The store refused the commits of {len(reasons)} session(s): {why}. "
            "They need a new epoch; trying the same again will not help."
        )
        self.reasons = reasons
        """Why, by session id; without content."""
