"""``redis://…``, by sentinels or in a cluster too: sessions that any of several nodes can serve.

What survives is what Redis keeps: docs/operations.md says which of its settings gives which guarantee. Data
that Redis loses is noticed. Each session's head names the attempt that wrote it last; a commit says which one
it follows, so that nobody goes on from a past that the store does not have, and a commit that is tried again
because its answer was lost is not applied twice. Each server that is connected to is asked whether it has the
last attempt that was acknowledged of each session that this process holds; a session of which it has less
begins a new epoch when it is loaded. And a count of all commits tells a restored older copy from what was
seen of it: then all sessions that nobody held do.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio
from attrs import frozen

from gateway.adapters.stores.redis_commits import (
    LOST,
    NO_ATTEMPT,
    REASONS,
    CommitContext,
    RawSession,
    commit_arguments,
    stored_session,
)
from gateway.adapters.stores.redis_connect import connect
from gateway.adapters.stores.redis_connection import IsThere, RedisConnection, running_connection
from gateway.adapters.stores.redis_indexes import STEP_SESSIONS, SessionIndexes
from gateway.adapters.stores.redis_keys import GENERATION, keys_of, subject_key
from gateway.adapters.stores.redis_leases import LEASE_SECONDS, RedisLeases
from gateway.adapters.stores.redis_link import Answer, Ask, Command, raise_errors
from gateway.adapters.stores.redis_location import RedisLocation
from gateway.core.packing import PackedCommit, UnreadablePack, pack_commit, pack_record
from gateway.core.storage import NOBODY, CommitRefused, SessionCommit, SessionRecord, StoredSession
from gateway.node_ports import SessionLeases
from gateway.ports import SessionStore, Telemetry

_LEAST_TIME_TO_LIVE = 60.0


@frozen
class _Uncertain:
    """Commits of one session of which nobody knows whether they happened."""

    commits: tuple[SessionCommit, ...]
    expected: str
    attempt: str


class _Step(NamedTuple):
    session_id: str
    packed: PackedCommit
    expected: str
    attempt: str
    number: int


class RedisStore(SessionStore):
    """See ``ports.SessionStore``; get one from ``open_redis_store``.

    Every call ends within 1 s, ``load`` when nothing comes for so long. A ``commit`` that has begun is not
    cancelled: it completes and returns, and the cancellation strikes at the caller's next checkpoint. When
    its answer is lost, the very same commits may be tried again; others of those sessions are refused until
    they have been loaded, unless they begin with a ``reset``.
    """

    def __init__(
        self,
        connection: RedisConnection,
        *,
        dedupe_window: float,
        retention: float,
        lease_seconds: float,
        new_token: Callable[[], str],
        telemetry: Telemetry,
    ) -> None:
        self._connection = connection
        self._dedupe_window = dedupe_window
        self._time_to_live = max(_LEAST_TIME_TO_LIVE, 2 * max(retention, dedupe_window))
        self._new_token = new_token
        self._telemetry = telemetry
        self._process = new_token()
        self._attempts = map((self._process + "-{}").format, itertools.count())
        self._known: dict[str, str] = {}
        """By session id the attempt that this process saw last; what it holds follows that one."""
        self._idle: frozenset[str] = frozenset()
        """Those of ``_known`` that were not live when it was last looked."""
        self._uncertain: dict[str, _Uncertain] = {}
        self._found_lost = 0
        """Sessions found to have lost something, and not told yet: a second look would not find them."""
        self._indexes = SessionIndexes(connection)
        self._leases = RedisLeases(
            connection, self._indexes, node=new_token(), telemetry=telemetry, lease_seconds=lease_seconds
        )
        self._refresh_at = 0.0
        connection.check_kept = self._check_kept

    # ------------------------------------------------------------------ commit

    @property
    def is_durable(self) -> bool:
        """True."""
        return True

    @property
    def leases(self) -> SessionLeases:
        """Who may write which session; commits of a session that was acquired carry its fencing number."""
        return self._leases

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Apply commits in one pipeline. Raises ``StoreUnavailable`` and ``CommitRefused``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        refused: dict[str, str] = {}
        by_session: dict[str, list[SessionCommit]] = {}
        for commit in commits:
            by_session.setdefault(commit.session_id, []).append(commit)
        steps: list[_Step] = []
        for session_id, group in by_session.items():
            steps += self._steps(session_id, group, refused)
        if steps:
            # Without the shield the caller would not learn whether the commit happened. It ends in time.
            with trio.CancelScope(shield=True):
                await self._store(steps, by_session, refused)
        if refused:
            raise CommitRefused(refused)

    def _steps(self, session_id: str, group: list[SessionCommit], refused: dict[str, str]) -> list[_Step]:
        expected, attempt = self._known.get(session_id, ""), ""
        if (uncertain := self._uncertain.get(session_id)) is not None:
            if tuple(group[: len(uncertain.commits)]) == uncertain.commits:
                expected, attempt = uncertain.expected, uncertain.attempt
            elif not group[0].reset:
                refused[session_id] = "it is not known whether its last commit was stored"
                return []
        if group[0].reset:
            expected = ""
        attempt = attempt or next(self._attempts)
        steps = []
        for number, commit in enumerate(group):
            try:
                steps.append(_Step(session_id, pack_commit(commit), expected, attempt, number))
            except ValueError:
                # Without the cause: it would quote the message.
                refused[session_id] = "it holds text that is not Unicode, or events that are not consecutive"
                break
        return steps

    async def _store(
        self, steps: list[_Step], by_session: dict[str, list[SessionCommit]], refused: dict[str, str]
    ) -> None:
        connection = self._connection
        context = CommitContext(connection.generation, int(self._time_to_live * 1000), self._dedupe_window)
        ahead, commands = self._indexes.marking(step.packed for step in steps)
        if ahead:
            await connection.all_of(ahead)
        first = len(commands)
        for step in steps:
            keys = keys_of(step.session_id)
            commands.append(
                connection.function_call(
                    "commit",
                    keys if step.packed.more is not None else keys[:3],
                    commit_arguments(
                        step.packed,
                        self._leases.fence(step.session_id),
                        step.expected,
                        step.attempt,
                        step.number,
                        context,
                    ),
                )
            )
        answers = await connection.commit(commands)
        failure = next((answer for answer in answers if isinstance(answer, BaseException)), None)
        if failure is not None:
            for step in steps:
                kept = _Uncertain(tuple(by_session[step.session_id]), step.expected, step.attempt)
                self._uncertain.setdefault(step.session_id, kept)
            raise connection.unavailable(failure) from failure
        connection.note_works()
        for step, answer in zip(steps, answers[first:], strict=True):
            self._note(step, answer, refused)

    def _note(self, step: _Step, answer: Answer, refused: dict[str, str]) -> None:
        session_id = step.session_id
        self._uncertain.pop(session_id, None)
        if answer < 0:
            refused.setdefault(session_id, REASONS[answer])
            return
        self._known[session_id] = step.attempt
        self._indexes.note(session_id, answer)

    # ------------------------------------------------------------------ reads and ownership

    async def load(self, session_id: str) -> StoredSession | None:
        """All that is held of a session, or None. Raises ``StoreUnavailable``.

        A session whose stored bytes cannot be read is dropped but for its owner, and said in the log.
        """
        while True:
            raw = await self._read(session_id)
            try:
                found = stored_session(session_id, raw)
            except UnreadablePack as error:
                self._telemetry.error("store_session_unreadable", session_id=session_id, cause=error)
                await self._connection.function("forget", keys_of(session_id))
                continue
            attempt = raw.head.get(b"attempt", NO_ATTEMPT.encode()).decode()
            generation = self._connection.generation
            if found is not None and found.record is not None and raw.head[b"generation"] != generation:
                await self._renew(found.record, attempt, generation, session_id)
                continue
            self._known[session_id] = attempt
            self._uncertain.pop(session_id, None)
            return found

    async def _read(self, session_id: str) -> RawSession:
        owner, head, events, queue, ledger, _, decisions = keys_of(session_id)
        commands: list[Command] = [
            (b"MULTI",),
            (b"HGET", owner, b"owner"),
            (b"HGETALL", head),
            (b"XRANGE", events, b"-", b"+"),
            (b"HGETALL", queue),
            (b"HGETALL", ledger),
            (b"HGETALL", decisions),
            (b"EXEC",),
        ]
        answers = await self._connection.batch(commands, large=True, together=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise self._connection.unavailable(answer) from answer
        return RawSession(*answers[-1])

    async def _renew(self, record: SessionRecord, attempt: str, generation: bytes, session_id: str) -> None:
        """Begin a new epoch of a session whose past is in doubt, keeping its owner and last seq."""
        fresh = SessionRecord(epoch=self._new_token(), touched_at=record.touched_at)
        self._telemetry.warning("store_epoch_renewed", session_id=session_id)
        await self._connection.function(
            "renew",
            keys_of(session_id),
            pack_record(fresh),
            generation,
            attempt,
            next(self._attempts),
            int(self._time_to_live * 1000),
        )

    async def owner(self, session_id: str) -> str | None:
        """The subject that the session belongs to, or None. Raises ``StoreUnavailable``."""
        found: bytes | None = await self._connection.call(b"HGET", keys_of(session_id)[0], b"owner")
        return found.decode() or None if found is not None else None

    async def claim(self, session_id: str, subject: str, now: float) -> str:  # noqa: ARG002 - of no use here
        """Make ``subject`` the owner if there is none; returns the owner. Raises ``StoreUnavailable``."""
        answer: bytes = await self._connection.function("claim", keys_of(session_id)[:1], subject)
        owner = answer.decode()
        if owner == subject != NOBODY:
            # Afterwards and each time: cut in between it is missing in a list until the next claim, and no
            # list ever shows a session to somebody who does not own it.
            await self._connection.call(b"SADD", subject_key(subject), session_id)
        return owner

    async def sessions_of(self, subject: str) -> frozenset[str]:
        """The ids of all sessions that belong to ``subject``. Raises ``StoreUnavailable``."""
        found: Collection[bytes] = await self._connection.call(b"SMEMBERS", subject_key(subject))
        return frozenset(session_id.decode() for session_id in found)

    async def unfinished(self) -> Sequence[str]:
        """Sessions with a turn that was running or messages queued. Raises ``StoreUnavailable``."""
        return await self._indexes.unfinished(await self._indexes.marks())

    # ------------------------------------------------------------------ housekeeping

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop all but the ownership of sessions last touched before ``before``, except those in ``keep``.

        In small steps. Raises ``StoreUnavailable``; what was dropped until then stays dropped.
        """
        await self._refresh(keep)
        dropped, gone = await self._indexes.expire(before, keep, self._leases.others)
        for session_id in gone:
            self._forget(session_id)
        idle = frozenset(self._known.keys() - keep)
        for session_id in idle & self._idle:
            self._forget(session_id)
        self._idle = idle
        return dropped

    def _forget(self, session_id: str) -> None:
        """Nobody here holds the session any more: what comes next for it follows from nothing known."""
        self._known.pop(session_id, None)
        self._uncertain.pop(session_id, None)

    async def _refresh(self, live: Collection[str]) -> None:
        """Put off the end of live sessions: Redis must not drop by itself what somebody is attached to."""
        if trio.current_time() < self._refresh_at:
            return
        self._refresh_at = trio.current_time() + self._time_to_live / 4
        session_ids = list(live)
        for start in range(0, len(session_ids), STEP_SESSIONS):
            some = session_ids[start : start + STEP_SESSIONS]
            await self._connection.each("refresh", some, int(self._time_to_live * 1000))

    async def maintain(self) -> None:
        """Take needless marks out of the index. Raises ``StoreUnavailable``."""
        await self._indexes.tidy()
        # Another gateway may have begun a new one, while what this one holds was not in doubt.
        self._connection.generation = await self._connection.call(b"GET", GENERATION) or b""

    async def check(self) -> None:
        """Write one key on each master. Raises ``StoreUnavailable`` within 1 s."""
        await self._connection.all_of([(b"SET", key, b"1") for key in self._connection.check_keys])

    async def _check_kept(self, ask: Ask, is_there: IsThere) -> int:
        """Which sessions has a server less of than this process was told is stored? See ``CheckKept``."""
        mine = [
            (keys_of(session_id)[:2], attempt, self._leases.fence(session_id))
            for session_id, attempt in self._known.items()
            if attempt.startswith(self._process) and is_there(keys_of(session_id)[0])
        ]
        for start in range(0, len(mine), STEP_SESSIONS):
            questions = [
                self._connection.function_call("verify", keys, (attempt, next(self._attempts), fence))
                for keys, attempt, fence in mine[start : start + STEP_SESSIONS]
            ]
            self._found_lost += raise_errors(await ask(questions)).count(LOST)
        lost, self._found_lost = self._found_lost, 0
        return lost


@asynccontextmanager
async def open_redis_store(
    location: RedisLocation,
    *,
    full_sync: bool,
    dedupe_window: float,
    retention: float,
    telemetry: Telemetry,
    lease_seconds: float = LEASE_SECONDS,
    new_token: Callable[[], str] = lambda: secrets.token_hex(8),
) -> AsyncIterator[RedisStore]:
    """A store in the Redis at ``location``, connected inside the block.

    ``full_sync``: whether a commit waits for the disk (``STORE_SYNC=full``). ``dedupe_window`` and
    ``retention``: seconds that ledger and events are promised for; without a gateway Redis drops a session
    that is at rest after twice the longer of them. ``lease_seconds``: how long a silent node keeps its
    sessions. ``new_token`` makes epochs, generations and attempts.

    Raises ``StoreUnavailable`` when Redis cannot be reached within seconds, is too old, or cannot give what
    ``full_sync`` asks for.
    """
    connection = connect(location, full_sync=full_sync, new_token=new_token, telemetry=telemetry)
    async with running_connection(connection):
        yield RedisStore(
            connection,
            dedupe_window=dedupe_window,
            retention=retention,
            lease_seconds=lease_seconds,
            new_token=new_token,
            telemetry=telemetry,
        )
