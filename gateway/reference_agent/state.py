"""The port to whatever keeps the runtime's state, and the records that pass through it."""

from collections.abc import Mapping
from typing import Any, Protocol

import attrs

from gateway.reference_agent.history import Entry
from gateway.reference_agent.session import AuditRecord, SessionState

RUNNING = "running"
FINISHED = "finished"
STOPPED = "stopped"

KEYED_TURNS_KEPT = 16
"""Finished turns whose events a session keeps for clients that come back with an ``Idempotency-Key``."""


@attrs.frozen
class TurnRecord:
    """What is kept of one request that carried an ``Idempotency-Key``."""

    session_id: str
    key: str
    digest: str
    """Of the message: the same key with another message is a mistake of the client."""

    status: str
    settled: int = 0
    """Number of events that belong to steps recorded in the history; those after it are of the open step."""

    events: tuple[bytes, ...] = ()
    """The JSON of its events, numbered from 1."""


@attrs.frozen
class Change:
    """What one commit makes true, all of it or nothing."""

    session: SessionState
    entries: tuple[Entry, ...] = ()
    audit: tuple[AuditRecord, ...] = ()
    turn: TurnRecord | None = None
    """The turn without its events, if the request was keyed."""

    new_events: tuple[bytes, ...] = ()
    """Events of ``turn`` to be added behind those it has."""

    starts_turn: bool = False
    """A new turn begins: whichever other turn of the session is still running is stopped for good."""


class StateStore(Protocol):
    """Keeps sessions, histories, keyed turns and the audit log.

    Reads may be cancelled at any time. `commit` and `add_events` are atomic and not torn by cancellation.
    """

    async def session(self, session_id: str) -> SessionState | None:
        """The state of one session, or None."""
        ...

    async def history(self, session_id: str) -> list[Entry]:
        """All entries of one session, oldest first."""
        ...

    async def sessions(self, user_id: str | None, limit: int, offset: int) -> tuple[list[SessionState], int]:
        """Sessions, last changed first (only those of ``user_id`` if given), and how many there are."""
        ...

    async def audit(
        self, session_id: str | None, event_type: str | None, limit: int, offset: int
    ) -> tuple[list[AuditRecord], int]:
        """Audit records, newest first, and how many fit."""
        ...

    async def audit_counts(self) -> Mapping[str, int]:
        """How many audit records there are of each type."""
        ...

    async def metric_totals(self) -> Mapping[str, int]:
        """The counters of all sessions added up."""
        ...

    async def turn(self, session_id: str, key: str) -> TurnRecord | None:
        """One keyed turn with its events, or None when it is unknown or forgotten."""
        ...

    async def commit(self, change: Change) -> None:
        """Make all of ``change`` true, or raise and change nothing."""
        ...

    async def add_events(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        """Add events of the open step behind those the turn has. A commit must have made the turn known."""
        ...


def audit_to_json(record: AuditRecord) -> dict[str, Any]:
    """An audit record as the route shows it."""
    return {
        "timestamp": record.at,
        "session_id": record.session_id,
        "event_type": record.event_type,
        "details": dict(record.details),
    }
