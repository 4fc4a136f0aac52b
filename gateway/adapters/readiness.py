"""Many descriptors read by callbacks, at the price of one wake-up for all of them that are ready.

Trio arms a descriptor anew for every wait, and passes through its scheduler for every one that is ready: a
fifth of what a token then costs. Here they stay registered in an epoll set of our own, and Trio waits for
that set: it is readable while any of its members is (epoll(7)). One task then calls a function per ready one.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from typing import Final, final

import trio

Ready = Callable[[float], bool]
"""Called with Trio's time when the descriptor is readable, or has failed or ended; it must not wait. False,
or an exception, ends the waiting."""

HAS_EPOLL: Final = sys.platform == "linux"
"""Elsewhere ``Readiness`` must not be used: read the usual way."""


class _Waiter:
    """A task that waits while its callback is called."""

    __slots__ = ("error", "ready", "task")

    def __init__(self, task: trio.lowlevel.Task, ready: Ready) -> None:
        self.task = task
        self.ready = ready
        self.error: BaseException | None = None
        """What ended the waiting."""


@final
class Readiness:
    """Calls back who waits for input.

    Resource handling: the task that waits for the set is Trio's own ("system task") for the reasons that
    ``SilenceWatch`` gives; it and the set exist only while somebody waits, and end with ``trio.run`` at the
    latest. Fairness: one pass calls each ready one once and then goes through the scheduler, as Trio does.
    """

    def __init__(self) -> None:
        self._waiters: dict[int, _Waiter] = {}
        self._set: select.epoll | None = None
        self._running = trio.CancelScope()

    async def call_each(self, descriptor: int, ready: Ready) -> None:
        """Call ``ready`` whenever ``descriptor`` is readable, until it returns False.

        Raises what ``ready`` does, ``trio.ClosedResourceError`` after ``release``, and
        ``trio.BusyResourceError`` when another task waits for the descriptor. From the very moment of a
        cancellation, or of ``release``, ``ready`` is not called again.
        """
        if descriptor in self._waiters:
            raise trio.BusyResourceError("another task waits for this descriptor")
        if self._set is None:
            self._set = select.epoll()
            self._running = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._run, self._set, self._running, name="readiness")
        self._set.register(descriptor, select.EPOLLIN)
        self._waiters[descriptor] = waiter = _Waiter(trio.lowlevel.current_task(), ready)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._remove(descriptor)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if waiter.error is not None:
            raise waiter.error

    def release(self, descriptor: int) -> None:
        """The descriptor is about to be closed: who waits for it gets ``trio.ClosedResourceError``."""
        if (waiter := self._waiters.get(descriptor)) is not None:
            waiter.error = trio.ClosedResourceError("closed meanwhile")
            self._end(descriptor, waiter)

    def _end(self, descriptor: int, waiter: _Waiter) -> None:
        self._remove(descriptor)
        trio.lowlevel.reschedule(waiter.task)

    def _remove(self, descriptor: int) -> None:
        del self._waiters[descriptor]
        assert self._set is not None
        self._set.unregister(descriptor)
        if not self._waiters:
            self._set = None
            self._running.cancel()

    async def _run(self, ready_set: select.epoll, running: trio.CancelScope) -> None:
        with ready_set, running:
            while True:
                await trio.lowlevel.wait_readable(ready_set.fileno())
                now = trio.current_time()
                for descriptor, _ in ready_set.poll(0):
                    waiter = self._waiters.get(descriptor)
                    if waiter is not None:
                        self._serve(descriptor, waiter, now)
                if self._set is not ready_set:
                    return  # The last one left; who comes now has begun anew.

    def _serve(self, descriptor: int, waiter: _Waiter, now: float) -> None:
        try:
            if waiter.ready(now):
                return
        except BaseException as error:
            waiter.error = error
        # What it called may have cancelled or released it: then its task is on its way already.
        if self._waiters.get(descriptor) is waiter:
            self._end(descriptor, waiter)
