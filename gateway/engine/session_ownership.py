"""Which sessions this node runs, where several nodes share the store.

    session ownership nursery
    ├── leases        says that this node lives; hears what it lost and what nobody has
    ├── adopter       carries on what nobody has, one session after the other
    └── releaser      lets go of sessions that nobody needs in memory here

Without leases (one process, its own store) every session is this node's, and nothing here runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from gateway.core.errors import StoreUnavailable
from gateway.engine.session_runner import SessionRunner
from gateway.node_ports import SessionLeases
from gateway.ports import ResumePoint, Telemetry

ADOPT_SECONDS = 0.01
"""Between sessions that nobody asks for and that are carried on all the same: clients who wait go first."""
RELEASE_SECONDS = 0.1
"""Between looks for turns that end, and between releases: many sessions go in one call."""
MOVED_AT_ONCE = 4
"""Sessions that are handed over together: each stands still for as long as all of them take."""
MOVE_SECONDS = 0.05
"""From group to group: who takes a session over does ten times the work of who lets go of it."""
MOST_MOVED_AT_ONCE = 64
ALL_MOVED_SECONDS = 8.0
"""In that time all that can go are to be gone: groups are larger where there are more sessions than that."""
_TAKEN = "another node serves it now"


def group_size(waiting: int, seconds: float) -> int:
    """How many of those that wait go together, so that all are gone in ``seconds``, and a few at a time."""
    groups = max(1.0, seconds / MOVE_SECONDS)
    return min(MOST_MOVED_AT_ONCE, max(MOVED_AT_ONCE, math.ceil(waiting / groups)))


class OwnedElsewhere(Exception):
    """Another node that lives runs this session."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class SessionOwnership:
    """Takes and gives back sessions for a hub."""

    def __init__(
        self,
        leases: SessionLeases | None,
        runners: Mapping[str, SessionRunner],
        *,
        find: Callable[[str], None],
        telemetry: Telemetry,
    ) -> None:
        self._leases = leases
        self._runners = runners
        self._find = find
        """Loads a session soon, so that its work is carried on."""
        self._telemetry = telemetry
        self._idle: dict[str, None] = {}
        self._ownerless: dict[str, None] = {}
        self._has_ownerless = trio.Event()
        self._releasing: frozenset[str] = frozenset()
        self._released = trio.Event()

    @property
    def is_shared(self) -> bool:
        """Whether other nodes may run sessions of this store."""
        return self._leases is not None

    async def acquire(self, session_id: str) -> None:
        """Make a session this node's. Raises ``OwnedElsewhere``, ``StoreUnavailable``."""
        if self._leases is None:
            return
        while session_id in self._releasing:
            await self._released.wait()
        self._idle.pop(session_id, None)
        node = await self._leases.acquire(session_id)
        if node is not None:
            raise OwnedElsewhere(node)

    def is_doubted(self, runner: SessionRunner, resume: ResumePoint | None) -> bool:
        """Whether a client knows of events, or of an epoch, that this node does not.

        Then the store was restored from an older copy; or this node's copy is old, because it was paused and
        has not noticed yet that another one took the session over.
        """
        if self._leases is None or resume is None:
            return False
        return resume.epoch != runner.session.epoch or resume.last_seq > runner.visible_seq

    async def confirm(self, runner: SessionRunner) -> None:
        """Let go of the session, and of its sockets (1012), unless the store says that it is this node's.

        If it is, nobody else showed a client anything before this was asked. Raises ``StoreUnavailable`` when
        the store does not say; then the session stays, for it is more likely this node's than not.
        """
        if self._leases is None or await self._leases.holds(runner.session_id):
            return
        if not runner.is_retired:
            runner.refused(_TAKEN)

    def retired(self, session_id: str) -> None:
        """The session left memory: others may have it soon."""
        if self._leases is not None:
            self._idle[session_id] = None

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what this node has until cancelled. Started when others know that it lives.

        Raises ``StoreUnavailable`` before that.
        """
        if self._leases is None:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            await nursery.start(self._leases.run, self._lost, self._adopt)
            nursery.start_soon(self._adopt_each)
            task_status.started()
            while True:
                await trio.sleep(RELEASE_SECONDS)
                await self._release_idle(self._leases)

    async def _release_idle(self, leases: SessionLeases) -> None:
        self._releasing = frozenset(each for each in self._idle if each not in self._runners)
        self._idle.clear()
        if self._releasing:
            try:
                await leases.release(self._releasing)
            except StoreUnavailable:
                # It stays this node's until it is asked for again, or until this node ends.
                self._telemetry.count("gateway_store_failures_total")
            finally:
                self._releasing = frozenset()
                self._released.set()
                self._released = trio.Event()

    def _lost(self, session_id: str) -> None:
        runner = self._runners.get(session_id)
        if runner is not None:
            runner.refused(_TAKEN)

    def _adopt(self, session_ids: Sequence[str]) -> None:
        """The latest look counts: who is not ownerless any more was taken by somebody."""
        self._ownerless = dict.fromkeys(session_ids)
        if self._ownerless:
            self._has_ownerless.set()

    async def _adopt_each(self) -> None:
        while True:
            await self._has_ownerless.wait()
            self._has_ownerless = trio.Event()
            while self._ownerless:
                session_id = next(iter(self._ownerless))
                del self._ownerless[session_id]
                if session_id not in self._runners:
                    self._telemetry.info("session_taken_over", session_id=session_id)
                    self._find(session_id)
                    await trio.sleep(ADOPT_SECONDS)

    # ------------------------------------------------------------------ handing over

    async def hand_over(
        self,
        stored: Callable[[SessionRunner], Awaitable[None]],
        close: Callable[[SessionRunner], None],
        *,
        by: float,
    ) -> None:
        """Give every session to whoever asks next; for a node that stops.

        A session goes when its turn can be carried on elsewhere, or is over; at ``by`` (Trio's clock) at the
        latest. Its turn is cut as by a crash, ``stored`` waits for what it changed, and once it is free its
        sockets are closed by ``close``: so whoever comes back finds it free.
        """
        leases = self._leases
        if leases is None:
            return
        until = min(by, trio.current_time() + ALL_MOVED_SECONDS)
        while waiting := list(self._runners.values()):
            now = trio.current_time()
            movable = (runner for runner in waiting if now >= by or runner.departure.can_move)
            ready = list(itertools.islice(movable, group_size(len(waiting), until - now)))
            for runner in ready:
                runner.suspend()
            for runner in ready:
                await stored(runner)
            is_free = True
            try:
                await leases.release([runner.session_id for runner in ready])
            except StoreUnavailable as error:
                is_free = False
                self._telemetry.warning("sessions_not_released", sessions=len(ready), reason=error.message)
            for runner in ready:
                close(runner)
                runner.retire()
                if is_free:
                    self._idle.pop(runner.session_id, None)
            await trio.sleep((MOVE_SECONDS if now < until else 0) if ready else RELEASE_SECONDS)
        try:
            await leases.leave()
        except StoreUnavailable as error:
            self._telemetry.warning("node_not_left", reason=error.message)
