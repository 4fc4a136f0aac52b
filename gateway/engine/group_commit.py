"""Group commit: one writer for all sessions, so that durability costs no write per token.

Resource handling: there is one commit in flight. While it is under way, sessions that change are marked; the
next commit takes all of their changes at once. Load makes commits larger, not more frequent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import trio

from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit
from gateway.ports import SessionStore, Telemetry

RETRY_SECONDS = 0.25
"""Between tries while the store is away: recovery within 2 s of its return, with room for slow tries."""
COMMIT_INTERVAL = 0.002
"""Seconds between the starts of two commits. The first after a pause starts at once; under load each takes
what came in 2 ms, which costs 1 ms of latency on average and saves half of the CPU per event, and most of
what a store writes: a page or two per commit."""
AT_ONCE_INTERVAL = 0.0005
"""The same where the store takes commits at once. Those begin when all that could be read has been read, and
carry ten events at 5 000 a second; this only keeps many slow sessions from writing a page per token."""


class Committer(Protocol):
    """A session as the writer sees it. None of these may block."""

    def take_commit(self) -> SessionCommit | None:
        """All changes since the last call, or None."""
        ...

    def stored(self) -> None:
        """What the last ``take_commit`` gave is stored."""
        ...

    def not_stored(self, error: StoreUnavailable) -> None:
        """What the last ``take_commit`` gave, or waits for the next, cannot be stored yet; later it will."""
        ...

    def refused(self, reason: str) -> None:
        """What the last ``take_commit`` gave can never be stored."""
        ...


class _Round:
    """One group commit: who changed, and what of it is to be stored."""

    __slots__ = ("commits", "started", "taken")

    def __init__(self, taken: dict[Committer, SessionCommit | None], commits: list[SessionCommit]) -> None:
        self.taken = taken
        self.commits = commits
        self.started = trio.current_time()


class GroupCommit:
    """Collects changed sessions and stores their changes together."""

    def __init__(self, store: SessionStore, telemetry: Telemetry) -> None:
        self._session_store = store
        self._telemetry = telemetry
        self._changed: dict[Committer, None] = {}
        self._under_way: _Round | None = None
        self._wakeup = trio.lowlevel.ParkingLot()
        self._earliest = -math.inf
        """When the next round may start."""
        self._rounds = trio.lowlevel.ParkingLot()
        """Tasks that wait for the end of a round."""
        self.failure: StoreUnavailable | None = None
        """Set while the store refuses to write: new work is to be refused with it."""

    def mark(self, committer: Committer) -> None:
        """Have the changes of ``committer`` stored soon."""
        if not self._changed:
            self._wakeup.unpark()  # 0.5 µs; the writer parks only while nothing is marked
        self._changed[committer] = None

    async def wait_idle(self) -> None:
        """Wait until everything marked is stored. Always a checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._changed or self._under_way is not None:
            await self._rounds.park()

    async def wait_stored(self, committer: Committer) -> None:
        """Wait until what ``committer`` changed so far is stored, or refused. Always a checkpoint."""
        await trio.lowlevel.checkpoint()
        while committer in self._changed or (
            self._under_way is not None and committer in self._under_way.taken
        ):
            await self._rounds.park()

    async def run(self) -> None:
        """Store changes until cancelled. What was marked and not stored by then is as after a crash."""
        while True:
            while not self._changed:
                await self._wakeup.park()
            if trio.current_time() < self._earliest:
                await trio.sleep_until(self._earliest)
            under_way = self._under_way = self._take()
            try:
                self._tell(under_way, await self._store(under_way) if under_way.commits else {})
            finally:
                self._under_way = None
                self._rounds.unpark_all()

    # ------------------------------------------------------------------ one round

    def _take(self) -> _Round:
        changed, self._changed = self._changed, {}
        taken: dict[Committer, SessionCommit | None] = {}
        commits: list[SessionCommit] = []
        for committer in changed:
            try:
                taken[committer] = commit = committer.take_commit()
            except Exception as error:
                self._crashed(committer, error)
                continue
            if commit is not None:
                commits.append(commit)
        return _Round(taken, commits)

    async def _store(self, under_way: _Round) -> Mapping[str, str]:
        """Store it, however long that takes; gives the reasons of commits that the store will never take."""
        self._earliest = under_way.started + COMMIT_INTERVAL
        reasons: Mapping[str, str] = {}
        try:
            if self.failure is None and self._session_store.commit_nowait(under_way.commits):
                self._earliest = under_way.started + AT_ONCE_INTERVAL
            else:
                await self._store_until_done(under_way)
        except CommitRefused as refusal:
            reasons = refusal.reasons
            self._telemetry.error("store_refused_commits", cause=refusal, sessions=len(reasons))
        else:
            self._telemetry.observe("gateway_store_commit_seconds", trio.current_time() - under_way.started)
            self._telemetry.observe("gateway_store_batch_sessions", len(under_way.commits))
            events = sum(len(commit.events) for commit in under_way.commits)
            self._telemetry.observe("gateway_store_batch_events", events)
        if self.failure is not None:
            # A store that refuses some has taken the others.
            self.failure = None
            seconds = trio.current_time() - under_way.started
            self._telemetry.info("store_available", after_seconds=seconds)
        return reasons

    async def _store_until_done(self, under_way: _Round) -> None:
        """Store, again and again while the store is away. Raises ``CommitRefused``."""
        told = False
        while True:
            try:
                await self._session_store.commit(under_way.commits)
                return
            except StoreUnavailable as error:
                self._telemetry.count("gateway_store_failures_total")
                if self.failure is None:
                    self._telemetry.error("store_unavailable", cause=error, commits=len(under_way.commits))
                self.failure = error
                if not told:
                    told = True
                    # Also those that wait for the next round: who sends from now on is refused at once.
                    waiting = [each for each, commit in under_way.taken.items() if commit is not None]
                    for committer in {**dict.fromkeys(waiting), **self._changed}:
                        committer.not_stored(error)
            await trio.sleep(RETRY_SECONDS)

    def _tell(self, under_way: _Round, reasons: Mapping[str, str]) -> None:
        for committer, commit in under_way.taken.items():
            reason = reasons.get(commit.session_id) if reasons and commit is not None else None
            try:
                if reason is None:
                    committer.stored()
                else:
                    committer.refused(reason)
            except Exception as error:
                self._crashed(committer, error)

    def _crashed(self, committer: Committer, error: Exception) -> None:
        """A bug in one session must not end the writer, and with it all sessions: let go of that one."""
        self._telemetry.error("session_commit_crashed", cause=error)
        self._telemetry.count("gateway_bulkhead_catches_total", where="session")
        committer.refused("a bug in this session")
