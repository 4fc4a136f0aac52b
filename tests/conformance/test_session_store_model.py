"""Durable stores against the memory store: whatever is done to both, they hold and answer the same."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar, TypeVar

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.adapters.stores.memory import MemoryStore
from gateway.adapters.stores.redis import open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.adapters.stores.sqlite import open_sqlite_store
from gateway.core.storage import (
    NOBODY,
    CommitRefused,
    Decision,
    PendingCall,
    SessionCommit,
    SessionRecord,
    TurnState,
)
from gateway.ports import SessionStore
from tests.conformance.session_store import (
    DEDUPE_WINDOW,
    RecordingTelemetry,
    SettableClock,
    entry,
    events,
    message,
)
from tests.redis_groups import AnyRedis

Answer = TypeVar("Answer")
SESSIONS = ("a", "b", "c")
SUBJECTS = ("ada", "bob")
few = st.integers(0, 4)

records = st.builds(
    SessionRecord,
    epoch=st.sampled_from(["e1", "e2"]),
    touched_at=st.integers(0, 50).map(float),
    turn_state=st.sampled_from(TurnState),
    pending=st.lists(
        st.builds(PendingCall, st.sampled_from("cd"), st.booleans(), st.just(b"{}")), max_size=2
    ).map(tuple),
    text_prefix=st.text(max_size=5),
)


@st.composite
def drafts(draw: st.DrawFn) -> tuple[SessionCommit, int, int]:
    """A commit without its events, how many it gets, and how far their seqs are off (mostly not)."""
    commit = SessionCommit(
        draw(st.sampled_from(SESSIONS)),
        record=draw(st.none() | records),
        last_event_id=draw(st.sampled_from([None, None, "x", "y", ""])),
        queued=tuple(message(f"t{number}") for number in draw(st.lists(few, max_size=2))),
        dequeued=tuple(f"t{number}" for number in draw(st.lists(few, max_size=2))),
        ledger=tuple(
            entry(f"m{number}", float(at))
            for number, at in draw(st.lists(st.tuples(few, st.integers(0, 300)), max_size=2))
        ),
        decisions=tuple(
            Decision(f"c{number}", draw(st.sampled_from(["approve", "reject"])), 1.0)
            for number in draw(st.lists(few, max_size=2))
        ),
        trimmed_to=draw(st.none() | st.integers(0, 30)),
        reset=draw(st.sampled_from([False] * 7 + [True])),
    )
    plain = draw(st.booleans())
    if plain:
        commit = SessionCommit(
            commit.session_id, trimmed_to=commit.trimmed_to, last_event_id=commit.last_event_id
        )
    return commit, draw(st.integers(0, 6)), draw(st.sampled_from([0] * 9 + [1, -1]))


class OpenInThread:
    """A store in a Trio run of its own thread, to be called from a synchronous test."""

    def __init__(self, open_store: Callable[[], AbstractAsyncContextManager[SessionStore]]) -> None:
        self._open_store = open_store
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        try:
            async with self._open_store() as self.store:
                self._token = trio.lowlevel.current_trio_token()
                self._over = trio.Event()
                self._ready.set()
                await self._over.wait()
        finally:
            self._ready.set()

    def call(self, ask: Callable[[SessionStore], Awaitable[Answer]]) -> Answer:
        """Await ``ask(store)`` in its thread."""

        async def asked() -> Answer:
            return await ask(self.store)

        return trio.from_thread.run(asked, trio_token=self._token)

    def close(self) -> None:
        """Close the store and end the thread."""
        trio.from_thread.run_sync(self._over.set, trio_token=self._token)
        self._thread.join()


async def outcome(store: SessionStore, commits: Sequence[SessionCommit]) -> dict[str, str]:
    """Commit, and say what was refused."""
    try:
        await store.commit(commits)
    except CommitRefused as refusal:
        return dict(refusal.reasons)
    return {}


class SqliteFollowsMemory(RuleBasedStateMachine):
    """Every rule does the same to both; the invariant compares everything that can be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.clock = SettableClock()
        self.telemetry = RecordingTelemetry()
        self.model = MemoryStore(dedupe_window=DEDUPE_WINDOW)
        self.open()

    def open(self) -> None:
        """Open the SQLite store at its place."""
        self.subject = OpenInThread(
            lambda: open_sqlite_store(
                self.directory / "sessions.db",
                full_sync=False,
                dedupe_window=DEDUPE_WINDOW,
                clock=self.clock,
                telemetry=self.telemetry,
            )
        )

    def both(self, ask: Callable[[SessionStore], Awaitable[Answer]]) -> Answer:
        """Ask both stores and check that they agree."""

        async def asked() -> Answer:
            return await ask(self.model)

        expected = trio.run(asked)
        assert self.subject.call(ask) == expected
        return expected

    @rule(session_id=st.sampled_from(SESSIONS), subject=st.sampled_from([*SUBJECTS, NOBODY]))
    def claim(self, session_id: str, subject: str) -> None:
        """Somebody attaches."""
        self.both(lambda store: store.claim(session_id, subject, 1.0))

    @precondition(lambda self: self.both(lambda store: store.sessions_of("ada")))
    @rule(group=st.lists(drafts(), min_size=1, max_size=5))
    def commit(self, group: list[tuple[SessionCommit, int, int]]) -> None:
        """A group commit, mostly one that fits."""
        ends: dict[str, int] = {}
        commits = []
        for draft, count, offset in group:
            session_id = draft.session_id
            if session_id not in ends:
                found = self.both(lambda store, session_id=session_id: store.load(session_id))  # type: ignore[misc]
                ends[session_id] = found.last_seq if found is not None else 0
            if draft.reset:
                ends[session_id] = 0
            first = ends[session_id] + 1 + offset
            ends[session_id] += count
            added = events(first, first + count - 1, size=count) if first > 0 else ()
            commits.append(
                SessionCommit(
                    session_id,
                    record=draft.record,
                    events=added,
                    last_event_id=draft.last_event_id,
                    queued=draft.queued,
                    dequeued=draft.dequeued,
                    ledger=draft.ledger,
                    decisions=draft.decisions,
                    trimmed_to=draft.trimmed_to,
                    reset=draft.reset,
                )
            )
        self.both(lambda store: outcome(store, commits))

    @rule(before=st.integers(0, 60), keep=st.sets(st.sampled_from(SESSIONS), max_size=1))
    def expire(self, before: int, keep: set[str]) -> None:
        """Old sessions go."""
        self.both(lambda store: store.expire(float(before), keep=keep))

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def tidy(self, seconds: int) -> None:
        """Time passes and housekeeping runs."""
        self.clock.seconds += seconds
        self.both(lambda store: store.maintain())

    @rule()
    def open_again(self) -> None:
        """The process ends and another one starts."""
        self.subject.close()
        self.open()

    @invariant()
    def agrees(self) -> None:
        """Both hold and answer the same."""
        for session_id in SESSIONS:
            self.both(lambda store, session_id=session_id: store.load(session_id))  # type: ignore[misc]
            self.both(lambda store, session_id=session_id: store.owner(session_id))  # type: ignore[misc]
        for subject in SUBJECTS:
            self.both(lambda store, subject=subject: store.sessions_of(subject))  # type: ignore[misc]

        async def unfinished(store: SessionStore) -> list[str]:
            return sorted(await store.unfinished())

        self.both(unfinished)
        assert self.telemetry.said == []

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.subject.close()
        shutil.rmtree(self.directory)


TestSqliteFollowsMemory = SqliteFollowsMemory.TestCase
TestSqliteFollowsMemory.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


class RedisFollowsMemory(SqliteFollowsMemory):
    """The same on a real Redis."""

    server: ClassVar[AnyRedis]

    def __init__(self) -> None:
        self.server.empty()
        super().__init__()

    def open(self) -> None:
        """Connect to Redis."""
        self.subject = OpenInThread(
            lambda: open_redis_store(
                parse_redis_url(self.server.url),
                full_sync=False,
                dedupe_window=DEDUPE_WINDOW,
                retention=DEDUPE_WINDOW,
                telemetry=self.telemetry,
            )
        )


@pytest.mark.parametrize("servers", ["redis_server", "redis_cluster"])
def test_redis_follows_memory(servers: str, request: pytest.FixtureRequest) -> None:
    """Whatever is done to both, they hold and answer the same."""
    RedisFollowsMemory.server = request.getfixturevalue(servers)
    run_state_machine_as_test(
        RedisFollowsMemory, settings=settings(max_examples=15, stateful_step_count=20, deadline=None)
    )
