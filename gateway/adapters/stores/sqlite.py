"""``sqlite:///…``: sessions that outlive the process, in one file, with nothing to install.

What survives: ``kill -9`` always; power loss with ``full_sync`` only. Without it a power loss is noticed
at the next open, and every session gets a new epoch (``sqlite_recovery`` says what else is noticed).
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from gateway.adapters.stores.sqlite_connection import SqliteConnection
from gateway.adapters.stores.sqlite_recovery import StoreFile
from gateway.adapters.stores.sqlite_tables import SessionTables
from gateway.core.packing import PackedCommit, UnreadablePack, pack_commit
from gateway.core.storage import CommitRefused, SessionCommit, StoredSession
from gateway.ports import Clock, SessionStore, Telemetry

CALL_DEADLINE = 10.0
"""Seconds after which a call gives up on the disk. A healthy commit takes well under a millisecond."""
CHECK_DEADLINE = 1.0
"""Seconds: the port's promise for ``check``."""
_SETTLE_INTERVAL = 5.0
"""Seconds that events stay in the journal: most are acknowledged and trimmed by then."""
_CHECKPOINT_COMMITS = 2_000
"""Commits after which the write-ahead log is worth copying back (two pages each, or more)."""
_CHECKPOINT_INTERVAL = 30.0
_GENERATION_INTERVAL = 60.0
"""Seconds between new tokens while open: a restored copy that is older than this is recognised."""
_ROUNDS = 20
"""Small steps of each kind per ``maintain``."""
_STEP_ROWS = 100
_STEP_PAGES = 32
_STEP_SESSIONS = 50


class _Attempt:
    """A commit on its way; ``abandoned`` once nobody waits for it any more."""

    __slots__ = ("abandoned",)

    def __init__(self) -> None:
        self.abandoned = False

    def is_abandoned(self) -> bool:
        return self.abandoned


def _never() -> bool:
    return False


class SqliteStore(SessionStore):
    """See ``ports.SessionStore``; get one from ``open_sqlite_store``.

    Every call ends within ``call_deadline``. A ``commit`` that has begun is not cancelled: it completes and
    returns, and the cancellation strikes at the caller's next checkpoint. When the disk is so stuck that a
    commit runs into the deadline, nobody can say whether it will still happen; then the sessions in it take
    only a ``reset`` (others are refused) until they have been loaded again.
    """

    def __init__(self, connection: SqliteConnection, *, clock: Clock, telemetry: Telemetry) -> None:
        self._connection = connection
        self._clock = clock
        self._telemetry = telemetry
        self._uncertain: set[str] = set()
        self._held_bytes = 0
        self._commits_to_checkpoint = 0
        self._settled_at = self._checkpointed_at = self._generation_at = clock.now()

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
            # Without the shield the caller would not learn whether the commit happened.
            deadline = trio.CancelScope(
                deadline=trio.current_time() + self._connection.call_deadline, shield=True
            )
            with deadline:
                refused |= await self._connection.run_unbounded(
                    lambda tables: tables.apply(steps, attempt.is_abandoned)
                )
            if deadline.cancelled_caught:
                attempt.abandoned = True
                self._uncertain.update(step.session_id for step in steps)
                raise self._connection.unavailable(TimeoutError())
            self._connection.written()
            self._commits_to_checkpoint += 1
        if refused:
            raise CommitRefused(refused)

    def commit_nowait(self, commits: Sequence[SessionCommit]) -> bool:
        """See the port. Not with ``full_sync``, nor while the thread or the disk would be waited for."""
        refused: dict[str, str] = {}
        run = self._connection.run_nowait
        try:
            if not self._uncertain and run(lambda tables: tables.journal.store(commits)):
                self._commits_to_checkpoint += 1
                return True
            steps = self._steps(commits, refused)
            if steps:
                refused |= run(lambda tables: tables.apply(steps, _never))
                self._commits_to_checkpoint += 1
        except trio.WouldBlock:
            return False
        if refused:
            raise CommitRefused(refused)
        return True

    def _steps(self, commits: Sequence[SessionCommit], refused: dict[str, str]) -> list[PackedCommit]:
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
                steps.append(pack_commit(commit))
            except ValueError:
                # Without the cause: it would quote the message.
                refused[session_id] = "it holds text that is not Unicode, or events that are not consecutive"
        return steps

    async def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``StoreUnavailable``.

        A session whose stored bytes cannot be read is dropped but for its owner, and said in the log.
        """
        try:
            found = await self._connection.run(lambda tables: tables.load(session_id))
        except UnreadablePack as error:
            self._telemetry.error("store_session_unreadable", session_id=session_id, cause=error)
            await self._connection.run(lambda tables: tables.forget(session_id))
            found = await self._connection.run(lambda tables: tables.load(session_id))
        self._uncertain.discard(session_id)
        return found

    async def owner(self, session_id: str) -> str | None:
        """The subject that the session belongs to, or None. Raises ``StoreUnavailable``."""
        return await self._connection.run(lambda tables: tables.owner(session_id))

    async def claim(self, session_id: str, subject: str, now: float) -> str:
        """Make ``subject`` the owner if there is none; returns the owner. Raises ``StoreUnavailable``."""
        return await self._connection.run(lambda tables: tables.claim(session_id, subject, now))

    async def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions that belong to ``subject``. Raises ``StoreUnavailable``."""
        return await self._connection.run(lambda tables: tables.sessions_of(subject))

    async def unfinished(self) -> Sequence[str]:
        """Sessions whose turn was running or that have messages queued. Raises ``StoreUnavailable``."""
        return await self._connection.run(lambda tables: tables.unfinished())

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop all but the ownership of sessions last touched before ``before``, except those in ``keep``.

        In small steps: other calls get their turn in between. Raises ``StoreUnavailable``; what was dropped
        until then stays dropped. ``maintain`` gives the room back.
        """
        dropped = 0
        while True:
            step = await self._connection.run(lambda tables: tables.expire_some(before, keep, _STEP_SESSIONS))
            dropped += step
            if step < _STEP_SESSIONS:
                return dropped

    async def check(self) -> None:
        """Write one cell. Raises ``StoreUnavailable`` within 1 s."""
        await self._connection.run(lambda tables: tables.touch(), CHECK_DEADLINE)
        self._connection.written()

    # ------------------------------------------------------------------ housekeeping

    async def maintain(self) -> None:
        """Tidy up in small steps, between which commits get their turn: call it about once a second.

        Settles the journal and makes room in it, deletes what is discarded, gives free room back to the file
        system, copies the write-ahead log back, renews the generation token, counts ``held_bytes``. Raises
        ``StoreUnavailable``. May be cancelled.
        """
        now, run = self._clock.now(), self._connection.run
        # A wall clock may be set back: what matters is that it moved.
        is_due = (
            self._commits_to_checkpoint >= _CHECKPOINT_COMMITS
            or abs(now - self._checkpointed_at) >= _CHECKPOINT_INTERVAL
        )
        # First, and always on a full disk: the room of the log is used again once it is copied back.
        if self._connection.is_failing or is_due:
            self._commits_to_checkpoint = 0
            self._checkpointed_at = now
            await self._connection.checkpoint()
        if await run(lambda tables: tables.journal.is_due) or abs(now - self._settled_at) >= _SETTLE_INTERVAL:
            self._settled_at = now
            await self._repeat(lambda tables: tables.journal.settle())
        await self._repeat(lambda tables: tables.journal.replenish())
        await self._repeat(lambda tables: tables.delete_discarded(_STEP_ROWS))
        await self._repeat(lambda tables: tables.vacuum_some(_STEP_PAGES))
        self._held_bytes = await run(lambda tables: tables.held_bytes())
        if abs(now - self._generation_at) >= _GENERATION_INTERVAL:
            self._generation_at = now
            await self._connection.renew_generation()

    async def _repeat(self, step: Callable[[SessionTables], bool]) -> None:
        for _ in range(_ROUNDS):
            if not await self._connection.run(step):
                return


@asynccontextmanager
async def open_sqlite_store(
    path: Path,
    *,
    full_sync: bool,
    dedupe_window: float,
    clock: Clock,
    telemetry: Telemetry,
    call_deadline: float = CALL_DEADLINE,
    new_token: Callable[[], str] = lambda: secrets.token_hex(8),
) -> AsyncIterator[SqliteStore]:
    """Open the store in the file at ``path``, created with its directory if missing.

    ``full_sync``: whether a commit waits for the disk (``STORE_SYNC=full``). ``dedupe_window``: seconds that
    the idempotency ledger reaches back. ``call_deadline``: seconds that a call waits for the disk.
    ``new_token`` makes epochs for sessions whose past is in doubt.

    Raises ``StoreUnavailable`` when the file is in use by another gateway, of a newer version, not ours, or
    cannot be written. Leaving the block closes the file, cancelled or not.
    """
    file = StoreFile(path, full_sync=full_sync, new_token=new_token, clock=clock, telemetry=telemetry)
    connection = SqliteConnection(
        file,
        full_sync=full_sync,
        dedupe_window=dedupe_window,
        call_deadline=call_deadline,
        telemetry=telemetry,
    )
    try:
        await connection.start()
        yield SqliteStore(connection, clock=clock, telemetry=telemetry)
    finally:
        await connection.aclose()
