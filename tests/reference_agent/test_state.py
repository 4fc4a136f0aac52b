"""One suite for every store."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import apsw
import attrs
import pytest
import trio

from gateway.reference_agent.history import Entry, RequestedCall
from gateway.reference_agent.memory_state import MemoryState
from gateway.reference_agent.session import AuditRecord, OpenCall, SessionState, Switch
from gateway.reference_agent.sqlite_state import SqliteState, open_sqlite_state
from gateway.reference_agent.state import (
    FINISHED,
    KEYED_TURNS_KEPT,
    RUNNING,
    STOPPED,
    Change,
    StateStore,
    TurnRecord,
)

AT = "2026-01-01T00:00:00Z"
FULL = SessionState(
    "s1",
    AT,
    AT,
    user_id="u",
    title="Tïtle",
    agent="coder",
    pinned=True,
    calls=(OpenCall("c", "t", {"a": [1, None, {"b": 1.5}]}, True, "coder", AT, "awaiting_decision", "why"),),
    switches=(Switch("orchestrator", "coder", "r", AT, 0.5),),
    metrics={"turns": 2},
    entries=2,
)
ENTRIES = (
    Entry("user", "hi\u2028", AT),
    Entry("assistant", "", AT, agent="coder", tool_calls=(RequestedCall("c", "t", {"a": [1]}),)),
)


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    """An empty store of each kind."""
    async with AsyncExitStack() as resources:
        if request.param == "memory":
            yield MemoryState()
        else:
            yield await resources.enter_async_context(open_sqlite_state(str(tmp_path / "agent.db")))


def turn(key: str = "k", status: str = RUNNING, **more: Any) -> TurnRecord:
    """A keyed turn."""
    return TurnRecord("s1", key, "digest", status, **more)


async def test_what_was_committed_is_read_back_exactly(store: StateStore) -> None:
    """Session, history, turn and audit, with all their fields."""
    audit = (AuditRecord(AT, "s1", "tool_call", {"call_id": "c", "ok": True}),)
    await store.commit(Change(FULL, ENTRIES, audit, turn(settled=1), (b"1",), True))
    assert await store.session("s1") == FULL
    assert await store.history("s1") == list(ENTRIES)
    assert await store.turn("s1", "k") == turn(settled=1, events=(b"1",))
    assert await store.audit(None, None, 10, 0) == (list(audit), 1)
    assert dict(await store.audit_counts()) == {"tool_call": 1}
    assert dict(await store.metric_totals()) == {"turns": 2}


async def test_what_is_not_there_is_none_or_empty(store: StateStore) -> None:
    """Reading never fails for want of data."""
    assert await store.session("x") is None
    assert await store.history("x") == []
    assert await store.turn("x", "k") is None
    assert await store.sessions(None, 10, 0) == ([], 0)
    assert await store.audit(None, None, 10, 0) == ([], 0)
    assert dict(await store.metric_totals()) == {}


async def test_sessions_come_last_changed_first_by_page_and_owner(store: StateStore) -> None:
    """The total counts all that fit, not the page."""
    for number in range(5):
        owner = "even" if number % 2 == 0 else "odd"
        await store.commit(Change(SessionState(f"s{number}", AT, f"{number}", user_id=owner)))
    await store.commit(Change(SessionState("s0", AT, "9", user_id="even")))
    found, total = await store.sessions(None, 3, 1)
    assert ([one.session_id for one in found], total) == (["s4", "s3", "s2"], 5)
    found, total = await store.sessions("even", 10, 0)
    assert ([one.session_id for one in found], total) == (["s0", "s4", "s2"], 3)


async def test_the_audit_log_is_filtered_and_newest_first(store: StateStore) -> None:
    """By session, by type, by both."""
    for number in range(6):
        record = AuditRecord(str(number), f"s{number % 2}", "a" if number < 3 else "b", {})
        await store.commit(Change(SessionState(record.session_id, AT, AT), audit=(record,)))
    found, total = await store.audit("s1", None, 10, 0)
    assert ([one.at for one in found], total) == (["5", "3", "1"], 3)
    found, total = await store.audit("s1", "b", 1, 1)
    assert ([one.at for one in found], total) == (["3"], 2)


async def test_events_are_added_behind_those_a_turn_has(store: StateStore) -> None:
    """By commits and between them."""
    state = SessionState("s1", AT, AT)
    await store.commit(Change(state, turn=turn(settled=1), new_events=(b"1",), starts_turn=True))
    await store.add_events(turn(settled=1), (b"2",))
    await store.add_events(turn(settled=1), (b"3", b"4"))
    await store.commit(Change(state, turn=turn(status=FINISHED, settled=5), new_events=(b"5",)))
    expected = turn(status=FINISHED, settled=5, events=(b"1", b"2", b"3", b"4", b"5"))
    assert await store.turn("s1", "k") == expected


async def test_a_new_turn_stops_what_ran_and_forgets_the_oldest(store: StateStore) -> None:
    """Of its own session only."""
    other = TurnRecord("s2", "k0", "digest", RUNNING)
    await store.commit(Change(SessionState("s2", AT, AT), turn=other, starts_turn=True))
    state = SessionState("s1", AT, AT)
    for number in range(KEYED_TURNS_KEPT + 2):
        await store.commit(Change(state, turn=turn(f"k{number}"), new_events=(b"x",), starts_turn=True))
    assert await store.turn("s2", "k0") == other
    assert await store.turn("s1", "k1") is None
    assert await store.turn("s1", "k2") == turn("k2", STOPPED, events=(b"x",))
    assert await store.turn("s1", f"k{KEYED_TURNS_KEPT + 1}") == turn(
        f"k{KEYED_TURNS_KEPT + 1}", events=(b"x",)
    )


async def test_a_cancelled_commit_is_made_all_the_same(store: StateStore) -> None:
    """And the next one is durable too: no transaction stays open."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.commit(Change(FULL, ENTRIES))
    assert await store.history("s1") == list(ENTRIES)
    await store.commit(Change(attrs.evolve(FULL, entries=3), (Entry("user", "3", AT),)))
    assert len(await store.history("s1")) == 3


async def test_memory_forgets_the_sessions_changed_longest_ago() -> None:
    """With their histories and turns: a demo left running does not grow for ever."""
    store = MemoryState(sessions_kept=2)
    for name in ("s1", "s2", "s1", "s3"):
        record = TurnRecord(name, "k", "d", RUNNING)
        await store.commit(Change(SessionState(name, AT, AT), (Entry("user", "x", AT),), turn=record))
    assert [await store.session(name) is not None for name in ("s1", "s2", "s3")] == [True, False, True]
    assert (await store.history("s2"), await store.turn("s2", "k")) == ([], None)
    assert len(await store.history("s1")) == 2


async def test_a_file_keeps_everything_over_a_restart(tmp_path: Path) -> None:
    """Also what was added under a cancelled scope just before the end."""
    path = str(tmp_path / "agent.db")
    async with open_sqlite_state(path) as store:
        await store.commit(Change(FULL, ENTRIES, turn=turn(), starts_turn=True))
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.add_events(turn(), (b"1",))
    async with open_sqlite_state(path) as store:
        assert await store.session("s1") == FULL
        assert await store.history("s1") == list(ENTRIES)
        assert await store.turn("s1", "k") == turn(events=(b"1",))


async def test_a_failed_commit_changes_nothing(tmp_path: Path) -> None:
    """An entry that is there already makes the whole change fail."""
    async with open_sqlite_state(str(tmp_path / "agent.db")) as store:
        await store.commit(Change(FULL, ENTRIES))
        with pytest.raises(apsw.ConstraintError):
            await store.commit(Change(attrs.evolve(FULL, title="lost"), ENTRIES))
        assert await store.session("s1") == FULL


async def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    """Another program's database, no folder, a file that is no database, a file in use."""
    foreign, text, used = tmp_path / "foreign.db", tmp_path / "text.db", tmp_path / "used.db"
    connection = apsw.Connection(str(foreign))
    connection.execute("CREATE TABLE x (y)")
    connection.close()
    text.write_bytes(b"no database" * 100)

    async def say(path: Path) -> str:
        with pytest.raises(ValueError, match="db: ") as caught:
            async with open_sqlite_state(str(path)):
                pass
        return str(caught.value)

    assert "another program" in await say(foreign)
    assert "cannot be used" in await say(text)
    assert "cannot be" in await say(tmp_path / "none" / "agent.db")
    async with open_sqlite_state(str(used)) as store:
        assert isinstance(store, SqliteState)
        assert "used by another process" in await say(used)
