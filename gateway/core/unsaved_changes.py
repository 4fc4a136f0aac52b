"""What a session has changed since its last commit, gathered into the next one."""

from __future__ import annotations

from collections.abc import Callable

from attrs import Factory, define

from gateway.core.event_log import EventLog
from gateway.core.events import Event
from gateway.core.storage import Decision, LedgerEntry, QueuedMessage, SessionCommit, SessionRecord


@define
class UnsavedChanges:
    """The small changes since the last commit; new events are those of the log after ``saved_seq``."""

    saved_seq: int = 0
    record: bool = False
    queued: list[QueuedMessage] = Factory(list)
    dequeued: list[str] = Factory(list)
    ledger: list[LedgerEntry] = Factory(list)
    decisions: list[Decision] = Factory(list)
    trimmed_to: int | None = None
    last_event_id: str | None = None
    reset: bool = False

    def take(
        self, session_id: str, log: EventLog, make_record: Callable[[], SessionRecord]
    ) -> SessionCommit | None:
        """The commit that stores everything gathered, and start anew; None when there is nothing."""
        last_seq = log.last_seq
        if self.saved_seq + 1 == last_seq:
            events: tuple[Event, ...] = (log.newest,)
        else:
            events = tuple(log.between(self.saved_seq, last_seq))
        if not (self.record or self.queued or self.dequeued or self.ledger or self.decisions or self.reset):
            # Per token only this path is taken: the small state changes at the edges of turns.
            if not events and self.trimmed_to is None:
                return None
            commit = SessionCommit(
                session_id, events=events, last_event_id=self.last_event_id, trimmed_to=self.trimmed_to
            )
        else:
            commit = SessionCommit(
                session_id=session_id,
                record=make_record(),
                events=events,
                last_event_id=self.last_event_id,
                queued=tuple(self.queued),
                dequeued=tuple(self.dequeued),
                ledger=tuple(self.ledger),
                decisions=tuple(self.decisions),
                trimmed_to=self.trimmed_to,
                reset=self.reset,
            )
            self._clear()
        self.saved_seq = last_seq
        self.trimmed_to = self.last_event_id = None
        return commit

    def discard(self) -> None:
        """Forget what was gathered: for stores that keep nothing."""
        if self.record or self.queued or self.dequeued or self.decisions or self.ledger:
            self._clear()

    def _clear(self) -> None:
        self.record = self.reset = False
        self.queued, self.dequeued, self.ledger, self.decisions = [], [], [], []
