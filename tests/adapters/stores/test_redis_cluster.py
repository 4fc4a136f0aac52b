"""``gateway.adapters.stores.redis_cluster``: slots that move, masters that fail. Real cluster, real time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gateway.adapters.stores.redis import RedisStore
from gateway.adapters.stores.redis_keys import cluster_shards, slot_of
from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit, StoredSession
from tests.adapters.stores.redis_place import Place, until_works
from tests.conformance.session_store import RECORD, events, held, message, numbered_commit
from tests.redis_groups import ClusterGroup, wait_until
from tests.redis_server import RedisServer

RECOVERY = 3.0
"""Seconds after the promotion within which a store works again."""
SESSIONS = [f"s{number}" for number in range(30)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    await trio.to_thread.run_sync(wait_until, condition)


def sessions_on(group: ClusterGroup, server: RedisServer) -> list[str]:
    """Those of ``SESSIONS`` that a server has."""
    return [each for each in SESSIONS if group.master_of(f"gateway:{{{each}}}:head") is server]


async def begin(store: RedisStore) -> None:
    """Claim and fill them all."""
    for session_id in SESSIONS:
        await store.claim(session_id, "ada", 1.0)
    await store.commit([numbered_commit(session_id, 1) for session_id in SESSIONS])


def reads(server: RedisServer) -> int:
    """How many times a server has read from its clients."""
    return int(server.ask("INFO stats").split("total_reads_processed:")[1].split()[0])


async def test_a_group_commit_is_one_write_to_each_master(redis_cluster: ClusterGroup) -> None:
    """However many sessions it is about, what it indexes is on the way."""
    async with Place(redis_cluster.url).open() as store:
        await begin(store)
        before = [reads(server) for server in redis_cluster.servers]
        rounds = 20
        for number in range(2, 2 + rounds):
            commits = [numbered_commit(session_id, number) for session_id in SESSIONS]
            await store.commit([SessionCommit(each, queued=(message(f"t{number}"),)) for each in SESSIONS])
            await store.commit(commits)
        after = [reads(server) for server in redis_cluster.servers]

        assert all(sessions_on(redis_cluster, server) for server in redis_cluster.servers)
        # Once more per server for the question itself, and for each second that it is looked who is master.
        grown = [end - start for start, end in zip(before, after, strict=True)]
        assert all(2 * rounds <= each <= 2 * rounds + 10 for each in grown), grown
        assert sorted(await store.unfinished()) == sorted(SESSIONS)


def test_each_master_of_a_cluster_of_any_shape_has_an_index_near() -> None:
    """Shards are spread evenly over the slots, and every key of one is in the same slot."""
    slots = [slot_of(shard.unfinished) for shard in cluster_shards()]

    assert [slot * len(slots) // 16384 for slot in slots] == list(range(len(slots)))
    assert slots == [slot_of(shard.touched) for shard in cluster_shards()]
    assert slots == [slot_of(shard.checked) for shard in cluster_shards()]


@pytest.mark.parametrize("key", ["a", "a{b}c", "{}a", "a{b", "{b}{c}", "gateway:{s}:head", "a}b{c}"])
def test_slots_are_those_of_redis(redis_cluster: ClusterGroup, key: str) -> None:
    """Only what is between the first braces counts, if there is anything."""
    assert f":{slot_of(key.encode())}" == redis_cluster.servers[0].ask(f"CLUSTER KEYSLOT {key}")


async def test_a_session_that_moves_while_it_is_written_loses_nothing(cluster: ClusterGroup) -> None:
    """To a master that was there, and to one that is new and has no functions yet; commits only wait."""
    new = cluster.add()
    place = Place(cluster.url)
    async with place.open() as store:
        await begin(store)
        session_id = sessions_on(cluster, cluster.servers[0])[0]
        slot = slot_of(f"gateway:{{{session_id}}}:head".encode())
        written = 1

        async def write() -> None:
            nonlocal written
            while True:
                await commit_until_stored(store, numbered_commit(session_id, written + 1))
                written += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for source, target in ((cluster.servers[0], cluster.servers[1]), (cluster.servers[1], new)):
                for step in cluster.moving(slot, source, target):
                    await trio.to_thread.run_sync(step)
                before = written
                with trio.fail_after(RECOVERY):
                    while written < before + 10:  # noqa: ASYNC110 - what it waits for is time
                        await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert cluster.master_of(f"gateway:{{{session_id}}}:head") is new
        for each in SESSIONS:
            found = (await held(store, each)).last_seq
            # One may have been cut short by the end of the test.
            assert found in ((3 * written, 3 * written + 3) if each == session_id else (3,))
    assert "store_lost_data" not in place.telemetry.events()


async def commit_until_stored(store: RedisStore, commit: SessionCommit) -> None:
    """As the engine does: again and again while the store is away, the very same."""
    with trio.fail_after(5):
        while True:
            try:
                await store.commit([commit])
            except StoreUnavailable:
                await trio.sleep(0.05)
            else:
                return


async def test_a_slot_that_stays_half_moved_is_refused_in_time(cluster: ClusterGroup) -> None:
    """One key is asked for where it is; several of which some are missing wait for the end of the move."""
    async with Place(cluster.url).open() as store:
        source, target = cluster.servers[:2]
        session_id = sessions_on(cluster, source)[0]
        await store.claim(session_id, "ada", 1.0)
        steps = cluster.moving(slot_of(f"gateway:{{{session_id}}}:head".encode()), source, target)
        for step in steps[:2]:
            await trio.to_thread.run_sync(step)
            assert await store.owner(session_id) == "ada"
        for call in (store.load(session_id), store.commit([numbered_commit(session_id, 1)])):
            started = trio.current_time()
            with pytest.raises(StoreUnavailable):
                await call
            assert trio.current_time() - started < 1.0
        await trio.to_thread.run_sync(steps[2])
        await store.commit([numbered_commit(session_id, 1)])
        assert (await held(store, session_id)).last_seq == 3


async def test_a_master_that_fails_over_loses_nothing_that_was_replicated(cluster: ClusterGroup) -> None:
    """Meanwhile commits are refused in time; then all sessions go on where they were."""
    place = Place(cluster.url)
    async with place.open() as store:
        await begin(store)
        former, *_, replica = cluster.servers
        await until(lambda: cluster.is_replicated(former))
        former.kill()
        commits = [numbered_commit(session_id, 2) for session_id in SESSIONS]
        started = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await store.commit(commits)
        assert trio.current_time() - started < 1.0
        await until(lambda: replica.says("INFO replication", "role:master") and cluster.agree_on(replica))
        assert await until_works(store) < RECOVERY

        await store.commit(commits)
        for session_id in SESSIONS:
            assert (await held(store, session_id)).last_seq == 6
    assert "store_lost_data" not in place.telemetry.events()


async def test_what_a_master_took_with_it_is_told_and_nothing_else_is_touched(cluster: ClusterGroup) -> None:
    """Only the session that was written after the last replication gets a new epoch."""
    place = Place(cluster.url)
    async with place.open() as store:
        await begin(store)
        former, *_, replica = cluster.servers
        lost, kept, *_ = sessions_on(cluster, former)
        for session_id in (lost, kept):
            await store.commit([SessionCommit(session_id, record=RECORD)])
        await until(lambda: cluster.is_replicated(former))
        former.isolate()
        await store.commit([SessionCommit(lost, events=events(4, 6))])
        former.kill()
        await until(lambda: replica.says("INFO replication", "role:master") and cluster.agree_on(replica))
        assert await until_works(store) < RECOVERY

        with pytest.raises(CommitRefused, match="another past"):
            await store.commit([SessionCommit(lost, events=events(7, 7))])
        found = await held(store, lost)
        assert found.record is not None
        assert (found.record.epoch == RECORD.epoch, found.last_seq) == (False, 3)
        for session_id in SESSIONS:
            if session_id != lost:
                found = await held(store, session_id)
                assert found.record is not None
                assert found.record.epoch in ("e", RECORD.epoch)
        await store.commit(
            [SessionCommit(kept, events=events(4, 4)), SessionCommit(lost, events=events(4, 4))]
        )
    said = place.telemetry.events()
    assert said.count("store_lost_data") == said.count("store_epoch_renewed") == 1


async def test_a_planned_failover_is_hardly_noticed(cluster: ClusterGroup) -> None:
    """The former master says where to go; nothing is lost, nothing doubted."""
    place = Place(cluster.url)
    async with place.open() as store:
        await begin(store)
        replica = cluster.servers[-1]
        await until(lambda: cluster.is_replicated(cluster.servers[0]))
        assert replica.ask("CLUSTER FAILOVER") == "+OK"
        number = 1
        end = trio.current_time() + 5
        while trio.current_time() < end and not replica.says("INFO replication", "role:master"):
            number += 1
            for session_id in SESSIONS:
                await commit_until_stored(store, numbered_commit(session_id, number))
        number += 1
        for session_id in SESSIONS:
            await commit_until_stored(store, numbered_commit(session_id, number))
            assert (await held(store, session_id)).last_seq == 3 * number
    assert "store_lost_data" not in place.telemetry.events()


async def test_slots_that_nobody_has_are_refused_in_time(cluster: ClusterGroup) -> None:
    """And served again when somebody has them."""
    async with Place(cluster.url).open() as store:
        await begin(store)
        source, *others, _ = cluster.servers
        session_id = sessions_on(cluster, source)[0]
        slot = slot_of(f"gateway:{{{session_id}}}:head".encode())
        for server in (source, *others):
            assert server.ask(f"CLUSTER DELSLOTS {slot}") == "+OK"
        for _ in range(4):
            started = trio.current_time()
            with pytest.raises(StoreUnavailable):
                await store.load(session_id)
            assert trio.current_time() - started < 1.0
            await trio.sleep(0.3)
        assert source.ask(f"CLUSTER ADDSLOTS {slot}") == "+OK"
        await until(lambda: cluster.servers[1].says("CLUSTER INFO", "cluster_state:ok"))
        with trio.fail_after(RECOVERY):
            await commit_until_stored(store, numbered_commit(session_id, 2))


async def until_doubted(store: RedisStore, session_id: str) -> StoredSession:
    """Load a session until it has an epoch that nobody gave it."""
    while True:
        found = await held(store, session_id)
        assert found.record is not None
        if found.record.epoch != "e":
            return found
        await trio.sleep(0.05)


async def test_a_cluster_restored_from_an_older_copy_begins_new_epochs(tmp_path: Path) -> None:
    """A master that was restarted may hold anything: also a session is in doubt that seems to be whole."""
    cluster = ClusterGroup(tmp_path, 1)
    cluster.start()
    try:
        (server,) = cluster.servers
        place = Place(cluster.url)
        async with place.open() as store:
            await begin(store)
            assert server.ask("SAVE") == "+OK"
            await store.commit([SessionCommit("s1", record=RECORD, events=events(4, 4))])
            server.kill()
            await trio.to_thread.run_sync(server.start)
            await until(lambda: server.says("CLUSTER INFO", "cluster_state:ok"))
            await until_works(store)
            with trio.fail_after(RECOVERY):
                assert (await until_doubted(store, "s2")).last_seq == 3
    finally:
        cluster.kill()
    assert "store_lost_data" in place.telemetry.events()


async def test_a_master_that_is_given_slots_without_their_keys_is_asked_what_it_has(
    cluster: ClusterGroup,
) -> None:
    """As a repair does after a master without a replica is gone: the loss is noticed before anybody asks."""
    place = Place(cluster.url)
    async with place.open() as store:
        await begin(store)
        source, target, other, _ = cluster.servers
        session_id = sessions_on(cluster, source)[0]
        cluster.give(slot_of(f"gateway:{{{session_id}}}:head".encode()), source, target)
        with trio.fail_after(5):
            while "store_lost_data" not in place.telemetry.events():
                await until_works(store)
                await trio.sleep(0.05)

        with pytest.raises(CommitRefused, match="not known"):
            await store.commit([numbered_commit(session_id, 2)])
        assert (await held(store, sessions_on(cluster, other)[0])).last_seq == 3


async def test_what_is_no_whole_cluster_says_so(tmp_path: Path, redis_server: RedisServer) -> None:
    """A node without a cluster, a cluster without all slots, a node by a URL for one server, nobody."""
    lonely = ClusterGroup(tmp_path, 1)
    (server,) = lonely.servers
    server.start()
    try:
        for url, says in (
            (f"redis+cluster://127.0.0.1:{server.port}", "not complete.*redis-cli --cluster check"),
            (f"redis://127.0.0.1:{server.port}", "a node of a cluster.*redis.cluster://"),
            (
                f"redis+cluster://127.0.0.1:{redis_server.port}",
                "cluster support disabled|not a node of a cluster",
            ),
            ("redis+cluster://127.0.0.1:21999", "cannot be opened"),
        ):
            with trio.fail_after(3), pytest.raises(StoreUnavailable, match=says):
                async with Place(url).open():
                    pass
    finally:
        lonely.kill()
