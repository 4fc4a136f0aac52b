"""The SQLite store's connections: opening, one hop to the worker thread per call, starting over, closing.

APSW carries a cancellation of the caller into the thread, where it may end a call between any two steps.
Reads may be ended so. What writes several things is one transaction in one call, rolled back at the end
of a bad one (``sqlite_schema.transaction``), and a commit is shielded, so that its caller learns its outcome.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import apsw
import apsw.aio
import trio
from attrs import frozen

from gateway.adapters.stores.sqlite_recovery import CORRUPT, StoreFile
from gateway.adapters.stores.sqlite_schema import configure
from gateway.adapters.stores.sqlite_tables import SessionTables
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

Result = TypeVar("Result")

_REOPEN_INTERVAL = 1.0
"""Seconds between attempts to open a file that could not be opened while running."""
_SLOW_WRITE = 0.1
"""Seconds after which writing at once counts as slow: a disk to be waited for is the thread's."""
_SLOW_DISK_INTERVAL = 10.0
"""Seconds that a slow disk is written through the thread only."""
_LOG_PAGES = 8_192
"""32 MiB: a write-ahead log that has grown to this is brought back to its start, at the price of a pause."""


@frozen
class _Open:
    """The connections to a file that is open."""

    connection: apsw.AsyncConnection
    checkpointer: apsw.AsyncConnection
    tables: SessionTables
    immediate: apsw.Connection
    """Used in the event loop's thread only."""
    using: threading.Lock
    """Held by the thread that uses ``tables``."""

    async def aclose(self) -> None:
        """Close all; the last one leaves a file without a log."""
        try:
            self.immediate.close()
        finally:
            try:
                await self.checkpointer.aclose()
            finally:
                await self.connection.aclose()


class SqliteConnection:
    """One writing connection in one worker thread, and one that only copies the log back (``checkpoint``)."""

    def __init__(
        self,
        file: StoreFile,
        *,
        full_sync: bool,
        dedupe_window: float,
        call_deadline: float,
        telemetry: Telemetry,
    ) -> None:
        self.call_deadline = call_deadline
        self._file = file
        self._full_sync = full_sync
        self._dedupe_window = dedupe_window
        self._telemetry = telemetry
        self._open: _Open | None = None
        self._opening = trio.Lock()
        self._reopen_at = 0.0
        self._failing = False
        self._is_checkpointing = False
        self._disk_is_slow_until = -math.inf

    # ------------------------------------------------------------------ calls

    async def run(self, call: Callable[[SessionTables], Result], seconds: float | None = None) -> Result:
        """Run ``call`` in the worker thread. Raises ``StoreUnavailable`` when it fails or takes too long.

        Cancelled, or too slow, the call may be ended at any step, or still happen.
        """
        with trio.move_on_after(self.call_deadline if seconds is None else seconds):
            return await self.run_unbounded(call)
        raise self.unavailable(TimeoutError())

    async def run_unbounded(self, call: Callable[[SessionTables], Result]) -> Result:
        """``run`` without a deadline of its own. Raises ``StoreUnavailable`` for whatever SQLite raises."""
        current = self._open or await self._reopen()

        def run_alone() -> Result:
            with current.using:
                return call(current.tables)

        try:
            return cast("Result", await current.connection.async_run(run_alone))
        except CORRUPT as error:
            with trio.CancelScope(shield=True):
                await self._start_over(current, error)
            raise StoreUnavailable(
                "The session store's file was damaged. It was moved aside and a fresh one begun; try again."
            ) from error
        except (apsw.Error, trio.TooSlowError) as error:
            raise self.unavailable(error) from error

    def run_nowait(self, call: Callable[[SessionTables], Result]) -> Result:
        """Run ``call`` here and now, on a connection of its own. ``trio.WouldBlock``: nothing was done.

        One row into the page cache takes 20 µs, the way through the thread and back 150. What would wait is
        left to the thread: for another call, for the disk (``full_sync``, the first write after a checkpoint,
        a disk that was slow just now), and for SQLite to say what is wrong.
        """
        current, now = self._open, trio.current_time()
        if (
            current is None
            or self._full_sync
            or self._failing
            or self._is_checkpointing
            or now < self._disk_is_slow_until
            or not current.using.acquire(blocking=False)
        ):
            raise trio.WouldBlock
        tables = current.tables
        own = tables.use(current.immediate)
        try:
            return call(tables)
        except apsw.Error as error:
            raise trio.WouldBlock from error
        finally:
            tables.use(own)
            current.using.release()
            took = trio.current_time() - now
            if took > _SLOW_WRITE:
                self._disk_is_slow_until = now + _SLOW_DISK_INTERVAL
                self._telemetry.warning("store_disk_slow", seconds=round(took, 3))

    @property
    def is_failing(self) -> bool:
        """Whether the last thing that is known of writing is that it failed."""
        return self._failing

    def written(self) -> None:
        """Take note that something could be written. A read proves nothing: it works on a full disk too."""
        if self._failing:
            self._failing = False
            self._telemetry.info("store_recovered")

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """The error to raise for what went wrong; logged when it is the first since something was written."""
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

    # ------------------------------------------------------------------ housekeeping

    async def checkpoint(self) -> None:
        """Copy the write-ahead log back into the file. Raises ``StoreUnavailable``; may be cancelled."""
        current = self._open
        if current is None:
            return
        self._is_checkpointing = True
        try:
            with trio.move_on_after(self.call_deadline):
                pages, copied = await current.checkpointer.wal_checkpoint()
                # Under steady writing the log never comes to be copied whole, so it would grow for ever.
                # The bulk of it is copied now; the rest is little enough to do it between two commits.
                if pages > _LOG_PAGES:
                    pages, copied = await current.connection.wal_checkpoint()
                self._telemetry.debug("store_checkpoint", pages=pages, copied=copied)
            # The first write to a log that was copied whole begins it anew, and waits for the disk: here.
            await self.run(lambda tables: tables.touch())
        except apsw.Error as error:
            raise self.unavailable(error) from error
        finally:
            self._is_checkpointing = False

    async def renew_generation(self) -> None:
        """Give the file and its sidecar a new token. Raises ``StoreUnavailable``.

        Cancelled at any point, the two still belong together (see ``StoreFile.begin_generation``).
        """
        try:
            token = await trio.to_thread.run_sync(self._file.begin_generation)
            await self.run(lambda tables: tables.set_generation(token))
            await trio.to_thread.run_sync(self._file.end_generation, token)
        except OSError as error:
            raise self.unavailable(error) from error

    # ------------------------------------------------------------------ opening and closing

    async def start(self) -> None:
        """Lock and open the file. Raises ``StoreUnavailable``; call ``aclose`` in any case."""
        await trio.to_thread.run_sync(self._file.lock)
        await self._reopen()

    async def aclose(self) -> None:
        """Close the file and let others in. Not cancellable; never raises for what the disk does."""
        with trio.CancelScope(shield=True):
            try:
                if self._open is not None:
                    await self._close_cleanly(self._open)
            except (OSError, apsw.Error, StoreUnavailable) as error:
                self._telemetry.warning("store_not_closed_cleanly", reason=type(error).__name__)
                if self._open is not None:
                    await self._open.aclose()
            finally:
                self._open = None
                await trio.to_thread.run_sync(self._file.unlock)

    async def _close_cleanly(self, current: _Open) -> None:
        token = await trio.to_thread.run_sync(self._file.begin_generation)
        await self.run(lambda tables: tables.set_generation(token))
        self._open = None
        await current.aclose()
        await trio.to_thread.run_sync(lambda: self._file.end_generation(token, closed=True))

    async def _reopen(self) -> _Open:
        async with self._opening:
            if self._open is not None:
                return self._open
            if trio.current_time() < self._reopen_at:
                raise StoreUnavailable("The session store is closed; try again.", retry_after=1)
            self._reopen_at = trio.current_time() + _REOPEN_INTERVAL
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._file.prepare)
                opened = self._open = await self._connect()
            return opened

    async def _connect(self) -> _Open:
        path = os.fspath(self._file.path)
        chosen = apsw.async_controller.set(cast("Any", apsw.aio.Trio))
        try:
            connection = await apsw.Connection.as_async(path, statementcachesize=200)
            try:
                checkpointer = await apsw.Connection.as_async(path)
                # Until it has read from the file it does not know of the log, and would copy nothing.
                await checkpointer.pragma("user_version")
            except apsw.Error as error:
                await connection.aclose()
                raise self.unavailable(error) from error
        except apsw.Error as error:
            raise self.unavailable(error) from error
        finally:
            apsw.async_controller.reset(chosen)

        def begin() -> tuple[SessionTables, apsw.Connection]:
            # In the thread of an asynchronous connection its methods are the synchronous ones.
            db = cast("apsw.Connection", connection)
            configure(db, full_sync=self._full_sync)
            tables = SessionTables(db, dedupe_window=self._dedupe_window)
            immediate = apsw.Connection(path, statementcachesize=200)
            try:
                configure(immediate, full_sync=self._full_sync)
                immediate.set_busy_timeout(0)
                immediate.wal_autocheckpoint(0)
            except BaseException:
                immediate.close()
                raise
            return tables, immediate

        try:
            tables, immediate = await connection.async_run(begin)
            return _Open(connection, checkpointer, tables, immediate, threading.Lock())
        except BaseException as error:
            await checkpointer.aclose()
            await connection.aclose()
            if isinstance(error, apsw.Error):
                raise self.unavailable(error) from error
            raise

    async def _start_over(self, damaged: _Open, error: apsw.Error) -> None:
        """Move the damaged file aside and open a fresh one, unless another task did so meanwhile."""
        async with self._opening:
            if self._open is not damaged:
                return
            self._open = None
            self._reopen_at = 0.0
            try:
                await damaged.aclose()
                await trio.to_thread.run_sync(self._file.set_aside, str(error))
            except (OSError, apsw.Error) as failure:
                raise self.unavailable(failure) from failure
        await self._reopen()
