"""A Redis Cluster: several masters, each with its share of the 16384 hash slots.

A batch is split by master, goes out in one write to each at once, and its answers are put together again.
What a master refuses because it does not have the slot (any more, or yet) goes where it says, within the same
deadline. Who is master of what: see ``redis_cluster_masters``.
https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import trio
from coredis.connection import TCPConnection
from coredis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from gateway.adapters.stores.redis_cluster_masters import ClusterMasters
from gateway.adapters.stores.redis_connection import IsThere, RedisConnection, ShardOf, Subscription
from gateway.adapters.stores.redis_keys import GENERATION, cluster_shards, keys_of
from gateway.adapters.stores.redis_link import (
    CALL_DEADLINE,
    Answer,
    Arrival,
    Ask,
    Command,
    raise_errors,
)
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_preparation import Preparation
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

_REDIRECT_SECONDS = 0.02
"""Before a command is tried again that a master refused because its slot is on the move."""
_REDIRECTS = (MovedError, AskError, TryAgainError, ClusterDownError)
"""What a master answers that has not carried a command out, and that another one would, or soon."""
_Unit = list[int]
"""Indices of commands that go to one server together."""


class RedisCluster(RedisConnection):
    """See the module. ``seeds``: some nodes of the cluster; one of them has to be there when it begins."""

    publish_command = b"SPUBLISH"

    def __init__(
        self,
        *,
        seeds: tuple[RedisAddress, ...],
        make: Callable[[RedisAddress], TCPConnection],
        preparation: Preparation,
        new_token: Callable[[], str],
        telemetry: Telemetry,
    ) -> None:
        super().__init__(preparation.library)
        self.shards = cluster_shards()
        self._make = make
        self._new_token = new_token
        self._telemetry = telemetry
        self._masters = ClusterMasters(
            seeds=seeds,
            shards=self.shards,
            make=make,
            preparation=preparation,
            arrive=self._arrive,
            check=self._check,
            look_after=self._doubt,
            telemetry=telemetry,
        )
        self._is_in_doubt = False
        """Whether a new generation has to begin, for what idle sessions have may be of any age."""

    # ------------------------------------------------------------------ calls

    async def batch(
        self, commands: Sequence[Command], *, large: bool = False, together: bool = False
    ) -> list[Answer]:
        """See ``RedisConnection``."""
        return await self._batch(commands, large=large, together=together)

    async def commit(self, commands: Sequence[Command]) -> list[Answer]:
        """See ``RedisConnection``."""
        return await self._batch(commands, durable=True)

    async def _batch(
        self,
        commands: Sequence[Command],
        *,
        large: bool = False,
        together: bool = False,
        durable: bool = False,
    ) -> list[Answer]:
        give_up_at = trio.current_time() + CALL_DEADLINE
        answers: list[Answer] = [None] * len(commands)
        units: list[_Unit] = [list(range(len(commands)))] if together else [[n] for n in range(len(commands))]
        where = {unit[0]: _key_of(commands, unit) for unit in units}
        asked: dict[int, RedisAddress] = {}
        while True:
            groups: dict[RedisAddress | None, list[_Unit]] = defaultdict(list)
            for unit in units:
                groups[asked.get(unit[0]) or self._masters.view.master(where[unit[0]])].append(unit)

            send = partial(
                self._send, commands, answers, asking=frozenset(asked), large=large, durable=durable
            )
            if len(groups) == 1:
                await send(*groups.popitem())
            else:
                async with trio.open_nursery() as nursery:
                    for address, group in groups.items():
                        nursery.start_soon(send, address, group)
            units, asked, has_moved = self._redirected(units, answers)
            if not units or trio.current_time() + _REDIRECT_SECONDS > give_up_at:
                return answers
            if has_moved:
                with trio.move_on_at(give_up_at):
                    await self._masters.look_again()
            if not asked:
                await trio.sleep(_REDIRECT_SECONDS)

    async def _send(
        self,
        commands: Sequence[Command],
        answers: list[Answer],
        address: RedisAddress | None,
        group: list[_Unit],
        *,
        asking: frozenset[int],
        large: bool,
        durable: bool,
    ) -> None:
        """Send some of the commands to one server, and put their answers where they belong."""
        sent: list[Command] = []
        places: list[int | None] = []
        for unit in group:
            if unit[0] in asking:
                sent.append((b"ASKING",))
                places.append(None)
            sent += [commands[index] for index in unit]
            places += unit
        try:
            link = self._masters.link(address)
            found = await link.batch(sent, large=large, durable=durable)
        except StoreUnavailable as error:
            self._masters.is_amiss()
            found = [error] * len(sent)
        for place, answer in zip(places, found, strict=True):
            if place is None:
                continue
            answers[place] = answer
            if isinstance(answer, BaseException) and not isinstance(answer, (*_REDIRECTS, StoreUnavailable)):
                answers[place] = link.unavailable(answer)
                self._masters.is_amiss()

    def _redirected(
        self, units: list[_Unit], answers: list[Answer]
    ) -> tuple[list[_Unit], dict[int, RedisAddress], bool]:
        """What has to be sent again, where some of it has to be asked for, and whether a slot has moved."""
        again: list[_Unit] = []
        asked: dict[int, RedisAddress] = {}
        has_moved = False
        for unit in units:
            for index in unit:
                match answers[index]:
                    case MovedError():
                        has_moved = True
                    case AskError(host=host, port=port):
                        here = self._masters.view.table[answers[index].slot_id]
                        asked[unit[0]] = RedisAddress(host or (here.host if here else ""), port)
                    case TryAgainError() | ClusterDownError():
                        pass
                    case _:
                        continue
                again.append(unit)
                break
        if has_moved:
            self._masters.is_amiss()
        return again, asked, has_moved

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """See ``RedisConnection``; what its links met they have logged."""
        self._masters.is_amiss()
        if isinstance(error, StoreUnavailable):
            return error
        return StoreUnavailable(
            "The session store is being rearranged. Nothing was accepted; try again.", retry_after=1
        )

    def note_works(self) -> None:
        """See ``RedisConnection``."""
        self._masters.note_works()

    def shard_of(self, session_id: str) -> ShardOf:
        """See ``RedisConnection``."""
        return self._masters.shard_of(keys_of(session_id)[0])

    @property
    def check_keys(self) -> Sequence[bytes]:
        """See ``RedisConnection``: one for each master."""
        return self._masters.check_keys

    def subscription(self, channel: bytes) -> Subscription:
        """See ``RedisConnection``."""
        address = self._masters.view.master(channel)
        if address is None:
            raise self.unavailable(ConnectionError())
        return Subscription(self._make(address), address, b"SSUBSCRIBE")

    def is_current(self, address: RedisAddress, channel: bytes) -> bool:
        """See ``RedisConnection``."""
        return self._masters.view.master(channel) == address

    async def run(self, *, task_status: trio.TaskStatus[StoreUnavailable | None]) -> None:
        """See ``RedisConnection``."""
        await self._masters.run(task_status=task_status)

    # ------------------------------------------------------------------ does it have what it had

    async def _arrive(self, address: RedisAddress, ask: Ask, arrival: Arrival) -> None:
        view = self._masters.view
        if view.master(GENERATION) == address:
            new = self._new_token()
            _, self.generation = raise_errors(
                await ask([(b"SET", GENERATION, new, b"NX"), (b"GET", GENERATION)])
            )
        await self._check(address, ask, lambda key: view.master(key) == address, arrival)

    async def _check(
        self, address: RedisAddress, ask: Ask, is_there: IsThere, arrival: Arrival | None = None
    ) -> None:
        """Put those sessions in doubt that one master should have and has less of."""
        lost = await self.check_kept(ask, is_there)
        if not lost:
            return
        took_over = arrival is None or arrival.took_over
        if took_over is None and arrival is not None:
            took_over = arrival.uptime >= self._masters.amiss_for()
        if not took_over:
            # It was restarted and may hold a copy of any age.
            self._is_in_doubt = True
            self._masters.is_amiss()
        self._telemetry.error("store_lost_data", sessions=lost, server=str(address))

    async def _doubt(self) -> None:
        """Begin a new generation if one is due."""
        if self._is_in_doubt:
            self.generation = await self.function("doubt", [GENERATION], self.generation, self._new_token())
            self._is_in_doubt = False


def _key_of(commands: Sequence[Command], unit: _Unit) -> bytes:
    """What decides where some commands go: the first key in them."""
    for index in unit:
        name, *arguments = commands[index]
        if arguments:
            return cast("bytes", arguments[2] if name == b"FCALL" else arguments[0])
    raise ValueError("none of the commands has a key")
