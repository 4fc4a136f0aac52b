"""``memory://``: the store's semantics in RAM. Nothing outlives the process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import trio
from attrs import define, field

from gateway.core.events import Event
from gateway.core.packing import pack_commit
from gateway.core.storage import (
    NOBODY,
    CommitRefused,
    Decision,
    LedgerEntry,
    QueuedMessage,
    SessionCommit,
    SessionRecord,
    StoredSession,
    TurnState,
)
from gateway.ports import SessionStore


@define
class _Held:
    """What is held of one session."""

    owner: str
    record: SessionRecord | None = None
    events: list[Event] = field(factory=list)
    last_seq: int = 0
    last_event_id: str | None = None
    queue: list[QueuedMessage] = field(factory=list)
    ledger: dict[str, LedgerEntry] = field(factory=dict)
    decisions: dict[str, Decision] = field(factory=dict)

    @property
    def size(self) -> int:
        """Bytes of events and queued messages."""
        return sum(len(event.data) for event in self.events) + sum(len(item.body) for item in self.queue)


class MemoryStore(SessionStore):
    """See ``ports.SessionStore``. Each method is a checkpoint first and atomic after it."""

    def __init__(self, *, dedupe_window: float) -> None:
        self._dedupe_window = dedupe_window
        self._sessions: dict[str, _Held] = {}
        self._held_bytes = 0

    @property
    def is_durable(self) -> bool:
        """False."""
        return False

    @property
    def held_bytes(self) -> int:
        """Bytes of the events and queued messages held."""
        return self._held_bytes

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Apply commits. Raises ``CommitRefused``; cancelled, nothing was applied."""
        await trio.lowlevel.checkpoint()
        self.commit_nowait(commits)

    def commit_nowait(self, commits: Sequence[SessionCommit]) -> bool:
        """See the port; always True."""
        refused: dict[str, str] = {}
        for commit in commits:
            if commit.session_id in refused:
                continue
            held = self._sessions.get(commit.session_id)
            reason = "the session is not known" if held is None else _misfit(held, commit)
            if reason is not None:
                refused[commit.session_id] = reason
            elif held is not None:
                self._held_bytes -= held.size
                self._apply(held, commit)
                self._held_bytes += held.size
        if refused:
            raise CommitRefused(refused)
        return True

    def _apply(self, held: _Held, commit: SessionCommit) -> None:
        if commit.reset:
            held.events, held.queue, held.ledger, held.decisions = [], [], {}, {}
            held.last_seq, held.last_event_id = 0, None
        if commit.record is not None:
            held.record = commit.record
        if commit.events:
            held.events.extend(commit.events)
            held.last_seq = commit.events[-1].seq
        if commit.last_event_id is not None:
            held.last_event_id = commit.last_event_id
        held.queue.extend(commit.queued)
        if commit.dequeued:
            held.queue = [item for item in held.queue if item.turn_id not in commit.dequeued]
        for entry in commit.ledger:
            held.ledger.pop(entry.message_id, None)
            held.ledger[entry.message_id] = entry
        if commit.ledger:
            oldest = max(entry.accepted_at for entry in commit.ledger) - self._dedupe_window
            held.ledger = {key: entry for key, entry in held.ledger.items() if entry.accepted_at >= oldest}
        for decision in commit.decisions:
            held.decisions.setdefault(decision.call_id, decision)
        if commit.trimmed_to is not None:
            held.events = [event for event in held.events if event.seq > commit.trimmed_to]

    async def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None."""
        await trio.lowlevel.checkpoint()
        held = self._sessions.get(session_id)
        if held is None:
            return None
        return StoredSession(
            session_id=session_id,
            owner=held.owner,
            record=held.record,
            first_seq=held.events[0].seq if held.events else held.last_seq + 1,
            last_seq=held.last_seq,
            events=tuple(held.events),
            last_event_id=held.last_event_id,
            queue=tuple(held.queue),
            ledger=tuple(held.ledger.values()),
            decisions=tuple(held.decisions.values()),
        )

    async def owner(self, session_id: str) -> str | None:
        """The subject that the session belongs to, or None."""
        await trio.lowlevel.checkpoint()
        held = self._sessions.get(session_id)
        return None if held is None else held.owner or None

    async def claim(self, session_id: str, subject: str, now: float) -> str:  # noqa: ARG002 - of no use here
        """Make ``subject`` the owner if there is none; returns the owner."""
        await trio.lowlevel.checkpoint()
        held = self._sessions.setdefault(session_id, _Held(subject))
        held.owner = held.owner or subject
        return held.owner

    async def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions that belong to ``subject``."""
        await trio.lowlevel.checkpoint()
        return frozenset(key for key, held in self._sessions.items() if held.owner == subject != NOBODY)

    async def unfinished(self) -> Sequence[str]:
        """Sessions whose turn was running or that have messages queued."""
        await trio.lowlevel.checkpoint()
        return [
            key
            for key, held in self._sessions.items()
            if held.queue or (held.record is not None and held.record.turn_state is TurnState.RUNNING)
        ]

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop all but the ownership of sessions last touched before ``before``, except those in ``keep``."""
        await trio.lowlevel.checkpoint()
        dropped = 0
        for key, held in self._sessions.items():
            if held.record is not None and held.record.touched_at < before and key not in keep:
                self._held_bytes -= held.size
                self._sessions[key] = _Held(held.owner)
                dropped += 1
        return dropped

    async def check(self) -> None:
        """Return at once: RAM can be written."""
        await trio.lowlevel.checkpoint()

    async def maintain(self) -> None:
        """Return at once: there is nothing to tidy."""
        await trio.lowlevel.checkpoint()


def _misfit(held: _Held, commit: SessionCommit) -> str | None:
    """Why this commit cannot be the session's next one, or None when it can."""
    if commit.events and commit.events[0].seq != (1 if commit.reset else held.last_seq + 1):
        return "its events do not follow the last one stored"
    try:
        pack_commit(commit)
    except ValueError:
        return "it holds text that is not Unicode, or events that are not consecutive"
    return None


@asynccontextmanager
async def open_memory_store(*, dedupe_window: float) -> AsyncIterator[MemoryStore]:
    """A fresh, empty store. ``dedupe_window``: seconds that the idempotency ledger reaches back."""
    yield MemoryStore(dedupe_window=dedupe_window)
