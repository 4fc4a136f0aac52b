"""What an operator is shown of a running gateway: plain values, without any message's content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import field, frozen


@frozen
class PulseSample:
    """The state of the process at one second. Totals count from the process's start."""

    at: float
    """Seconds since the Unix epoch."""
    tokens: int
    """Total tokens of the Agent Runtime."""
    frames_sent: int
    """Total data frames given to sockets."""
    bytes_sent: int
    """Total payload given to sockets."""
    bytes_received: int
    """Total payload from sockets."""
    sockets: int
    sessions: int
    turns_running: int
    turns_waiting: int
    lag: float
    """The event loop's worst lateness in this second, in seconds."""
    added: Sequence[float] = ()
    """What the gateway added to the events timed in this second, in seconds."""


@frozen
class SessionOverview:
    """One live session."""

    session_id: str
    state: str
    """Of its turn: ``idle``, ``running``, ``awaiting_tool`` or ``awaiting_approval``."""
    turn_id: str | None
    agent: str
    """The agent that the runtime last switched to; empty when it never did since the session was loaded."""
    queued: int
    """Messages that wait for their turn."""
    dialects: Sequence[str]
    """What each attached socket speaks."""
    rtt: float | None
    """Seconds, of the socket that answered its last ping first; None before the first pong."""
    unacked_bytes: int
    last_seq: int
    held_bytes: int
    """Memory of its events."""
    touched_at: float
    """When its client last said something; seconds since the Unix epoch."""
    last_error: str
    """Code of the last error that its clients were told; empty when there was none."""


@frozen
class SessionList:
    """The live sessions that were asked for: those with sockets or a turn first, then by last use."""

    sessions: Sequence[SessionOverview]
    found: int
    """How many there are; more than are listed when there are many."""


@frozen
class JournalEntry:
    """One thing that was logged; safe to show, as logs are."""

    number: int
    """Rises by one per entry of the process."""
    at: float
    """Seconds since the Unix epoch."""
    level: str
    event: str
    fields: Mapping[str, object] = field(factory=dict)
