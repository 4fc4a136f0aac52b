"""A Redis in which one server at a time is the master: a single one, or the one that sentinels name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio
from coredis.connection import TCPConnection

from gateway.adapters.stores.redis_connection import RedisConnection, Subscription
from gateway.adapters.stores.redis_keys import COMMITS, GENERATION
from gateway.adapters.stores.redis_link import TROUBLE, Answer, Arrival, Ask, Command, RedisLink, raise_errors
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_preparation import Preparation
from gateway.adapters.stores.redis_sentinel import RedisSentinels
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry


class OneMaster(RedisConnection):
    """See the module. ``sentinels``: who says which server is the master, or its address."""

    def __init__(
        self,
        *,
        master: RedisSentinels | RedisAddress,
        make: Callable[[RedisAddress], TCPConnection],
        preparation: Preparation,
        new_token: Callable[[], str],
        telemetry: Telemetry,
    ) -> None:
        super().__init__(preparation.library)
        self._master = master
        self._make = make
        self._new_token = new_token
        self._telemetry = telemetry
        self._highest_count = 0
        """The highest count of commits that Redis has answered."""
        self._link = RedisLink(
            find=self._find, make=make, preparation=preparation, arrive=self._arrive, telemetry=telemetry
        )

    async def _find(self) -> RedisAddress:
        return self._master if isinstance(self._master, RedisAddress) else await self._master.find()

    async def batch(
        self,
        commands: Sequence[Command],
        *,
        large: bool = False,
        together: bool = False,  # noqa: ARG002
    ) -> list[Answer]:
        """See ``RedisConnection``."""
        return await self._link.batch(commands, large=large)

    async def commit(self, commands: Sequence[Command]) -> list[Answer]:
        """See ``RedisConnection``."""
        seen = self._highest_count
        *answers, count = await self._link.batch([*commands, (b"INCR", COMMITS)], durable=True)
        if not isinstance(count, BaseException):
            try:
                if count - 1 < seen:
                    await self._doubt(self._link.batch, seen, count - 1)
            except (*TROUBLE, StoreUnavailable) as error:
                count = error
            else:
                self._highest_count = max(self._highest_count, count)
        return [count] * len(commands) if isinstance(count, BaseException) else answers

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """See ``RedisConnection``."""
        return self._link.unavailable(error)

    def note_works(self) -> None:
        """See ``RedisConnection``."""
        self._link.note_works()

    async def run(self, *, task_status: trio.TaskStatus[StoreUnavailable | None]) -> None:
        """See ``RedisConnection``."""
        async with trio.open_nursery() as nursery:
            failure = await nursery.start(self._link.run)
            if failure is None and isinstance(self._master, RedisSentinels):
                nursery.start_soon(self._master.watch, self._link)
            task_status.started(failure)

    def subscription(self, channel: bytes) -> Subscription:  # noqa: ARG002
        """See ``RedisConnection``."""
        if self._link.address is None or not self._link.is_up:
            raise self._link.unavailable(ConnectionError())
        return Subscription(self._make(self._link.address), self._link.address, b"SUBSCRIBE")

    def is_current(self, address: RedisAddress, channel: bytes) -> bool:  # noqa: ARG002
        """See ``RedisConnection``."""
        return address == self._link.address

    # ------------------------------------------------------------------ does it have what it had

    async def _arrive(self, ask: Ask, arrival: Arrival) -> None:
        _, generation, count = raise_errors(
            await ask(
                [(b"SET", GENERATION, self._new_token(), b"NX"), (b"GET", GENERATION), (b"GET", COMMITS)]
            )
        )
        self.generation = generation
        sessions = await self.check_kept(ask, lambda _: True)
        count, seen = int(count or 0), self._highest_count
        if not sessions and count >= seen:
            return
        if not arrival.took_over:
            await self._doubt(ask, seen, count, sessions)
            return
        # A replica has all but the newest: only those sessions are in doubt of which that was acknowledged.
        # Other gateways look after theirs.
        self._highest_count = count
        self._telemetry.error("store_lost_data", commits=max(0, seen - count), sessions=sessions)

    async def _doubt(self, ask: Ask, seen: int, count: int, sessions: int = 0) -> None:
        """Redis counts fewer commits than were seen: it lost some, so begin a new generation."""
        command = self.function_call("doubt", [GENERATION], [self.generation, self._new_token()])
        (self.generation,) = raise_errors(await ask([command]))
        self._highest_count = count
        self._telemetry.error("store_lost_data", commits=max(0, seen - count), sessions=sessions)
