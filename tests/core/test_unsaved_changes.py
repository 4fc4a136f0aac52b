"""What is gathered between two commits."""

from __future__ import annotations

import pytest

from gateway.core.event_log import EventLog
from gateway.core.events import Event, EventKind
from gateway.core.storage import Decision, LedgerEntry, QueuedMessage, SessionCommit, SessionRecord
from gateway.core.unsaved_changes import UnsavedChanges

RECORD = SessionRecord(epoch="e", touched_at=1.0)


def take(unsaved: UnsavedChanges, log: EventLog) -> SessionCommit | None:
    """Take the commit, with a record that is always the same."""
    return unsaved.take("s", log, lambda: RECORD)


def no_record() -> SessionRecord:
    """A record that must not be made."""
    pytest.fail("a record is made per token")


def test_nothing_new_is_no_commit() -> None:
    """An empty step is not stored."""
    assert take(UnsavedChanges(), EventLog()) is None


def test_events_are_committed_once_and_without_a_record() -> None:
    """Each token is in exactly one commit, which carries nothing else."""
    log, unsaved = EventLog(), UnsavedChanges()
    log.append(EventKind.TOKEN, b"{}")
    unsaved.last_event_id = "7"
    assert unsaved.take("s", log, no_record) == SessionCommit(
        "s", events=(Event(1, EventKind.TOKEN, b"{}"),), last_event_id="7"
    )
    assert unsaved.take("s", log, no_record) is None
    log.append(EventKind.TOKEN, b"{}")
    assert unsaved.take("s", log, no_record) == SessionCommit("s", events=(Event(2, EventKind.TOKEN, b"{}"),))


def test_a_trim_alone_is_worth_a_commit() -> None:
    """Else the store would keep what no one needs until the next event."""
    unsaved = UnsavedChanges(trimmed_to=5)
    assert unsaved.take("s", EventLog(last_seq=9), no_record) == SessionCommit("s", trimmed_to=5)
    assert take(unsaved, EventLog(last_seq=9)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"queued": [QueuedMessage("t", None, False, b"{}", "s", "r", 1.0)]},
        {"dequeued": ["t"]},
        {"ledger": [LedgerEntry("m", "t", 1.0)]},
        {"decisions": [Decision("c", "approve", 1.0)]},
        {"reset": True},
        {"record": True},
    ],
)
def test_every_small_change_brings_the_record_along(change: dict[str, object]) -> None:
    """One atomic step has all of it, and the next has none of it again."""
    log = EventLog()
    unsaved = UnsavedChanges(**change, trimmed_to=3, saved_seq=0)  # type: ignore[arg-type]
    log.append(EventKind.AGENT, b"{}")
    commit = take(unsaved, log)
    assert commit is not None
    assert commit.record is RECORD
    assert (len(commit.events), commit.trimmed_to) == (1, 3)
    for name, value in change.items():
        if name != "record":
            assert getattr(commit, name) == (tuple(value) if isinstance(value, list) else value)
    assert take(unsaved, log) is None


def test_what_no_store_keeps_is_forgotten() -> None:
    """Nothing piles up in a session that is never committed."""
    unsaved = UnsavedChanges(record=True, dequeued=["t"], ledger=[LedgerEntry("m", "t", 1.0)])
    unsaved.discard()
    assert unsaved == UnsavedChanges()
