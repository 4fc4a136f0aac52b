"""Who is master of which hash slot, as one node of a Redis Cluster sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import field, frozen

from gateway.adapters.stores.redis_keys import SLOTS, slot_of
from gateway.adapters.stores.redis_location import RedisAddress

Range = tuple[int, int, RedisAddress]
"""First slot, last slot, their master."""


@frozen
class ClusterView:
    """What one node says."""

    epoch: int
    """The highest configuration epoch that it knows; each change of masters raises it."""
    is_well: bool
    """Whether it thinks that the cluster works."""
    ranges: tuple[Range, ...]
    table: tuple[RedisAddress | None, ...] = field(init=False, repr=False, eq=False)
    """The master of each slot."""
    addresses: frozenset[RedisAddress] = field(init=False, eq=False)
    """Of all masters that have slots."""

    @table.default
    def _table_of_ranges(self) -> tuple[RedisAddress | None, ...]:
        table: list[RedisAddress | None] = [None] * SLOTS
        for first, last, address in self.ranges:
            table[first : last + 1] = [address] * (last + 1 - first)
        return tuple(table)

    @addresses.default
    def _addresses_of_ranges(self) -> frozenset[RedisAddress]:
        return frozenset(address for _, _, address in self.ranges)

    def master(self, key: bytes) -> RedisAddress | None:
        """The master of the slot that the key is in."""
        return self.table[slot_of(key)]

    def gained(self, address: RedisAddress, before: ClusterView) -> Callable[[bytes], bool]:
        """Whether a key is with a master that it was not with before."""

        def is_gained(key: bytes) -> bool:
            slot = slot_of(key)
            return self.table[slot] == address and before.table[slot] != address

        return is_gained


NOTHING_SEEN = ClusterView(epoch=-1, is_well=False, ranges=())


def newest(views: Sequence[ClusterView]) -> ClusterView:
    """The one to believe: a node that was cut off from the others goes on believing in itself."""
    return max(views, key=lambda view: (view.epoch, view.is_well))


def view_from(asked: RedisAddress, info: bytes, slots: Any) -> ClusterView:
    """The view in the answers to ``CLUSTER INFO`` and ``CLUSTER SLOTS`` of the node ``asked``.

    A node that does not know its own name means the one by which it was reached.
    https://redis.io/docs/latest/commands/cluster-slots/
    """
    facts = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    ranges: list[Range] = []
    for first, last, (host, port, *_), *_ in slots:
        name = host.decode() if host else ""
        if name != "?":
            ranges.append((first, last, RedisAddress(name or asked.host, port)))
    ranges.sort(key=lambda each: each[0])
    return ClusterView(
        epoch=int(facts.get(b"cluster_current_epoch", b"0")),
        is_well=facts.get(b"cluster_state") == b"ok",
        ranges=tuple(ranges),
    )
