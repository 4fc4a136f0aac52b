"""``gateway.adapters.stores.redis_leases``: one node at a time, whatever the others believe. Real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from gateway.adapters.stores.redis import RedisStore, open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.core.storage import CommitRefused, SessionCommit
from tests.conformance.session_store import RecordingTelemetry, events, held, message, numbered_commit
from tests.redis_groups import AnyRedis

LEASE = 0.4


@pytest.fixture(params=["shared_redis", "shared_cluster"])
def redis(request: pytest.FixtureRequest) -> AnyRedis:
    """A Redis of each kind that has code of its own for what nodes do together, empty."""
    servers: AnyRedis = request.getfixturevalue(request.param)
    servers.empty()
    return servers


@asynccontextmanager
async def node(server: AnyRedis) -> AsyncIterator[RedisStore]:
    """A store on that server, as one node has it."""
    async with open_redis_store(
        parse_redis_url(server.url),
        full_sync=False,
        dedupe_window=100.0,
        retention=100.0,
        telemetry=RecordingTelemetry(),
        lease_seconds=LEASE,
    ) as store:
        yield store


class Heard:
    """What a node was told."""

    def __init__(self) -> None:
        self.session_ids: list[str] = []
        self.came = trio.Event()

    def __call__(self, session_id: str) -> None:
        """One session."""
        self.all([session_id])

    def all(self, session_ids: Sequence[str]) -> None:
        """Several, or none."""
        self.session_ids += session_ids
        if session_ids:
            self.came.set()


def ignore(_: object) -> None:
    """Hear of it and do nothing."""


async def test_a_session_has_one_node_at_a_time(redis: AnyRedis) -> None:
    """Another one is told who has it, until it is released or the node leaves."""
    async with node(redis) as one, node(redis) as two, trio.open_nursery() as lives:
        for store in (one, two):
            await lives.start(store.leases.run, ignore, ignore)
        for session_id in ("a", "b"):
            assert await one.leases.acquire(session_id) is None
            assert await two.leases.acquire(session_id) == one.leases.node
            assert await one.leases.acquire(session_id) is None

        await one.leases.release(["a"])
        assert not await one.leases.holds("a")
        assert await two.leases.acquire("a") is None
        assert await one.leases.acquire("a") == two.leases.node
        await two.leases.leave()
        assert await one.leases.acquire("a") is None
        lives.cancel_scope.cancel()


async def test_of_many_that_ask_at_once_one_gets_it(redis: AnyRedis) -> None:
    """All others are told that one's name."""
    async with node(redis) as one, node(redis) as two, trio.open_nursery() as lives:
        for store in (one, two):
            await lives.start(store.leases.run, ignore, ignore)
        for attempt in range(30):
            told: dict[str, str | None] = {}

            async def ask(store: RedisStore, session_id: str, told: dict[str, str | None] = told) -> None:
                told[store.leases.node] = await store.leases.acquire(session_id)

            async with trio.open_nursery() as asking:
                for store in (one, two):
                    asking.start_soon(ask, store, f"s{attempt}")
            winner = next(name for name, answer in told.items() if answer is None)
            assert [answer for answer in told.values() if answer is not None] == [winner]
        lives.cancel_scope.cancel()


async def test_redis_refuses_what_a_paused_owner_writes(redis: AnyRedis) -> None:
    """Awake again it may change nothing, not even begin the session anew, until it has the session again."""
    async with node(redis) as paused, node(redis) as other:
        await paused.claim("s", "ada", 1.0)
        assert await paused.leases.acquire("s") is None
        await paused.commit([numbered_commit("s", 1)])
        assert await paused.leases.holds("s")
        # It never said that it lives, which is what a pause looks like.
        assert await other.leases.acquire("s") is None
        assert [await store.leases.holds("s") for store in (paused, other)] == [False, True]
        await held(other)
        for late in (
            numbered_commit("s", 2),
            SessionCommit("s", trimmed_to=1),
            SessionCommit("s", queued=(message("t"),)),
            SessionCommit("s", reset=True, events=events(1, 1)),
        ):
            with pytest.raises(CommitRefused, match="another node"):
                await paused.commit([late])
        await other.commit([numbered_commit("s", 2)])
        assert (await held(other)).last_seq == 6


async def test_a_node_that_was_thought_dead_hears_what_it_lost(redis: AnyRedis) -> None:
    """Of sessions that nobody took it still is the owner."""
    lost = Heard()
    async with node(redis) as one, node(redis) as two, trio.open_nursery() as lives:
        await lives.start(one.leases.run, lost, ignore)
        await lives.start(two.leases.run, ignore, ignore)
        for session_id in ("taken", "kept"):
            await one.claim(session_id, "ada", 1.0)
            assert await one.leases.acquire(session_id) is None
        redis.ask(f"ZREM gateway:nodes {one.leases.node}")
        while one.leases.node in two._leases.others:
            await two._leases._beat()
            redis.ask(f"ZREM gateway:nodes {one.leases.node}")
        assert await two.leases.acquire("taken") is None
        with trio.fail_after(3):
            await lost.came.wait()

        assert lost.session_ids == ["taken"]
        with pytest.raises(CommitRefused, match="another node"):
            await one.commit([numbered_commit("taken", 1)])
        await one.commit([numbered_commit("kept", 1)])
        lives.cancel_scope.cancel()


async def test_work_that_no_living_node_has_is_offered(redis: AnyRedis) -> None:
    """Within the lease; not what another node that lives has, and nothing that is at rest."""
    offered = Heard()
    async with node(redis) as dead, node(redis) as one, node(redis) as two:
        for session_id in ("left", "rest", "live"):
            owner = two if session_id == "live" else dead
            await owner.claim(session_id, "ada", 1.0)
            await owner.leases.acquire(session_id)
            queued = () if session_id == "rest" else (message("t"),)
            await owner.commit([SessionCommit(session_id, queued=queued, events=events(1, 1))])
        async with trio.open_nursery() as lives:
            await lives.start(two.leases.run, ignore, ignore)
            await lives.start(one.leases.run, ignore, offered.all)
            with trio.fail_after(3):
                await offered.came.wait()
            await trio.sleep(LEASE)
            lives.cancel_scope.cancel()
    assert set(offered.session_ids) == {"left"}


async def test_expiry_spares_what_another_node_has(redis: AnyRedis) -> None:
    """Sockets that say nothing for long may be attached to it there."""
    async with node(redis) as one, node(redis) as two, trio.open_nursery() as lives:
        for store in (one, two):
            await lives.start(store.leases.run, ignore, ignore)
        await one._leases._beat()
        for session_id, owner in (("a", one), ("b", two)):
            await owner.claim(session_id, "ada", 1.0)
            await owner.leases.acquire(session_id)
            await owner.commit([numbered_commit(session_id, 1)])

        assert await one.expire(100.0) == 1
        assert (await held(two, "b")).last_seq == 3
        lives.cancel_scope.cancel()
