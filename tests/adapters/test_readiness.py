"""Callbacks instead of task switches: who is called, when, and who never again."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from gateway.adapters.readiness import HAS_EPOLL, Readiness
from tests.adapters.agent_harness import open_files

pytestmark = pytest.mark.skipif(not HAS_EPOLL, reason=f"{sys.platform} has no epoll")


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection; the first does not block."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def collect(ours: socket.socket, into: list[bytes], last: bytes = b"") -> Callable[[float], bool]:
    """A callback that keeps what it reads and goes on until it reads ``last``."""

    def ready(_now: float) -> bool:
        into.append(ours.recv(100))
        return into[-1] != last

    return ready


async def test_each_arrival_is_one_call_until_the_callback_has_enough() -> None:
    """What comes after it stays in the kernel for the next reader."""
    readiness, got = Readiness(), list[bytes]()
    with pair() as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.call_each, ours.fileno(), collect(ours, got, b"end"))
            for data in (b"a", b"b", b"end"):
                await trio.testing.wait_all_tasks_blocked(0.01)
                theirs.send(data)
        theirs.send(b"later")
        assert got == [b"a", b"b", b"end"]
        assert ours.recv(100) == b"later"


async def test_the_callback_is_told_the_time_of_the_wake_up() -> None:
    """In Trio's time, by which deadlines are set."""
    readiness, times = Readiness(), list[float]()
    with pair() as (ours, theirs):
        theirs.send(b"a")
        before = trio.current_time()

        def ready(now: float) -> bool:
            times.append(now)
            return False

        await readiness.call_each(ours.fileno(), ready)
        assert before <= times[0] <= trio.current_time()


async def test_the_end_and_an_error_of_the_connection_are_calls_too() -> None:
    """Nobody waits for a peer that is gone."""
    readiness, got = Readiness(), list[bytes]()
    with pair() as (ours, theirs):
        theirs.close()
        await readiness.call_each(ours.fileno(), collect(ours, got))
        assert got == [b""]


async def test_what_a_callback_raises_is_raised_in_its_own_task_alone() -> None:
    """The others are called on."""
    readiness, got = Readiness(), list[bytes]()

    def fail(_now: float) -> bool:
        raise ValueError("a bug in one session")

    with pair() as (ours, theirs), pair() as (bad, peer_of_bad):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.call_each, ours.fileno(), collect(ours, got, b"end"))
            peer_of_bad.send(b"x")
            with pytest.raises(ValueError, match="a bug in one session"):
                await readiness.call_each(bad.fileno(), fail)
            theirs.send(b"end")
        assert got == [b"end"]


async def test_who_is_cancelled_is_not_called_again_even_in_the_same_pass() -> None:
    """No event of a turn follows its cancel, also when both were ready at once."""
    readiness, calls = Readiness(), list[str]()
    scopes = {name: trio.CancelScope() for name in "ab"}
    with pair() as (first, peer_of_first), pair() as (second, peer_of_second):

        def ready(name: str, other: str) -> Callable[[float], bool]:
            def call(_now: float) -> bool:
                calls.append(name)
                scopes[other].cancel()
                return False

            return call

        async def wait(name: str, other: str, ours: socket.socket) -> None:
            with scopes[name]:
                await readiness.call_each(ours.fileno(), ready(name, other))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "a", "b", first)
            nursery.start_soon(wait, "b", "a", second)
            await trio.testing.wait_all_tasks_blocked(0.01)
            peer_of_first.send(b"x")
            peer_of_second.send(b"x")
    assert len(calls) == 1


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_callback_may_cancel_its_own_task(goes_on: bool) -> None:
    """It ends once, as cancelled."""
    readiness = Readiness()
    with pair() as (ours, theirs), trio.CancelScope() as scope:

        def ready(_now: float) -> bool:
            scope.cancel()
            return goes_on

        theirs.send(b"x")
        await readiness.call_each(ours.fileno(), ready)
    assert scope.cancelled_caught


async def test_who_waits_for_a_descriptor_that_is_closed_is_told() -> None:
    """As with Trio's own waits."""
    readiness = Readiness()
    with pair() as (ours, _theirs):
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await readiness.call_each(ours.fileno(), lambda _: True)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.01)
            readiness.release(ours.fileno())
            ours.close()
        readiness.release(0)


async def test_two_may_not_wait_for_one_descriptor() -> None:
    """The second is told, the first is not disturbed."""
    readiness, got = Readiness(), list[bytes]()
    with pair() as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.call_each, ours.fileno(), collect(ours, got, b"end"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await readiness.call_each(ours.fileno(), lambda _: True)
            theirs.send(b"end")
        assert got == [b"end"]


async def test_nothing_is_left_when_nobody_waits_and_it_can_begin_again() -> None:
    """The set and its task exist only while they are needed; a thousand waits leave no descriptor."""
    readiness, got = Readiness(), list[bytes]()
    with pair() as (ours, theirs):
        await trio.testing.wait_all_tasks_blocked(0.01)
        files = open_files()
        for number in range(1000):
            with trio.CancelScope() as scope:
                if number % 3 == 0:
                    scope.cancel()
                else:
                    theirs.send(b"x")
                await readiness.call_each(ours.fileno(), collect(ours, got, b"x"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert open_files() == files
        assert len(got) == 666


async def test_a_peer_that_never_stops_does_not_hold_up_other_tasks() -> None:
    """One call per ready descriptor and pass, then the scheduler."""
    readiness, calls = Readiness(), 0
    with pair() as (ours, theirs):
        theirs.send(b"always ready, for nobody reads it")

        def ready(_now: float) -> bool:
            nonlocal calls
            calls += 1
            return True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.call_each, ours.fileno(), ready)
            while calls < 10:
                before = calls
                await trio.lowlevel.checkpoint()
                assert calls - before <= 2  # one a pass, and the order within a pass is random
            nursery.cancel_scope.cancel()
