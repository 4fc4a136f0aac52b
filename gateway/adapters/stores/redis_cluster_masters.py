"""The masters of a Redis Cluster: a link to each, and who is master of which slot.

    store's nursery
    └── cluster           once a second, and when something is amiss: who is master of which slot?
        └── link … link   one per master; see ``redis_link``

Nodes are believed by their configuration epochs: one that was cut off from the others goes on believing in
itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from attrs import define, field
from coredis.connection import TCPConnection

from gateway.adapters.stores.redis_cluster_view import NOTHING_SEEN, ClusterView, newest, view_from
from gateway.adapters.stores.redis_connection import IsThere, ShardOf
from gateway.adapters.stores.redis_keys import SLOTS, Shard, slot_of
from gateway.adapters.stores.redis_link import (
    CALL_DEADLINE,
    TROUBLE,
    Arrival,
    Ask,
    Command,
    RedisLink,
    ask_once,
    cannot_open,
    raise_errors,
)
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_preparation import Preparation
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

_LOOK_SECONDS = 1.0
"""Between two looks at who is master of what."""
_LOOK_AGAIN_SECONDS = 0.1
"""The same while something is amiss."""


@define
class _Master:
    link: RedisLink
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    needed_until: float = 0.0
    """Kept until then even if it is master of nothing: slots are on their way to it."""


class ClusterMasters:
    """See the module.

    ``arrive`` is called with each fresh connection; ``check`` before a master that is connected already is
    relied on for more keys than before; ``look_after`` after each look.
    """

    def __init__(
        self,
        *,
        seeds: tuple[RedisAddress, ...],
        shards: Sequence[Shard],
        make: Callable[[RedisAddress], TCPConnection],
        preparation: Preparation,
        arrive: Callable[[RedisAddress, Ask, Arrival], Awaitable[None]],
        check: Callable[[RedisAddress, Ask, IsThere, None], Awaitable[None]],
        look_after: Callable[[], Awaitable[None]],
        telemetry: Telemetry,
    ) -> None:
        self._seeds = seeds
        self._shards = shards
        self._make = make
        self._preparation = preparation
        self._arrive = arrive
        self._check = check
        self._look_after = look_after
        self._telemetry = telemetry
        self._masters: dict[RedisAddress, _Master] = {}
        self._near: dict[RedisAddress, Shard] = {}
        """By master a shard that it has."""
        self._nursery: trio.Nursery
        self._amiss = trio.Event()
        """Set when it is time for another look."""
        self._amiss_since: float | None = None
        self._looked = trio.Event()
        """Set by the next look."""
        self.view = NOTHING_SEEN
        """As of the last look."""

    def link(self, address: RedisAddress | None) -> RedisLink:
        """The link to a server that is a master, or is about to be. Raises ``StoreUnavailable`` for None."""
        if address is None:
            self._amiss.set()
            raise StoreUnavailable(
                "No server of the session store has what belongs to this session. Nothing was accepted; try "
                "again.",
                retry_after=1,
            )
        if address not in self._masters:
            # Slots are on their way to it.
            master = self._add(address)
            master.needed_until = trio.current_time() + 10 * _LOOK_SECONDS
            self._nursery.start_soon(self._keep, master)
        return self._masters[address].link

    def shard_of(self, key: bytes) -> ShardOf:
        """Where the session with that key is indexed, as of now."""
        slot = slot_of(key)
        address = self.view.table[slot]
        near = None if address is None else self._near.get(address)
        return ShardOf(near or self._shards[slot * len(self._shards) // SLOTS], near is not None)

    @property
    def check_keys(self) -> Sequence[bytes]:
        """A key on each master."""
        return [shard.checked for shard in self._near.values()]

    def note_works(self) -> None:
        """What is connected works."""
        for master in self._masters.values():
            if master.link.is_up:
                master.link.note_works()

    def is_amiss(self) -> None:
        """Something is not as it was when it was last looked: look soon."""
        self._amiss.set()

    def amiss_for(self) -> float:
        """Seconds, at most, since all masters were last heard of."""
        return 0.0 if self._amiss_since is None else trio.current_time() - self._amiss_since + CALL_DEADLINE

    async def run(self, *, task_status: trio.TaskStatus[StoreUnavailable | None]) -> None:
        """Keep the links up until cancelled. Started with None once they are; or with why they cannot be."""
        async with trio.open_nursery() as self._nursery:
            failure = await self._begin()
            task_status.started(failure)
            if failure is None:
                await self._watch()
            self._nursery.cancel_scope.cancel()

    async def _begin(self) -> StoreUnavailable | None:
        try:
            view = await self._see()
        except (*TROUBLE, StoreUnavailable) as error:
            await trio.lowlevel.checkpoint_if_cancelled()
            return cannot_open(error)
        if None in view.table:
            return StoreUnavailable(
                "The session store cannot be opened: the Redis Cluster is not complete, some of its slots "
                "have no master. See redis-cli --cluster check."
            )
        self._take(view)
        for address in view.addresses:
            failure: StoreUnavailable | None = await self._nursery.start(self._keep, self._add(address))
            if failure is not None:
                return failure
        return None

    async def _watch(self) -> None:
        while True:
            is_settled = all(master.link.is_up for master in self._masters.values())
            if is_settled:
                self._amiss_since = None
            elif self._amiss_since is None:
                self._amiss_since = trio.current_time()
            with trio.move_on_after(_LOOK_SECONDS if is_settled else _LOOK_AGAIN_SECONDS):
                await self._amiss.wait()
            self._amiss = trio.Event()
            try:
                await self._look()
            except (*TROUBLE, StoreUnavailable):
                await trio.lowlevel.checkpoint_if_cancelled()
            looked, self._looked = self._looked, trio.Event()
            looked.set()

    async def look_again(self) -> None:
        """Wait until it was seen anew who is master of what."""
        self._amiss.set()
        await self._looked.wait()

    async def _look(self) -> None:
        """See who is master of what, and act on it. Raises ``TROUBLE`` and ``StoreUnavailable``."""
        view = await self._see()
        if view.ranges != self.view.ranges:
            before = self.view
            for address in view.addresses:
                master = self._masters.get(address)
                if master is not None and master.link.is_up:
                    # Before anybody relies on it: it may have followed one that had more.
                    await self._check(address, master.link.batch, view.gained(address, before), None)
            self._take(view)
            for address in view.addresses:
                if address not in self._masters:
                    self._nursery.start_soon(self._keep, self._add(address))
        now = trio.current_time()
        for address, master in list(self._masters.items()):
            if address not in view.addresses and master.needed_until < now:
                del self._masters[address]
                master.scope.cancel()
        await self._look_after()

    async def _see(self) -> ClusterView:
        """What the best informed of the nodes that answer says. Raises ``TROUBLE``, ``StoreUnavailable``."""
        views: list[ClusterView] = []
        failures: list[Exception] = []
        question: list[Command] = [(b"CLUSTER INFO",), (b"CLUSTER SLOTS",)]

        async def hear(address: RedisAddress, link: RedisLink | None) -> None:
            try:
                if link is None:
                    info, slots = await ask_once(self._make(address), question)
                else:
                    info, slots = raise_errors(await link.batch(question))
                views.append(view_from(address, info, slots))
            except (*TROUBLE, StoreUnavailable) as error:
                await trio.lowlevel.checkpoint_if_cancelled()
                failures.append(error)

        async with trio.open_nursery() as nursery:
            up = [(address, each.link) for address, each in self._masters.items() if each.link.is_up]
            for address, link in up:
                nursery.start_soon(hear, address, link)
            if not up:
                for address in {*self._seeds, *self.view.addresses}:
                    nursery.start_soon(hear, address, None)
        if not views:
            raise failures[0]
        return newest(views)

    def _take(self, view: ClusterView) -> None:
        self.view = view
        self._near = {}
        for shard in self._shards:
            address = view.master(shard.checked)
            if address is not None:
                self._near.setdefault(address, shard)

    def _add(self, address: RedisAddress) -> _Master:
        async def find() -> RedisAddress:
            return address

        async def arrive(ask: Ask, arrival: Arrival) -> None:
            await self._arrive(address, ask, arrival)

        link = RedisLink(
            find=find,
            make=self._make,
            preparation=self._preparation,
            arrive=arrive,
            telemetry=self._telemetry,
        )
        self._masters[address] = _Master(link)
        return self._masters[address]

    async def _keep(
        self,
        master: _Master,
        *,
        task_status: trio.TaskStatus[StoreUnavailable | None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        is_patient = task_status is trio.TASK_STATUS_IGNORED
        with master.scope:
            await master.link.run(patient=is_patient, task_status=task_status)
