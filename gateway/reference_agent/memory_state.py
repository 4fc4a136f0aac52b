"""State in memory: gone with the process, for demos and tests."""

from collections import Counter, deque
from collections.abc import Mapping

import attrs
import trio

from gateway.reference_agent.history import Entry
from gateway.reference_agent.session import AuditRecord, SessionState
from gateway.reference_agent.state import KEYED_TURNS_KEPT, RUNNING, STOPPED, Change, StateStore, TurnRecord

AUDIT_KEPT = 10_000
SESSIONS_KEPT = 1_000


class MemoryState(StateStore):
    """Keeps everything in dictionaries.

    Bounded: the audit log to its newest 10 000 records, sessions to the ``sessions_kept`` last changed.
    """

    def __init__(self, sessions_kept: int = SESSIONS_KEPT) -> None:
        self._sessions_kept = sessions_kept
        self._sessions: dict[str, SessionState] = {}
        self._histories: dict[str, list[Entry]] = {}
        self._turns: dict[str, dict[str, TurnRecord]] = {}
        self._audit: deque[AuditRecord] = deque(maxlen=AUDIT_KEPT)

    async def session(self, session_id: str) -> SessionState | None:
        """The state of one session, or None."""
        await trio.lowlevel.checkpoint()
        return self._sessions.get(session_id)

    async def history(self, session_id: str) -> list[Entry]:
        """All entries of one session, oldest first."""
        await trio.lowlevel.checkpoint()
        return list(self._histories.get(session_id, ()))

    async def sessions(self, user_id: str | None, limit: int, offset: int) -> tuple[list[SessionState], int]:
        """Sessions, last changed first."""
        await trio.lowlevel.checkpoint()
        found = [one for one in self._sessions.values() if user_id is None or one.user_id == user_id]
        found.sort(key=lambda one: (one.updated_at, one.session_id), reverse=True)
        return found[offset : offset + limit], len(found)

    async def audit(
        self, session_id: str | None, event_type: str | None, limit: int, offset: int
    ) -> tuple[list[AuditRecord], int]:
        """Audit records, newest first."""
        await trio.lowlevel.checkpoint()
        found = [
            one
            for one in reversed(self._audit)
            if session_id in (None, one.session_id) and event_type in (None, one.event_type)
        ]
        return found[offset : offset + limit], len(found)

    async def audit_counts(self) -> Mapping[str, int]:
        """How many audit records there are of each type."""
        await trio.lowlevel.checkpoint()
        return Counter(one.event_type for one in self._audit)

    async def metric_totals(self) -> Mapping[str, int]:
        """The counters of all sessions added up."""
        await trio.lowlevel.checkpoint()
        totals: Counter[str] = Counter()
        for one in self._sessions.values():
            totals.update(one.metrics)
        return totals

    async def turn(self, session_id: str, key: str) -> TurnRecord | None:
        """One keyed turn with its events, or None."""
        await trio.lowlevel.checkpoint()
        return self._turns.get(session_id, {}).get(key)

    async def commit(self, change: Change) -> None:
        """Apply the change without yielding, so that it is atomic; then let others run."""
        session_id = change.session.session_id
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = change.session
        while len(self._sessions) > self._sessions_kept:
            self._forget(next(iter(self._sessions)))
        self._histories.setdefault(session_id, []).extend(change.entries)
        self._audit.extend(change.audit)
        turns = self._turns.setdefault(session_id, {})
        if change.starts_turn:
            for key, other in turns.items():
                if other.status == RUNNING:
                    turns[key] = attrs.evolve(other, status=STOPPED)
        if change.turn is not None:
            self._add(change.turn, change.new_events)
            while len(turns) > KEYED_TURNS_KEPT:
                del turns[next(iter(turns))]
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def add_events(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        """Add events of the open step behind those the turn has."""
        self._add(turn, new_events)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _forget(self, session_id: str) -> None:
        del self._sessions[session_id]
        self._histories.pop(session_id, None)
        self._turns.pop(session_id, None)

    def _add(self, turn: TurnRecord, new_events: tuple[bytes, ...]) -> None:
        turns = self._turns.setdefault(turn.session_id, {})
        kept = turns.get(turn.key)
        before = () if kept is None else kept.events
        turns[turn.key] = attrs.evolve(turn, events=before + new_events)
