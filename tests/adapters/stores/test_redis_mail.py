"""``gateway.adapters.stores.redis_mail``: letters find their way again when servers change. Real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio
from attrs import define, field

from gateway.adapters.stores.redis import RedisStore
from gateway.adapters.stores.redis_keys import slot_of
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_one_master import OneMaster
from gateway.core.letters import Letter, Took
from tests.adapters.stores.redis_place import Place
from tests.redis_groups import ClusterGroup, SentinelGroup, wait_until
from tests.redis_server import RedisServer

RECOVERY = 4.0
"""Seconds until letters arrive again, the promotion of another master included."""


@define
class Letterbox:
    """What a node was told by another one."""

    store: RedisStore
    counts: list[int] = field(factory=list)
    losses: int = 0
    changed: trio.Event = field(factory=trio.Event)

    def take(self, node: str, letters: Sequence[Letter]) -> None:
        """Keep them."""
        self.counts += [letter.count for letter in letters if isinstance(letter, Took)]
        self._tell()

    def lost(self, node: str) -> None:
        """Count it."""
        self.losses += 1
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what it was told."""
        while not condition():
            await self.changed.wait()

    async def write(self, other: Letterbox, count: int) -> None:
        """Until it arrives, again and again: nothing is repeated by itself."""
        while count not in other.counts:
            self.store.leases.mail.post(other.store.leases.node, Took(1, count))
            with trio.move_on_after(0.1):
                await other.until(lambda: count in other.counts)


@asynccontextmanager
async def two_nodes(url: str) -> AsyncIterator[tuple[Letterbox, Letterbox]]:
    """Two that write to each other."""
    async with Place(url).open() as one, Place(url).open() as two, trio.open_nursery() as nursery:
        boxes = Letterbox(one), Letterbox(two)
        for box in boxes:
            await nursery.start(box.store.leases.mail.run, box.take, box.lost)
        with trio.fail_after(15):
            yield boxes
        nursery.cancel_scope.cancel()


async def test_letters_arrive_in_order_in_a_cluster(redis_cluster: ClusterGroup) -> None:
    """Each once, nothing is said to be lost."""
    async with two_nodes(redis_cluster.url) as (one, two):
        for count in range(200):
            one.store.leases.mail.post(two.store.leases.node, Took(1, count))
        await two.until(lambda: len(two.counts) >= 200)
        assert two.counts == list(range(200))
        assert (one.losses, two.losses) == (0, 0)


async def test_a_broken_subscription_is_told_once(redis_server: RedisServer) -> None:
    """When it breaks; not again by the first letter afterwards, which belongs to what began since."""
    async with two_nodes(redis_server.url) as (one, two):
        await one.write(two, 1)
        redis_server.ask("CLIENT KILL TYPE pubsub")
        with trio.fail_after(1):
            await two.until(lambda: two.losses > 0)
        for count in range(2, 5):
            one.store.leases.mail.post(two.store.leases.node, Took(1, count))
            await one.until(lambda: one.losses > 0)
        await one.write(two, 5)
        assert two.losses == 1
        await one.write(two, 6)
        assert two.losses == 1


async def test_letters_to_a_node_that_nobody_is_are_told_to_be_lost(redis_cluster: ClusterGroup) -> None:
    """At once: in a cluster too the answer to a publication counts who heard it."""
    async with two_nodes(redis_cluster.url) as (one, _):
        one.store.leases.mail.post("nobody", Took(1, 1))
        with trio.fail_after(1):
            await one.until(lambda: one.losses > 0)


async def test_letters_follow_a_slot_that_moves(cluster: ClusterGroup) -> None:
    """The subscription goes where the channel is by now."""
    async with two_nodes(cluster.url) as (one, two):
        await one.write(two, 1)
        channel = f"gateway:node:{two.store.leases.node}"
        source = cluster.master_of(channel)
        target = next(server for server in cluster.servers[:2] if server is not source)
        for step in cluster.moving(slot_of(channel.encode()), source, target):
            await trio.to_thread.run_sync(step)
        with trio.fail_after(RECOVERY):
            await one.write(two, 2)
        assert two.losses


async def test_letters_arrive_again_after_a_failover_in_a_cluster(cluster: ClusterGroup) -> None:
    """To both, wherever their channels are."""
    async with two_nodes(cluster.url) as (one, two):
        cluster.servers[0].kill()
        replica = cluster.servers[-1]
        await trio.to_thread.run_sync(
            wait_until, lambda: replica.says("INFO replication", "role:master") and cluster.agree_on(replica)
        )
        with trio.fail_after(RECOVERY):
            await one.write(two, 1)
            await two.write(one, 2)


def is_written_to(store: RedisStore, server: RedisServer) -> bool:
    """Whether that is where a store writes by now."""
    connection = store._connection
    assert isinstance(connection, OneMaster)
    return connection._link.is_up and connection.is_current(RedisAddress("127.0.0.1", server.port), b"")


async def test_letters_arrive_again_after_a_failover_by_sentinels(sentinels: SentinelGroup) -> None:
    """Also when the former master lives on, cut off: nobody publishes there any more."""
    async with two_nodes(sentinels.url) as (one, two):
        await one.write(two, 1)
        former = sentinels.master
        former.isolate()
        await trio.to_thread.run_sync(wait_until, lambda: sentinels.master is not former)
        for box in (one, two):
            await trio.to_thread.run_sync(wait_until, partial(is_written_to, box.store, sentinels.master))
        with trio.fail_after(RECOVERY):
            await one.write(two, 2)
            await two.write(one, 3)
