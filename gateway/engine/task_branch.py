"""A nursery that exists while it has tasks: what a session runs, without a task of its own while it waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

Task = Callable[[], Awaitable[None]]


class TaskBranch:
    """Starts tasks in one nursery, opened for the first and closed with the last.

    Resource handling: ``grow`` is called when there is a task and no nursery; it has ``run`` called soon, in
    a task that outlives every one of these. A session that only waits for its client so costs no task, which
    is 5 KB each.

    Error handling: what a task raises ends its siblings and leaves ``run``.
    """

    __slots__ = ("_count", "_grow", "_is_cut", "_nursery", "_waiting")

    def __init__(self, grow: Callable[[], None]) -> None:
        self._grow = grow
        self._nursery: trio.Nursery | None = None
        self._count = 0
        self._waiting: list[Task] = []
        self._is_cut = False

    def start(self, task: Task) -> None:
        """Run ``task`` soon; never, once ``cut``."""
        if self._is_cut:
            return
        self._count += 1
        if self._nursery is not None:
            self._nursery.start_soon(self._run_task, task)
            return
        self._waiting.append(task)
        if len(self._waiting) == 1:
            self._grow()

    def cut(self) -> None:
        """Cancel every task, and start none any more."""
        self._is_cut = True
        self._waiting.clear()
        # It leads back to the owner, who would stay in memory until the next full collection.
        self._grow = _grow_no_more
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def run(self) -> None:
        """Run the tasks until there is none left. Cancelling it cancels them."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            starting, self._waiting = self._waiting, []
            for task in starting:
                nursery.start_soon(self._run_task, task)

    async def _run_task(self, task: Task) -> None:
        try:
            await task()
        finally:
            self._count -= 1
            if not self._count:
                # The nursery closes now; a task that comes later opens another.
                self._nursery = None


def _grow_no_more() -> None:
    pass
