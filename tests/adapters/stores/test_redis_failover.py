"""What becomes of sessions when another Redis takes over from their master. Real sentinels and failovers."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import trio

from gateway.adapters.stores.redis import RedisStore
from gateway.adapters.stores.redis_link import make_connection
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_sentinel import RedisSentinels
from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit
from tests.adapters.stores.redis_place import Network, Place, until_works
from tests.conformance.session_store import EVERYTHING, RECORD, events, held, numbered_commit
from tests.redis_groups import PORTS, SERVICE, Sentinel, SentinelGroup, wait_until
from tests.redis_server import RedisServer

RECOVERY = 3.0
"""Seconds after the promotion within which a store works again."""


async def until_replicated(sentinels: SentinelGroup) -> None:
    """Wait until the replica has all that the master wrote."""
    await trio.to_thread.run_sync(wait_until, lambda: sentinels.is_replicated)


async def until_settled(sentinels: SentinelGroup) -> None:
    """Wait until the replica is one that may take over."""
    await trio.to_thread.run_sync(wait_until, lambda: sentinels.is_settled)


async def until_promoted(sentinels: SentinelGroup, former: RedisServer) -> RedisServer:
    """Wait until most sentinels name another master; gives it."""
    await trio.to_thread.run_sync(wait_until, lambda: sentinels.master is not former)
    return sentinels.master


def sentinels_of(*ports: int) -> RedisSentinels:
    """What asks those sentinels."""
    addresses = tuple(RedisAddress("127.0.0.1", port) for port in ports)
    return RedisSentinels(
        addresses, SERVICE, lambda address: make_connection(address, username=None, password=None, tls=None)
    )


async def test_a_failover_to_a_replica_that_has_everything_loses_nothing(sentinels: SentinelGroup) -> None:
    """Refused meanwhile, then it goes on where it was: same epoch, same queue, nothing stored twice."""
    place = Place(sentinels.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        before = await held(store)
        former = sentinels.master
        await until_replicated(sentinels)
        former.kill()
        with pytest.raises(StoreUnavailable):
            await store.commit([SessionCommit("s", events=events(6, 6))])
        await until_promoted(sentinels, former)
        assert await until_works(store) < RECOVERY

        await store.commit([SessionCommit("s", events=events(6, 6))])
        after = await held(store)
        assert after.record == before.record
        assert after.queue == before.queue
        assert after.events == events(1, 6)
    assert place.telemetry.events() == ["store_failing", "store_recovered"]


async def test_what_a_replica_lacks_is_told_and_nothing_else_is_touched(sentinels: SentinelGroup) -> None:
    """Of two sessions one was written after the last replication: it alone gets a new epoch."""
    place = Place(sentinels.url)
    async with place.open() as store:
        for session_id in ("lost", "kept"):
            await store.claim(session_id, "ada", 1.0)
            await store.commit([SessionCommit(session_id, record=RECORD, events=events(1, 5))])
        kept = await held(store, "kept")
        former = sentinels.master
        await until_settled(sentinels)
        former.isolate()
        await store.commit([SessionCommit("lost", events=events(6, 8))])
        former.kill()
        await until_promoted(sentinels, former)
        assert await until_works(store) < RECOVERY

        with pytest.raises(CommitRefused, match="another past"):
            await store.commit([SessionCommit("lost", events=events(9, 9))])
        found = await held(store, "lost")
        assert found.record is not None
        assert found.record.epoch != "e1"
        assert found.last_seq == 5
        assert await held(store, "kept") == kept
        await store.commit(
            [SessionCommit("kept", events=events(6, 6)), SessionCommit("lost", events=events(6, 6))]
        )
    said = place.telemetry.events()
    assert said.count("store_lost_data") == said.count("store_epoch_renewed") == 1


async def test_a_master_that_was_cut_off_is_left_behind(sentinels: SentinelGroup) -> None:
    """It takes writes as long as a gateway knows no better; then they are told to be lost."""
    place = Place(sentinels.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
        former = sentinels.master
        await until_settled(sentinels)
        former.isolate()
        await store.commit([numbered_commit("s", 2)])
        await until_promoted(sentinels, former)
        with trio.fail_after(RECOVERY), pytest.raises(CommitRefused, match="another past"):
            await commit_for_ever(store, 3)

        found = await held(store)
        assert found.record is not None
        assert (found.record.epoch != "e", found.last_seq) == (True, 3)
        await store.commit([SessionCommit("s", events=events(4, 4))])
    assert "store_lost_data" in place.telemetry.events()


async def commit_for_ever(store: RedisStore, number: int) -> None:
    """From that number on, until it is refused for good."""
    while True:
        try:
            await store.commit([numbered_commit("s", number)])
            number += 1
        except StoreUnavailable:
            await until_works(store)
        await trio.sleep(0.05)


async def test_a_master_that_hangs_and_wakes_up_is_refused_nothing_is_lost(sentinels: SentinelGroup) -> None:
    """Commits whose answer was lost are tried again at its successor, and stored once."""
    place = Place(sentinels.url)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
        former = sentinels.master
        await until_replicated(sentinels)
        former.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await store.commit([numbered_commit("s", 2)])
            await until_promoted(sentinels, former)
        finally:
            former.signal(signal.SIGCONT)
        assert await until_works(store) < RECOVERY

        await store.commit([numbered_commit("s", 2)])
        await store.commit([numbered_commit("s", 3)])
        assert (await held(store)).last_seq == 9
    assert "store_lost_data" not in place.telemetry.events()


async def test_a_loss_is_told_though_others_have_written_more_since(tmp_path: Path) -> None:
    """A count of all commits has overtaken what was seen; who took the session over loses it again."""
    server = RedisServer(tmp_path)
    server.start()
    try:
        network = Network(server.port)
        async with trio.open_nursery() as nursery:
            await nursery.start(network.serve)
            cut, other = Place(f"redis://127.0.0.1:{network.port}"), Place(server.url)
            async with cut.open() as store:
                for session_id in ("s", "mine"):
                    await store.claim(session_id, "ada", 1.0)
                    await store.commit([numbered_commit(session_id, 1)])
                assert server.ask("SAVE") == "+OK"
                shutil.copy(tmp_path / "dump.rdb", tmp_path / "old.rdb")
                for session_id in ("s", "mine"):
                    await store.commit([numbered_commit(session_id, 2)])
                network.is_whole = trio.Event()
                server.kill()
                shutil.copy(tmp_path / "old.rdb", tmp_path / "dump.rdb")
                await trio.to_thread.run_sync(server.start)
                async with other.open() as successor:
                    await held(successor, "s")
                    for number in range(2, 9):
                        await successor.commit([numbered_commit("s", number)])
                    network.is_whole.set()
                    await until_works(store)
                    with pytest.raises(CommitRefused, match="another past"):
                        await successor.commit([numbered_commit("s", 9)])
                    for each, session_id in ((successor, "s"), (store, "mine")):
                        found = await held(each, session_id)
                        assert found.record is not None
                        assert found.record.epoch != "e"
            nursery.cancel_scope.cancel()
    finally:
        server.kill()
    assert "store_lost_data" in cut.telemetry.events()


async def test_a_master_that_became_a_replica_behind_an_address_is_left(tmp_path: Path) -> None:
    """Nobody cut the connection to it: what it refuses says so, and the address leads elsewhere by now."""
    servers = [RedisServer(tmp_path, "--repl-diskless-sync-delay", "0", ports=PORTS) for _ in range(2)]
    try:
        for server in servers:
            server.start()
        former, successor = servers
        network = Network(former.port)
        async with trio.open_nursery() as nursery:
            await nursery.start(network.serve)
            place = Place(f"redis://127.0.0.1:{network.port}")
            async with place.open() as store:
                await store.claim("s", "ada", 1.0)
                await store.commit([numbered_commit("s", 1)])
                assert successor.ask(f"REPLICAOF 127.0.0.1 {former.port}") == "+OK"
                await trio.to_thread.run_sync(
                    wait_until, lambda: successor.says("INFO replication", "master_link_status:up")
                )
                assert successor.ask("REPLICAOF NO ONE") == "+OK"
                assert former.ask(f"REPLICAOF 127.0.0.1 {successor.port}") == "+OK"
                network.lead_to(successor.port)
                with pytest.raises(StoreUnavailable, match="refuses to write"):
                    await store.commit([numbered_commit("s", 2)])
                assert await until_works(store) < RECOVERY
                await store.commit([numbered_commit("s", 2)])
                assert (await held(store)).last_seq == 6
            nursery.cancel_scope.cancel()
    finally:
        for server in servers:
            server.kill()
    assert "store_lost_data" not in place.telemetry.events()


async def test_the_newest_of_the_sentinels_opinions_counts(sentinels: SentinelGroup, tmp_path: Path) -> None:
    """One that was cut off still names the old master; one that is not there is passed over."""
    former = sentinels.master
    stale = Sentinel(tmp_path, former.port, quorum=9)
    stale.start()
    try:
        await trio.to_thread.run_sync(
            wait_until, lambda: sentinels.sentinels[0].ask(f"SENTINEL FAILOVER {SERVICE}") == "+OK"
        )
        master = await until_promoted(sentinels, former)
        stale.ask(f"SENTINEL REMOVE {SERVICE}")
        stale.ask(f"SENTINEL MONITOR {SERVICE} 127.0.0.1 {former.port} 9")
        ports = [PORTS[-1] + 1, stale.port, *(sentinel.port for sentinel in sentinels.sentinels)]

        assert (await sentinels_of(*ports).find()).port == master.port
    finally:
        stale.kill()


async def test_sentinels_that_cannot_help_say_why(shared_sentinels: SentinelGroup) -> None:
    """None is there, or none knows the service: one error that names both."""
    port = shared_sentinels.sentinels[0].port
    for url, says in (
        (
            f"redis+sentinel://127.0.0.1:{port}/other",
            "no sentinel names the master of 'other'.*No such master",
        ),
        (
            f"redis+sentinel://127.0.0.1:{PORTS[-1] + 1}/main",
            "no sentinel names the master.*: ",
        ),
        (f"redis://127.0.0.1:{port}", "this is a sentinel.*redis.sentinel://"),
        (f"redis://127.0.0.1:{replica_of(shared_sentinels).port}", "is a replica.*Name the master"),
    ):
        with trio.fail_after(3), pytest.raises(StoreUnavailable, match=says):
            async with Place(url).open():
                pass


def replica_of(sentinels: SentinelGroup) -> RedisServer:
    """The one that is not the master."""
    return next(server for server in sentinels.servers if server is not sentinels.master)


async def test_sentinels_and_their_redis_may_want_passwords(tmp_path: Path) -> None:
    """Each its own; neither is repeated when it is wrong."""
    master = RedisServer(tmp_path, "--requirepass", "right")
    master.start()
    sentinel = Sentinel(
        tmp_path, master.port, quorum=1, options=["requirepass watcher", "sentinel auth-pass main right"]
    )
    sentinel.start()
    host = f"127.0.0.1:{sentinel.port}"
    try:
        async with Place(f"redis+sentinel://:right@{host}/main/2?sentinel_password=watcher").open() as store:
            await store.check()
        for url in (
            f"redis+sentinel://:right@{host}/main?sentinel_password=hunter2",
            f"redis+sentinel://:hunter2@{host}/main?sentinel_password=watcher",
            f"redis+sentinel://:right@{host}/main",
        ):
            with pytest.raises(StoreUnavailable) as caught:
                async with Place(url).open():
                    pass
            assert "hunter2" not in repr(caught.value)
    finally:
        sentinel.kill()
        master.kill()
