"""``gateway.adapters.stores.redis``: what Redis and the way to it can do. Real Redis, real time."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from attrs import evolve
from msgspec.structs import replace

from gateway.adapters.stores.redis import RedisStore
from gateway.adapters.stores.redis_one_master import OneMaster
from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit, SessionRecord, StoredSession, TurnState
from tests.adapters.stores.redis_place import Network, Place, until_works
from tests.conformance.session_store import (
    EVERYTHING,
    RECORD,
    events,
    held,
    message,
    numbered_commit,
)
from tests.redis_server import RedisServer

IDLE = SessionRecord(epoch="e1", touched_at=1.0)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis to be hurt, which keeps everything in its log."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def forgetful_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that keeps what it is told to save, and nothing else."""
    server = RedisServer(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def seconds_to_refuse(store: RedisStore, commit: SessionCommit) -> float:
    """How long a commit takes to be refused because the store is away."""
    started = trio.current_time()
    with pytest.raises(StoreUnavailable):
        await store.commit([commit])
    return trio.current_time() - started


# --------------------------------------------------------------------------- Redis away


async def test_a_killed_redis_is_an_error_within_a_second_and_back_within_two(own_redis: RedisServer) -> None:
    """Each call says so in time; when Redis is back everything is there, and it was said once in the log."""
    place = Place(own_redis.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
        own_redis.kill()
        for _ in range(3):
            assert await seconds_to_refuse(store, numbered_commit("s", 2)) < 1.0
        started = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await store.load("s")
        with pytest.raises(StoreUnavailable):
            await store.check()
        assert trio.current_time() - started < 1.0

        await trio.to_thread.run_sync(own_redis.start)
        assert await until_works(store) < 2.0
        await store.load("s")
        await store.commit([numbered_commit("s", 2)])
        assert (await held(store)).last_seq == 6
    assert place.telemetry.events() == ["store_failing", "store_recovered"]


async def test_a_stuck_redis_is_an_error_within_a_second_and_back_within_two(own_redis: RedisServer) -> None:
    """It holds connections open and does not answer: reads, writes and checks all give up in time."""
    place = Place(own_redis.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
        own_redis.signal(signal.SIGSTOP)
        try:
            assert await seconds_to_refuse(store, numbered_commit("s", 2)) < 1.0
            for _ in range(3):
                started = trio.current_time()
                with pytest.raises(StoreUnavailable):
                    await store.load("s")
                with pytest.raises(StoreUnavailable):
                    await store.check()
                assert trio.current_time() - started < 1.0
                await trio.sleep(0.3)
        finally:
            own_redis.signal(signal.SIGCONT)
        assert await until_works(store) < 2.0

        # Redis carried out the first try as it woke up. It must not count as another one.
        await store.commit([numbered_commit("s", 2)])
        await store.commit([numbered_commit("s", 3)])
        assert (await held(store)).last_seq == 9


async def test_a_network_that_swallows_everything_is_noticed_in_time(redis_server: RedisServer) -> None:
    """An error within a second without any sign of a broken connection; mended, it works within two."""
    network = Network(redis_server.port)
    async with trio.open_nursery() as nursery:
        await nursery.start(network.serve)
        async with Place(f"redis://127.0.0.1:{network.port}").open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([numbered_commit("s", 1)])
            network.is_whole = trio.Event()
            for _ in range(2):
                assert await seconds_to_refuse(store, numbered_commit("s", 2)) < 1.0
            network.is_whole.set()
            assert await until_works(store) < 2.0
            await store.commit([numbered_commit("s", 2)])
            assert (await held(store)).last_seq == 6
        nursery.cancel_scope.cancel()


async def test_the_same_commits_may_be_tried_again_after_no_answer(own_redis: RedisServer) -> None:
    """Whether or not the first try happened, and with several commits of a session in it: applied once."""
    async with Place(own_redis.url).open() as store:
        for session_id in ("a", "b"):
            await store.claim(session_id, "ada", 1.0)
        commits = [numbered_commit(each, number) for number in (1, 2, 3) for each in ("a", "b")]
        own_redis.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await store.commit(commits)
        finally:
            own_redis.signal(signal.SIGCONT)
        await until_works(store)
        await store.commit(commits)
        await store.commit([numbered_commit("a", 4), numbered_commit("b", 4)])

        assert (await held(store, "a")).last_seq == (await held(store, "b")).last_seq == 12
        assert evolve(await held(store, "b"), session_id="a") == await held(store, "a")


async def test_other_commits_are_refused_while_the_last_ones_are_in_doubt(own_redis: RedisServer) -> None:
    """Until the session is loaded, or begins anew."""
    async with Place(own_redis.url).open() as store:
        for session_id in ("a", "b"):
            await store.claim(session_id, "ada", 1.0)
        own_redis.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await store.commit([numbered_commit("a", 1), numbered_commit("b", 1)])
        finally:
            own_redis.signal(signal.SIGCONT)
        await until_works(store)
        with pytest.raises(CommitRefused, match="not known whether"):
            await store.commit([SessionCommit("a", queued=(message("t"),))])

        found = await held(store, "a")
        await store.commit([numbered_commit("a", 2 if found.last_seq else 1)])
        await store.commit([SessionCommit("b", reset=True, record=IDLE, events=events(1, 2))])
        await store.commit([SessionCommit("b", events=events(3, 3))])
        assert (await held(store, "b")).events == events(1, 3)


# --------------------------------------------------------------------------- Redis lost data


async def test_a_flushed_redis_refuses_what_follows_from_nothing(redis_server: RedisServer) -> None:
    """Also a commit that would fit an empty session; claimed and begun anew, the session goes on."""
    place = Place(redis_server.url)
    async with place.open() as store:
        for session_id in ("s", "other"):
            await store.claim(session_id, "ada", 1.0)
            await store.commit([numbered_commit(session_id, 1)])
        redis_server.ask("FLUSHALL")
        with pytest.raises(CommitRefused, match="not known"):
            await store.commit([numbered_commit("s", 2)])
        assert await store.owner("s") is None
        await store.claim("s", "ada", 1.0)
        with pytest.raises(CommitRefused, match="another past"):
            await store.commit([SessionCommit("s", queued=(message("t"),))])
        await store.commit([SessionCommit("s", reset=True, record=IDLE, events=events(1, 2))])

        assert (await held(store)).events == events(1, 2)
        assert await store.load("other") is None
    assert place.telemetry.events() == ["store_lost_data"]


async def test_a_restored_older_copy_begins_new_epochs(forgetful_redis: RedisServer, tmp_path: Path) -> None:
    """Who holds a session is refused; loaded it has a new epoch: its seqs go on, its queue is dropped."""
    place = Place(forgetful_redis.url)
    async with place.open() as store:
        for session_id in ("live", "away"):
            await store.claim(session_id, "ada", 1.0)
            await store.commit([replace(EVERYTHING, session_id=session_id)])
        assert forgetful_redis.ask("SAVE") == "+OK"
        shutil.copy(tmp_path / "dump.rdb", tmp_path / "old.rdb")
        for session_id in ("live", "away"):
            await store.commit([SessionCommit(session_id, events=events(6, 8))])
        forgetful_redis.kill()
        shutil.copy(tmp_path / "old.rdb", tmp_path / "dump.rdb")
        await trio.to_thread.run_sync(forgetful_redis.start)
        await until_works(store)
        with pytest.raises(CommitRefused, match="another past"):
            await store.commit([SessionCommit("live", ledger=())])

        for session_id in ("live", "away"):
            found = await held(store, session_id)
            assert found.record is not None
            assert found.record.epoch not in ("e1", "")
            assert found == StoredSession(
                session_id,
                "ada",
                SessionRecord(epoch=found.record.epoch, touched_at=RECORD.touched_at),
                first_seq=6,
                last_seq=5,
            )
            assert await held(store, session_id) == found
        assert list(await store.unfinished()) == []
        await store.commit([SessionCommit("live", events=events(6, 6))])
    assert "store_lost_data" in place.telemetry.events()


async def test_a_restart_that_lost_nothing_changes_no_epoch(own_redis: RedisServer) -> None:
    """A log that is kept well is believed."""
    place = Place(own_redis.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        before = await held(store)
        own_redis.kill()
        await trio.to_thread.run_sync(own_redis.start)
        await until_works(store)

        assert await held(store) == before
        await store.commit([SessionCommit("s", events=events(6, 6))])
    assert "store_lost_data" not in place.telemetry.events()


async def test_functions_that_were_flushed_come_back(redis_server: RedisServer) -> None:
    """The call that misses them fails as if Redis were away, and soon it works again."""
    async with Place(redis_server.url).open() as store:
        await store.claim("s", "ada", 1.0)
        redis_server.ask("FUNCTION FLUSH")
        assert await seconds_to_refuse(store, numbered_commit("s", 1)) < 1.0
        assert await until_works(store) < 2.0
        await store.commit([numbered_commit("s", 1)])
        assert (await held(store)).last_seq == 3


async def test_bytes_that_cannot_be_read_leave_only_the_owner(redis_server: RedisServer) -> None:
    """The session is dropped, and said so."""
    place = Place(redis_server.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        redis_server.ask("HSET gateway:{s}:head record rubbish")

        assert await held(store) == StoredSession("s", "ada", None, first_seq=1, last_seq=0)
    assert place.telemetry.events() == ["store_session_unreadable"]


# --------------------------------------------------------------------------- several gateways, time


async def test_of_two_gateways_only_the_one_that_is_up_to_date_writes(redis_server: RedisServer) -> None:
    """One that was paused while another went on is refused, whatever it wants to change."""
    place = Place(redis_server.url)
    async with place.open() as paused, place.open() as other:
        await paused.claim("s", "ada", 1.0)
        await paused.commit([numbered_commit("s", 1)])
        await held(other)
        await other.commit([numbered_commit("s", 2)])
        for late in (
            numbered_commit("s", 2),
            SessionCommit("s", record=IDLE),
            SessionCommit("s", queued=(message("t"),)),
            SessionCommit("s", trimmed_to=6),
        ):
            with pytest.raises(CommitRefused, match="another past"):
                await paused.commit([late])

        await other.commit([numbered_commit("s", 3)])
        assert (await held(paused)).last_seq == 9


async def test_what_one_gateway_doubts_stays_believed_of_another(
    redis_server: RedisServer,
) -> None:
    """It learns of the new generation, so that what it writes from then on is believed by all."""
    place = Place(redis_server.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        redis_server.ask("SET gateway:generation another")
        await store.maintain()
        await store.commit([EVERYTHING])
    async with place.open() as store:
        found = await held(store)
        assert found.record == EVERYTHING.record
        assert found.queue == EVERYTHING.queued
    assert place.telemetry.events() == []


async def test_only_sessions_at_rest_run_out_by_themselves(redis_server: RedisServer) -> None:
    """Twice the longer promise after they were last written; never what was accepted and not carried out."""
    async with Place(redis_server.url).open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        keys = [
            f"gateway:{{s}}:{name}" for name in ("head", "events", "queue", "ledger", "ages", "decisions")
        ]
        assert [redis_server.ask(f"TTL {key}") for key in keys] == [":-1"] * 6

        await store.commit([SessionCommit("s", record=IDLE, dequeued=("t2", "t3"), events=events(6, 6))])
        at_rest = [redis_server.ask(f"TTL {key}") for key in keys]
        assert {ttl for ttl in at_rest if ttl != ":-2"} <= {":399", ":400"}
        assert at_rest.count(":-2") == 1, "an empty queue is no key"
        assert redis_server.ask("TTL gateway:{s}:owner") == ":-1"

        running = evolve(IDLE, turn_state=TurnState.RUNNING)
        await store.commit([SessionCommit("s", record=running, events=events(7, 7))])
        assert {redis_server.ask(f"TTL {key}") for key in keys} == {":-1", ":-2"}


async def test_a_live_session_does_not_run_out(redis_server: RedisServer) -> None:
    """Expiry puts it off for those that it is told to keep."""
    async with Place(redis_server.url).open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([SessionCommit("s", record=IDLE, events=events(1, 2))])
        redis_server.ask("EXPIRE gateway:{s}:head 5")
        await store.expire(0.0, keep={"s"})

        assert redis_server.ask("TTL gateway:{s}:head") in (":399", ":400")


# --------------------------------------------------------------------------- hazards, opening


async def test_calls_cancelled_at_any_moment_hang_nothing(redis_server: RedisServer) -> None:
    """Cold and warm, in their first milliseconds, many more than a client's pool has places."""
    chance = random.Random(1)
    for _ in range(20):
        with trio.fail_after(5):
            with trio.move_on_after(chance.uniform(0, 0.01)):
                async with Place(redis_server.url).open():
                    await trio.sleep_forever()
    async with Place(redis_server.url).open() as store:
        await store.claim("s", "ada", 1.0)
        assert isinstance(store._connection, OneMaster)
        store._connection._link.cut("cut")
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(store.load, "s")
                    nursery.start_soon(store.claim, "s", "bob", 1.0)
                await trio.sleep(chance.uniform(0, 0.005))
                nursery.cancel_scope.cancel()
        with trio.fail_after(2):
            assert await store.owner("s") == "ada"
            await store.commit([numbered_commit("s", 1)])


async def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    """Nobody there, a wrong password: an error within seconds, which never repeats the password."""
    server = RedisServer(tmp_path, "--requirepass", "right")
    server.start()
    try:
        with pytest.raises(StoreUnavailable, match="cannot be opened") as caught:
            async with Place(f"redis://:hunter2@127.0.0.1:{server.port}").open():
                pass
        assert "hunter2" not in repr(caught.value)
        async with Place(f"redis://:right@127.0.0.1:{server.port}/1").open() as store:
            await store.check()
    finally:
        server.kill()
    with trio.fail_after(2), pytest.raises(StoreUnavailable, match="cannot be opened"):
        async with Place(server.url).open():
            pass


async def test_full_sync_asks_for_a_log_that_is_written_first(
    own_redis: RedisServer, redis_server: RedisServer
) -> None:
    """``STORE_SYNC=full`` is refused where Redis could not keep what it acknowledged."""
    with pytest.raises(StoreUnavailable, match="appendonly yes"):
        async with Place(redis_server.url, full_sync=True).open():
            pass
    async with Place(own_redis.url, full_sync=True).open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])


async def test_a_failure_of_the_caller_comes_out_as_it_is(redis_server: RedisServer) -> None:
    """Not as a group, and coredis may log again afterwards."""
    with pytest.raises(KeyError):
        async with Place(redis_server.url).open():
            raise KeyError
