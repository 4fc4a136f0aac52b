"""The task that waits for a socket while there is something to wait for."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.engine.flusher import Ending, Flusher, wait_sent_in_time
from gateway.ports import ConnectionClosed
from tests.engine.fakes import FakeConnection

Mock = trio.testing.MockClock


class Owner:
    """A socket that can be blocked, and counts the tasks that were started for it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.is_blocked = False
        self.taken = trio.Event()
        self.started = 0
        self.endings: list[Ending | None] = []
        self.flusher = Flusher(lambda: self.is_blocked, self._wait_taken)

    async def _wait_taken(self) -> Ending | None:
        await self.taken.wait()
        self.is_blocked = False
        return None

    def start(self) -> None:
        """A task of the nursery."""
        self.started += 1
        self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        self.endings.append(await self.flusher.run())


async def test_runs_only_while_it_is_needed(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """No task for a socket that takes all; one, however often it is needed; and another the next time."""
    owner = Owner(nursery)
    owner.flusher.begin(owner.start)
    assert owner.started == 0
    for turn in (1, 2):
        owner.is_blocked, owner.taken = True, trio.Event()
        owner.flusher.need()
        owner.flusher.need()
        await trio.testing.wait_all_tasks_blocked()
        assert (owner.started, len(owner.endings)) == (turn, turn - 1)
        owner.taken.set()
        await trio.testing.wait_all_tasks_blocked()
        assert owner.endings == [None] * turn


@pytest.mark.parametrize("when", ["before", "idle", "waiting"])
async def test_an_end_is_told_whenever_it_comes(
    nursery: trio.Nursery, autojump_clock: Mock, when: str
) -> None:
    """Before the nursery is there, with no task, and in the middle of a wait; the first one counts."""
    owner = Owner(nursery)
    owner.is_blocked = when == "waiting"
    if when == "before":
        owner.flusher.end(1012, "first")
    owner.flusher.begin(owner.start)
    await trio.testing.wait_all_tasks_blocked()
    owner.flusher.end(1012, "first")
    owner.flusher.end(4413, "second")
    await trio.testing.wait_all_tasks_blocked()

    assert owner.endings == [(1012, "first")]


async def test_what_was_blocked_before_it_began_is_waited_for(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """``begin`` catches up; after ``finish`` nothing is started."""
    owner = Owner(nursery)
    owner.is_blocked = True
    owner.flusher.need()
    assert owner.started == 0
    owner.flusher.begin(owner.start)
    assert owner.started == 1
    owner.taken.set()
    await trio.testing.wait_all_tasks_blocked()
    owner.flusher.finish()
    owner.is_blocked = True
    owner.flusher.need()
    owner.flusher.end(1012, "late")

    assert owner.started == 1


class Trickle(FakeConnection):
    """Takes one payload every eight seconds."""

    def __init__(self, unsent: int) -> None:
        super().__init__()
        self.left = unsent

    @property
    def unsent(self) -> int:
        """What it has not taken."""
        return self.left

    async def wait_sent(self) -> None:
        """Until nothing is left."""
        while self.left:
            await trio.sleep(8 - trio.current_time() % 8)
            self.left -= 1


async def test_slow_is_not_too_slow(autojump_clock: Mock) -> None:
    """As long as something moves within the time; when nothing does, the ending says so."""
    assert await wait_sent_in_time(Trickle(4), 10) is None
    assert trio.current_time() == 32
    stuck = FakeConnection()
    stuck.stalled = True
    stuck.send_nowait([b"x"])
    ending = await wait_sent_in_time(stuck, 10)

    assert ending is not None
    assert ending[0] == 4413
    assert trio.current_time() == 42


async def test_a_lost_socket_raises(autojump_clock: Mock) -> None:
    """Who waits for it learns how it ended."""
    lost = FakeConnection()
    lost.stalled = True
    lost.send_nowait([b"x"])
    lost.drop(1006)
    with pytest.raises(ConnectionClosed):
        await wait_sent_in_time(lost, 10)
