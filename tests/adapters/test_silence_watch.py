"""The silence watch: exact, one task, and gone when there is nothing to watch."""

from __future__ import annotations

import math
import random

import trio
import trio.testing

from gateway.adapters.silence_watch import SilenceWatch, Watched


class Wait(Watched):
    """Something that is waited on from ``waiting_since``."""

    def __init__(self, silence_timeout: float) -> None:
        self.silence_timeout = silence_timeout
        self.waiting_since = math.inf
        self.given_up_at: float | None = None

    async def give_up(self) -> None:
        """Note the time."""
        assert self.given_up_at is None
        self.given_up_at = trio.current_time()


def tasks() -> int:
    """Tasks that exist in this run."""
    return trio.lowlevel.current_statistics().tasks_living


async def test_waits_that_begin_and_end_at_random_run_out_exactly(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Fifty of them, with timeouts of their own: each is given up at its own time or not at all."""
    watch = SilenceWatch()
    before = tasks()

    async def live(chance: random.Random) -> None:
        wait = Wait(chance.choice([0.5, 3, 10]))
        await trio.sleep(chance.uniform(0, 20))
        watch.add(wait)
        expected: float | None = None
        for _ in range(10):
            await trio.sleep(chance.uniform(0, 15))
            wait.waiting_since = trio.current_time()
            duration = chance.uniform(0, 1.1 * wait.silence_timeout)
            if duration > wait.silence_timeout:
                expected = wait.waiting_since + wait.silence_timeout
                await trio.sleep(duration)
                break
            await trio.sleep(duration)
            wait.waiting_since = math.inf
        assert wait.given_up_at == expected
        watch.discard(wait)

    async with trio.open_nursery() as nursery:
        for seed in range(50):
            nursery.start_soon(live, random.Random(seed))
    await trio.testing.wait_all_tasks_blocked()
    assert tasks() == before


async def test_a_thousand_waits_take_one_task_and_few_wakes(autojump_clock: trio.testing.MockClock) -> None:
    """Waits that are renewed all the time are looked at about once per timeout."""
    watch, looks = SilenceWatch(), 0

    class Counted(Wait):
        @property
        def silence_timeout(self) -> float:
            nonlocal looks
            looks += 1
            return 60.0

        @silence_timeout.setter
        def silence_timeout(self, value: float) -> None:
            pass

    before = tasks()
    waits = [Counted(60) for _ in range(1000)]
    for wait in waits:
        wait.waiting_since = trio.current_time()
        watch.add(wait)
    await trio.testing.wait_all_tasks_blocked()
    assert tasks() == before + 1
    looks = 0
    for _ in range(600):
        await trio.sleep(1)
        for wait in waits:
            wait.waiting_since = trio.current_time()
    assert looks <= 12 * 2 * len(waits)
    assert not any(wait.given_up_at for wait in waits)
    for wait in waits:
        watch.discard(wait)
    await trio.testing.wait_all_tasks_blocked()
    assert tasks() == before


async def test_a_watch_that_ended_begins_again(autojump_clock: trio.testing.MockClock) -> None:
    """Also in the very pass in which the last one left."""
    watch = SilenceWatch()
    for is_pause in (True, False, True):
        gone, wait = Wait(5), Wait(5)
        watch.add(gone)
        await trio.testing.wait_all_tasks_blocked()
        watch.discard(gone)
        if is_pause:
            await trio.testing.wait_all_tasks_blocked()
        wait.waiting_since = trio.current_time()
        watch.add(wait)
        started = trio.current_time()
        await trio.sleep(6)
        assert (wait.given_up_at, gone.given_up_at) == (started + 5, None)
