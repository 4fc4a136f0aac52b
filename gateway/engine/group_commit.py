"""Group commit: one writer for all sessions, so that durability costs no write per token.

Resource handling: ``run`` owns the only ``SessionStore.commit`` call in flight. While it is under way,
sessions that change are marked; the next commit takes all of their changes at once. Load makes commits
larger, not more frequent.
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


class GroupCommit:
    """Collects changed sessions and stores their changes together."""

    def __init__(self, store: SessionStore, telemetry: Telemetry) -> None:
        self._store = store
        self._telemetry = telemetry
        self._changed: dict[Committer, None] = {}
        self._wakeup = trio.lowlevel.ParkingLot()
        self._committing: dict[Committer, None] = {}
        self._pause = trio.lowlevel.ParkingLot()
        self._is_pausing = False
        self._earliest = -math.inf
        """When the next commit may start."""
        self._rounds = trio.lowlevel.ParkingLot()
        """Tasks that wait for the end of a commit."""
        self.failure: StoreUnavailable | None = None
        """Set while the store refuses to write: new work is to be refused with it."""

    def mark(self, committer: Committer) -> None:
        """Have the changes of ``committer`` stored soon."""
        if not self._changed:
            self._wakeup.unpark()  # 0.5 µs; the writer parks only while nothing is marked
        elif self._is_pausing and trio.current_time() >= self._earliest:
            # Under load somebody comes by at the right moment, and no timer has to run out: 15 µs less.
            self._is_pausing = False
            self._pause.unpark()
        self._changed[committer] = None

    async def wait_idle(self) -> None:
        """Wait until everything marked is stored. Always a checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._changed or self._committing:
            await self._rounds.park()

    async def wait_stored(self, committer: Committer) -> None:
        """Wait until what ``committer`` changed so far is stored, or refused. Always a checkpoint."""
        await trio.lowlevel.checkpoint()
        while committer in self._changed or committer in self._committing:
            await self._rounds.park()

    async def run(self) -> None:
        """Store changes until cancelled. What was marked and not stored by then is as after a crash."""
        while True:
            while not self._changed:
                await self._wakeup.park()
            if trio.current_time() < self._earliest:
                await self._wait_due()
            self._earliest = trio.current_time() + COMMIT_INTERVAL
            self._committing, self._changed = self._changed, {}
            try:
                await self._commit(self._committing)
            finally:
                self._committing = {}
                self._rounds.unpark_all()

    async def _wait_due(self) -> None:
        self._is_pausing = True
        with trio.CancelScope(deadline=self._earliest):
            await self._pause.park()
        self._is_pausing = False

    async def _commit(self, changed: dict[Committer, None]) -> None:
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
        reasons = await self._store_until_done(taken, commits) if commits else {}
        for committer, commit in taken.items():
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

    async def _store_until_done(
        self, taken: Mapping[Committer, SessionCommit | None], commits: list[SessionCommit]
    ) -> Mapping[str, str]:
        """Store, again and again while the store is away; gives the reasons of commits it will never take."""
        started = trio.current_time()
        told = False
        while True:
            try:
                if self.failure is not None or not self._store.commit_nowait(commits):
                    await self._store.commit(commits)
            except CommitRefused as refusal:
                self._telemetry.error("store_refused_commits", cause=refusal, sessions=len(refusal.reasons))
                return refusal.reasons
            except StoreUnavailable as error:
                self._telemetry.count("gateway_store_failures_total")
                if self.failure is None:
                    self._telemetry.error("store_unavailable", cause=error, commits=len(commits))
                self.failure = error
                if not told:
                    told = True
                    # Also those that wait for the next commit: who sends from now on is refused at once.
                    waiting = [committer for committer, commit in taken.items() if commit is not None]
                    for committer in {**dict.fromkeys(waiting), **self._changed}:
                        committer.not_stored(error)
                await trio.sleep(RETRY_SECONDS)
                continue
            if self.failure is not None:
                self.failure = None
                self._telemetry.info("store_available", after_seconds=trio.current_time() - started)
            self._telemetry.observe("gateway_store_commit_seconds", trio.current_time() - started)
            self._telemetry.observe("gateway_store_batch_sessions", len(commits))
            self._telemetry.observe(
                "gateway_store_batch_events", sum(len(commit.events) for commit in commits)
            )
            return {}
