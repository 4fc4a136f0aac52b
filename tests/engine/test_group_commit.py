"""One writer for all sessions: what is stored together, what happens when it cannot be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from gateway.core.errors import StoreUnavailable
from gateway.core.events import Event, EventKind
from gateway.core.storage import CommitRefused, SessionCommit
from gateway.engine.group_commit import AT_ONCE_INTERVAL, COMMIT_INTERVAL, RETRY_SECONDS, GroupCommit
from tests.engine.fakes import DurableMemoryStore, RecordingTelemetry

Mock = trio.testing.MockClock


class NotingStore(DurableMemoryStore):
    """Keeps the groups that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []
        self.refuses: dict[str, str] = {}

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Note, then do."""
        self.groups.append([commit.session_id for commit in commits])
        await trio.sleep(self.latency)
        if self.down:
            raise StoreUnavailable("The session store is away. Try again later.")
        if self.refuses:
            raise CommitRefused(self.refuses)


class FakeCommitter:
    """A session that always has one event more, or nothing."""

    def __init__(self, name: str, *, empty: bool = False) -> None:
        self.name, self.empty, self.said = name, empty, list[str]()
        self.crashes_at = ""

    def _say(self, what: str) -> None:
        self.said.append(what)
        if self.crashes_at == what:
            raise ValueError(f"a bug in {what}")

    def take_commit(self) -> SessionCommit | None:
        """An event."""
        self._say("take")
        return None if self.empty else SessionCommit(self.name, events=(Event(1, EventKind.AGENT, b"{}"),))

    def stored(self) -> None:
        """Note."""
        self._say("stored")

    def not_stored(self, error: StoreUnavailable) -> None:
        """Note."""
        self._say("not stored")

    def refused(self, reason: str) -> None:
        """Note."""
        self._say(f"refused: {reason}")


def begin(nursery: trio.Nursery) -> tuple[GroupCommit, NotingStore, RecordingTelemetry]:
    """A running writer."""
    store, telemetry = NotingStore(), RecordingTelemetry()
    writer = GroupCommit(store, telemetry)
    nursery.start_soon(writer.run)
    return writer, store, telemetry


async def test_what_changes_during_a_commit_goes_into_the_next_all_at_once(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Load makes commits larger, not more frequent, and a session marked twice is stored once."""
    writer, store, _ = begin(nursery)
    store.latency = 1.0
    one, two, three = (FakeCommitter(name) for name in "123")
    writer.mark(one)
    await trio.sleep(0.5)
    for committer in (two, three, two, one):
        writer.mark(committer)
    await writer.wait_idle()
    assert store.groups == [["1"], ["2", "3", "1"]]
    assert one.said == ["take", "stored", "take", "stored"]


async def test_commits_begin_at_most_once_per_interval(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The first at once, and the next no sooner than COMMIT_INTERVAL later."""
    writer, _, _ = begin(nursery)
    await trio.sleep(1)
    started = trio.current_time()
    writer.mark(FakeCommitter("a"))
    await writer.wait_idle()
    assert trio.current_time() == started
    writer.mark(FakeCommitter("b"))
    await writer.wait_idle()
    assert trio.current_time() - started == pytest.approx(COMMIT_INTERVAL)


async def test_a_session_without_changes_costs_no_commit_and_is_told(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """What waited on nothing new goes on at once."""
    writer, store, _ = begin(nursery)
    empty = FakeCommitter("e", empty=True)
    writer.mark(empty)
    await writer.wait_idle()
    assert (store.groups, empty.said) == ([], ["take", "stored"])


async def test_a_store_that_is_away_is_tried_until_it_is_back(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Senders are told once, new work is refused meanwhile, nothing is taken twice, one error is logged."""
    writer, store, telemetry = begin(nursery)
    store.down = True
    session = FakeCommitter("s")
    writer.mark(session)
    await trio.sleep(10 * RETRY_SECONDS + 0.01)
    assert writer.failure is not None
    assert session.said == ["take", "not stored"]
    assert len(store.groups) == 11
    store.down = False
    await writer.wait_idle()
    assert session.said[-1] == "stored"
    assert [writer.failure] == [None]
    assert telemetry.events() == ["store_unavailable", "store_available"]


async def test_a_refused_session_does_not_take_the_others_with_it(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It is told why, the others that they are stored."""
    writer, store, _ = begin(nursery)
    store.refuses = {"bad": "a gap"}
    bad, good = FakeCommitter("bad"), FakeCommitter("good")
    writer.mark(bad)
    writer.mark(good)
    await writer.wait_idle()
    assert (bad.said, good.said) == (["take", "refused: a gap"], ["take", "stored"])


@pytest.mark.parametrize("where", ["take", "stored"])
async def test_a_bug_in_one_session_does_not_end_the_writer(
    nursery: trio.Nursery, autojump_clock: Mock, where: str
) -> None:
    """The session is let go, the crash is logged and counted, all others are stored."""
    writer, _, telemetry = begin(nursery)
    bad, good = FakeCommitter("bad"), FakeCommitter("good")
    bad.crashes_at = where
    writer.mark(bad)
    writer.mark(good)
    await writer.wait_idle()
    assert bad.said[-1] == "refused: a bug in this session"
    assert good.said == ["take", "stored"]
    assert telemetry.counts[("gateway_bulkhead_catches_total", (("where", "session"),))] == 1
    assert [str(entry["cause"]) for entry in telemetry.errors()] == [f"a bug in {where}"]


async def test_one_session_is_waited_for_however_busy_the_others_are(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A session at its end leaves memory when its own changes are stored, not when all are at rest."""
    writer, store, _ = begin(nursery)
    store.latency = 1.0

    async def keep_busy() -> None:
        while True:
            writer.mark(FakeCommitter("busy"))
            await trio.sleep(0.3)

    nursery.start_soon(keep_busy)
    await trio.sleep(0.5)
    mine = FakeCommitter("mine")
    writer.mark(mine)
    with trio.fail_after(3):
        await writer.wait_stored(mine)
    assert mine.said == ["take", "stored"]
    nursery.cancel_scope.cancel()


async def test_waiting_for_nothing_lets_others_run(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Both waits are checkpoints even when there is nothing to wait for: a loop over one must not hang."""
    writer, _, _ = begin(nursery)
    with trio.testing.assert_checkpoints():
        await writer.wait_idle()
    with trio.testing.assert_checkpoints():
        await writer.wait_stored(FakeCommitter("s"))


async def test_what_a_store_can_take_at_once_is_not_waited_for(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Shown at once, and the next may come soon; what cannot be stored so is waited for."""
    writer, store, _ = begin(nursery)
    store.latency = 1.0
    store.at_once = True
    await store.claim("1", "ada", 1.0)
    one, started = FakeCommitter("1"), trio.current_time()

    writer.mark(one)
    await writer.wait_idle()
    assert (one.said, store.groups, trio.current_time() - started) == (["take", "stored"], [], 0.0)

    store.at_once = False
    writer.mark(one)
    await writer.wait_idle()
    assert (one.said[2:], store.groups) == (["take", "stored"], [["1"]])
    assert trio.current_time() - started == pytest.approx(AT_ONCE_INTERVAL + 1.0)


async def test_what_changes_while_it_is_shown_is_stored_too(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Showing an event may make a session change: that is the next round's, which nobody has to wake."""
    writer, store, _ = begin(nursery)
    store.at_once = True
    await store.claim("1", "ada", 1.0)
    empty = FakeCommitter("2", empty=True)

    class Answering(FakeCommitter):
        def stored(self) -> None:
            super().stored()
            writer.mark(empty)

    await trio.testing.wait_all_tasks_blocked()
    writer.mark(Answering("1"))
    assert empty.said == []
    await writer.wait_idle()
    assert empty.said == ["take", "stored"]


async def test_nothing_is_stored_once_the_writer_has_ended(autojump_clock: Mock) -> None:
    """What a session still does while the process goes down is as after a crash."""
    store = NotingStore()
    store.at_once = True
    await store.claim("1", "ada", 1.0)
    writer, one = GroupCommit(store, RecordingTelemetry()), FakeCommitter("1")
    writer.mark(one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await writer.wait_idle()
        nursery.cancel_scope.cancel()
    assert one.said == ["take", "stored"]
    writer.mark(one)
    assert one.said == ["take", "stored"]


async def test_what_a_store_refuses_at_once_is_refused(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Only the session concerned; the others of the group are stored."""
    writer, store, telemetry = begin(nursery)
    store.at_once = True
    await store.claim("1", "ada", 1.0)
    one, unknown = FakeCommitter("1"), FakeCommitter("2")

    writer.mark(one)
    writer.mark(unknown)
    await writer.wait_idle()
    assert one.said == ["take", "stored"]
    assert unknown.said == ["take", "refused: the session is not known"]
    assert [event for _, event, _ in telemetry.entries] == ["store_refused_commits"]


async def test_a_store_that_is_back_takes_new_work_also_if_it_refuses_what_waited(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It lost the sessions of that round: a damaged file was replaced. The others must not wait for one."""
    writer, store, telemetry = begin(nursery)
    store.down = True
    writer.mark(FakeCommitter("s"))
    await trio.sleep(RETRY_SECONDS / 2)
    assert writer.failure is not None
    store.down, store.refuses = False, {"s": "the session is not known"}
    await writer.wait_idle()
    assert [writer.failure] == [None]
    assert telemetry.events() == ["store_unavailable", "store_refused_commits", "store_available"]
