"""``sqlite:///…``: sessions that outlive the process, in one file, with nothing to install.

All writes go through one connection in one worker thread (``apsw.aio.Trio``): each call of the store is one
hop there and one transaction. A second connection only copies the write-ahead log back into the file
(sqlite.org/wal.html), which waits for the disk and must not hold up commits.

What survives: ``kill -9`` always; power loss with ``full_sync`` only. Without it a power loss is noticed
at the next open, and every session gets a new epoch (``sqlite_recovery`` says what else is noticed).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import apsw
import apsw.aio
import trio
from attrs import define

from gateway.adapters.stores.sqlite_recovery import CORRUPT, StoreFile
from gateway.adapters.stores.sqlite_schema import configure
from gateway.adapters.stores.sqlite_tables import SessionTables, Step
from gateway.core.errors import StoreUnavailable
from gateway.core.packing import UnreadablePack, pack_events, pack_message, pack_record
from gateway.core.storage import CommitRefused, SessionCommit, StoredSession
from gateway.ports import Clock, SessionStore, Telemetry

Result = TypeVar("Result")

CALL_DEADLINE = 10.0
"""Seconds after which a call gives up on the disk. A healthy commit takes well under a millisecond."""
CHECK_DEADLINE = 1.0
"""Seconds: the port's promise for ``check``."""
_REOPEN_INTERVAL = 1.0
_GENERATION_INTERVAL = 60.0
"""Seconds between new tokens while open: a restored copy that is older than this is recognised."""
_CHECKPOINT_COMMITS = 500
"""Commits after which the write-ahead log is worth copying back (1 to 100 pages each)."""
_CHECKPOINT_INTERVAL = 30.0
_LOG_PAGES = 8_192
"""32 MiB: a write-ahead log that has grown to this is brought back to its start, at the price of a pause."""
_ROUNDS = 20
"""Small steps of each kind per ``maintain``."""
_STEP_ROWS = 500
_STEP_PAGES = 32
_STEP_SESSIONS = 50


class _Attempt:
    """A commit on its way; ``abandoned`` once nobody waits for it any more."""

    __slots__ = ("abandoned",)

    def __init__(self) -> None:
        self.abandoned = False

    def is_abandoned(self) -> bool:
        return self.abandoned


@define
class _Open:
    """The connections to a file that is open."""

    connection: apsw.AsyncConnection
    checkpointer: apsw.AsyncConnection
    tables: SessionTables

    async def aclose(self) -> None:
        """Close both; the last one leaves a file without a log."""
        try:
            await self.checkpointer.aclose()
        finally:
            await self.connection.aclose()


class SqliteStore(SessionStore):
    """See ``ports.SessionStore``; get one from ``open_sqlite_store``.

    Every call ends within ``CALL_DEADLINE``. A ``commit`` that has begun is not cancelled: it completes and
    returns, and the cancellation strikes at the caller's next checkpoint. When the disk is so stuck that a
    commit runs into the deadline, nobody can say whether it will still happen; then the sessions in it take
    only a ``reset`` (others are refused) until they have been loaded again.
    """

    def __init__(
        self, file: StoreFile, *, full_sync: bool, dedupe_window: float, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._file = file
        self._full_sync = full_sync
        self._dedupe_window = dedupe_window
        self._clock = clock
        self._telemetry = telemetry
        self._open: _Open | None = None
        self._opening = trio.Lock()
        self._reopen_at = 0.0
        self._failing = False
        self._uncertain: set[str] = set()
        self._held_bytes = 0
        self._commits_to_checkpoint = 0
        self._checkpointed_at = clock.now()
        self._generation_at = clock.now()

    # ------------------------------------------------------------------ the port

    @property
    def is_durable(self) -> bool:
        """True."""
        return True

    @property
    def held_bytes(self) -> int:
        """Bytes of the file that hold something, as of the last ``maintain``; freed space is not counted."""
        return self._held_bytes

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Apply commits in one transaction. Raises ``StoreUnavailable`` and ``CommitRefused``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        refused: dict[str, str] = {}
        steps = self._steps(commits, refused)
        if steps:
            attempt = _Attempt()
            # APSW would carry a cancellation into the thread, where it may strike anywhere.
            with trio.CancelScope(deadline=trio.current_time() + CALL_DEADLINE, shield=True) as deadline:
                refused |= await self._run(lambda tables: tables.apply(steps, attempt.is_abandoned))
            if deadline.cancelled_caught:
                attempt.abandoned = True
                self._uncertain.update(step.session_id for step in steps)
                raise self._unavailable(TimeoutError())
            self._commits_to_checkpoint += 1
        if refused:
            raise CommitRefused(refused)

    def _steps(self, commits: Sequence[SessionCommit], refused: dict[str, str]) -> list[Step]:
        steps = []
        for commit in commits:
            session_id = commit.session_id
            if refused and session_id in refused:
                continue
            if self._uncertain and session_id in self._uncertain:
                if not commit.reset:
                    refused[session_id] = "it is not known whether its last commit was stored"
                    continue
                self._uncertain.remove(session_id)
            try:
                steps.append(_step(commit))
            except ValueError:
                # Without the cause: it would quote the message.
                refused[session_id] = "it holds text that is not Unicode, or events that are not consecutive"
        return steps

    async def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``StoreUnavailable``.

        A session whose stored bytes cannot be read is dropped but for its owner, and said in the log.
        """
        try:
            found = await self._bounded(lambda tables: tables.load(session_id))
        except UnreadablePack as error:
            self._telemetry.error("store_session_unreadable", session_id=session_id, cause=error)
            await self._bounded(lambda tables: tables.forget(session_id))
            found = await self._bounded(lambda tables: tables.load(session_id))
        self._uncertain.discard(session_id)
        return found

    async def owner(self, session_id: str) -> str | None:
        """The subject that the session belongs to, or None. Raises ``StoreUnavailable``."""
        return await self._bounded(lambda tables: tables.owner(session_id))

    async def claim(self, session_id: str, subject: str, now: float) -> str:
        """Make ``subject`` the owner if there is none; returns the owner. Raises ``StoreUnavailable``."""
        return await self._bounded(lambda tables: tables.claim(session_id, subject, now))

    async def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions that belong to ``subject``. Raises ``StoreUnavailable``."""
        return await self._bounded(lambda tables: tables.sessions_of(subject))

    async def unfinished(self) -> Sequence[str]:
        """Sessions whose turn was running or that have messages queued. Raises ``StoreUnavailable``."""
        return await self._bounded(lambda tables: tables.unfinished())

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop all but the ownership of sessions last touched before ``before``, except those in ``keep``.

        In small steps: other calls get their turn in between. Raises ``StoreUnavailable``; what was dropped
        until then stays dropped. ``maintain`` gives the room back.
        """
        dropped = 0
        while True:
            step = await self._bounded(lambda tables: tables.expire_some(before, keep, _STEP_SESSIONS))
            dropped += step
            if step < _STEP_SESSIONS:
                return dropped

    async def check(self) -> None:
        """Write one cell. Raises ``StoreUnavailable`` within 1 s."""
        await self._bounded(lambda tables: tables.touch(), CHECK_DEADLINE)

    async def maintain(self) -> None:
        """Tidy up in small steps: call it about once a second.

        Deletes what is discarded, gives free room back to the file system, copies the write-ahead log back,
        renews the generation token, counts ``held_bytes``. Raises ``StoreUnavailable``. May be cancelled.
        """
        for _ in range(_ROUNDS):
            if not await self._bounded(lambda tables: tables.delete_discarded(_STEP_ROWS)):
                break
        for _ in range(_ROUNDS):
            if not await self._bounded(lambda tables: tables.vacuum_some(_STEP_PAGES)):
                break
        self._held_bytes = await self._bounded(lambda tables: tables.held_bytes())
        now = self._clock.now()
        if self._commits_to_checkpoint >= _CHECKPOINT_COMMITS or (
            self._commits_to_checkpoint and abs(now - self._checkpointed_at) >= _CHECKPOINT_INTERVAL
        ):
            self._commits_to_checkpoint = 0
            self._checkpointed_at = now
            await self._checkpoint()
        if abs(now - self._generation_at) >= _GENERATION_INTERVAL:
            self._generation_at = now
            await self._renew_generation()

    # ------------------------------------------------------------------ housekeeping

    async def _checkpoint(self) -> None:
        if self._open is None:
            return
        try:
            with trio.move_on_after(CALL_DEADLINE):
                pages, copied = await self._open.checkpointer.wal_checkpoint()
                # Under steady writing the log never comes to be copied whole, so it would grow for ever.
                # The bulk of it is copied now; the rest is little enough to do it between two commits.
                if pages > _LOG_PAGES:
                    pages, copied = await self._open.connection.wal_checkpoint()
                self._telemetry.debug("store_checkpoint", pages=pages, copied=copied)
        except apsw.Error as error:
            raise self._unavailable(error) from error

    async def _renew_generation(self) -> None:
        # Each half alone is safe (see StoreFile.begin_generation); a cancellation in between does no harm.
        try:
            token = await trio.to_thread.run_sync(self._file.begin_generation)
            await self._bounded(lambda tables: tables.set_generation(token))
            await trio.to_thread.run_sync(self._file.end_generation, token)
        except OSError as error:
            raise self._unavailable(error) from error

    # ------------------------------------------------------------------ calls

    async def _bounded(
        self, call: Callable[[SessionTables], Result], seconds: float = CALL_DEADLINE
    ) -> Result:
        with trio.move_on_after(seconds):
            return await self._run(call)
        raise self._unavailable(TimeoutError())

    async def _run(self, call: Callable[[SessionTables], Result]) -> Result:
        """Run ``call`` in the worker thread. Raises ``StoreUnavailable`` for whatever SQLite raises."""
        current = self._open or await self._reopen()
        try:
            result = cast("Result", await current.connection.async_run(call, current.tables))
        except CORRUPT as error:
            with trio.CancelScope(shield=True):
                await self._start_over(current, error)
            raise StoreUnavailable(
                "The session store's file was damaged. It was moved aside and a fresh one begun; try again."
            ) from error
        except (apsw.Error, trio.TooSlowError) as error:
            raise self._unavailable(error) from error
        if self._failing:
            self._failing = False
            self._telemetry.info("store_recovered")
        return result

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        if not self._failing:
            # Once, not per call: a store that fails is asked thousands of times a second.
            self._failing = True
            self._telemetry.error("store_failing", path=os.fspath(self._file.path), cause=error)
        match error:
            case apsw.FullError():
                what = "is full: its disk has no room left"
            case apsw.BusyError() | apsw.LockedError():
                what = "is locked by another program"
            case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError():
                what = "cannot be written"
            case TimeoutError() | trio.TooSlowError():
                what = "does not answer in time"
            case _:
                what = "failed"
        return StoreUnavailable(f"The session store {what}. Nothing was accepted; try again.", retry_after=1)

    # ------------------------------------------------------------------ opening and closing

    async def start(self) -> None:
        """Lock and open the file. Raises ``StoreUnavailable``."""
        await trio.to_thread.run_sync(self._file.lock)
        await self._reopen()

    async def aclose(self) -> None:
        """Close the file and let others in. Not cancellable; never raises for what the disk does."""
        with trio.CancelScope(shield=True):
            try:
                if self._open is not None:
                    token = await trio.to_thread.run_sync(self._file.begin_generation)
                    await self._bounded(lambda tables: tables.set_generation(token))
                    await self._open.aclose()
                    self._open = None
                    await trio.to_thread.run_sync(lambda: self._file.end_generation(token, closed=True))
            except (OSError, apsw.Error, StoreUnavailable) as error:
                self._telemetry.warning("store_not_closed_cleanly", reason=type(error).__name__)
            finally:
                if self._open is not None:
                    await self._open.aclose()
                    self._open = None
                await trio.to_thread.run_sync(self._file.unlock)

    async def _reopen(self) -> _Open:
        async with self._opening:
            if self._open is None:
                if trio.current_time() < self._reopen_at:
                    raise StoreUnavailable("The session store is closed; try again.", retry_after=1)
                self._reopen_at = trio.current_time() + _REOPEN_INTERVAL
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._file.prepare)
                    self._open = await self._connect()
            return self._open

    async def _connect(self) -> _Open:
        path = os.fspath(self._file.path)
        chosen = apsw.async_controller.set(cast("Any", apsw.aio.Trio))
        try:
            connection = await apsw.Connection.as_async(path, statementcachesize=200)
            try:
                checkpointer = await apsw.Connection.as_async(path)
            except apsw.Error:
                await connection.aclose()
                raise
        finally:
            apsw.async_controller.reset(chosen)

        def begin() -> SessionTables:
            # In the thread of an asynchronous connection its methods are the synchronous ones.
            db = cast("apsw.Connection", connection)
            configure(db, full_sync=self._full_sync)
            return SessionTables(db, dedupe_window=self._dedupe_window)

        try:
            tables = await connection.async_run(begin)
            self._held_bytes = await connection.async_run(tables.held_bytes)
        except BaseException:
            await checkpointer.aclose()
            await connection.aclose()
            raise
        return _Open(connection, checkpointer, tables)

    async def _start_over(self, damaged: _Open, error: apsw.Error) -> None:
        """Move the damaged file aside and open a fresh one, unless another task did so meanwhile."""
        async with self._opening:
            if self._open is not damaged:
                return
            self._open = None
            try:
                await damaged.aclose()
                await trio.to_thread.run_sync(self._file.set_aside, str(error))
            except (OSError, apsw.Error) as failure:
                raise self._unavailable(failure) from failure
        self._uncertain.clear()
        self._reopen_at = 0.0
        await self._reopen()


def _step(commit: SessionCommit) -> Step:
    """Pack a commit, on the event loop's side. Raises ``ValueError``."""
    events = commit.events
    is_more = (
        commit.trimmed_to is not None
        or commit.record is not None
        or not events
        or commit.queued
        or commit.dequeued
        or commit.ledger
        or commit.decisions
        or commit.reset
    )
    return Step(
        commit.session_id,
        events[0].seq if events else 0,
        events[-1].seq if events else 0,
        commit.last_event_id,
        pack_events(events) if events else None,
        commit if is_more else None,
        None if commit.record is None else pack_record(commit.record),
        tuple(map(pack_message, commit.queued)) if commit.queued else (),
    )


@asynccontextmanager
async def open_sqlite_store(
    path: Path,
    *,
    full_sync: bool,
    dedupe_window: float,
    clock: Clock,
    telemetry: Telemetry,
    new_token: Callable[[], str] = lambda: secrets.token_hex(8),
) -> AsyncIterator[SqliteStore]:
    """Open the store in the file at ``path``, created with its directory if missing.

    ``full_sync``: whether a commit waits for the disk (``STORE_SYNC=full``). ``dedupe_window``: seconds that
    the idempotency ledger reaches back. ``new_token`` makes epochs for sessions whose past is in doubt.

    Raises ``StoreUnavailable`` when the file is in use by another gateway, of a newer version, not ours, or
    cannot be written. Leaving the block closes the file, cancelled or not.
    """
    file = StoreFile(path, full_sync=full_sync, new_token=new_token, clock=clock, telemetry=telemetry)
    store = SqliteStore(
        file, full_sync=full_sync, dedupe_window=dedupe_window, clock=clock, telemetry=telemetry
    )
    try:
        await store.start()
        yield store
    finally:
        await store.aclose()
