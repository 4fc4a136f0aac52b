"""A nursery that exists while it has tasks."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.engine.task_branch import TaskBranch


async def test_a_branch_opens_with_its_first_task_and_closes_with_its_last(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Tasks that overlap share one run; one that comes later gets another."""
    runs = []
    done = []

    def grow() -> None:
        runs.append(trio.current_time())
        nursery.start_soon(branch.run)

    async def sleep(seconds: float) -> None:
        await trio.sleep(seconds)
        done.append(seconds)

    branch = TaskBranch(grow)
    started = trio.current_time()
    branch.start(lambda: sleep(1))
    branch.start(lambda: sleep(2))
    await trio.sleep(1.5)
    branch.start(lambda: sleep(3))
    await trio.sleep(4)
    branch.start(lambda: sleep(1.25))
    await trio.sleep(2)
    assert done == [1, 2, 3, 1.25]
    assert [time - started for time in runs] == pytest.approx([0, 5.5])


@pytest.mark.parametrize("ticks", range(6))
async def test_a_task_that_comes_as_the_last_one_ends_is_not_lost(nursery: trio.Nursery, ticks: int) -> None:
    """However the end of one task and the start of the next fall together, both run."""
    branch = TaskBranch(lambda: nursery.start_soon(branch.run))
    ran = []

    async def note(name: str) -> None:
        await trio.lowlevel.checkpoint()
        ran.append(name)

    branch.start(lambda: note("first"))
    for _ in range(ticks):
        await trio.lowlevel.checkpoint()
    branch.start(lambda: note("second"))
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(ran) == ["first", "second"]


async def test_a_cut_branch_ends_its_tasks_and_starts_none(nursery: trio.Nursery) -> None:
    """After ``cut`` nothing runs, neither what ran nor what comes."""
    branch = TaskBranch(lambda: nursery.start_soon(branch.run))
    ran = []

    async def never() -> None:
        await trio.sleep_forever()

    async def note() -> None:
        await trio.lowlevel.checkpoint()
        ran.append(1)

    branch.start(never)
    await trio.testing.wait_all_tasks_blocked()
    branch.cut()
    branch.start(note)
    await trio.testing.wait_all_tasks_blocked()
    assert not ran
    assert len(nursery.child_tasks) == 0
