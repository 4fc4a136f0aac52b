"""Asking sentinels which server is the master, and noticing when that changes.

A sentinel that was cut off from the others goes on naming the old master. So all are asked at once, and the
one with the highest configuration epoch is believed; each failover raises it.
https://redis.io/docs/latest/develop/reference/sentinel-clients/
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import trio
from coredis.connection import TCPConnection

from gateway.adapters.stores.redis_link import TROUBLE, RedisLink, ask_once
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.core.errors import StoreUnavailable

_WATCH_SECONDS = 1.0
"""Between two questions: for so long a gateway that still reaches the old master goes on with it."""


class _Opinion(NamedTuple):
    epoch: int
    master: RedisAddress


class RedisSentinels:
    """See the module."""

    def __init__(
        self, addresses: tuple[RedisAddress, ...], service: str, make: Callable[[RedisAddress], TCPConnection]
    ) -> None:
        self._addresses = addresses
        self._service = service
        self._make = make

    async def find(self) -> RedisAddress:
        """The master's address. Raises ``StoreUnavailable``."""
        opinions: list[_Opinion] = []
        failures: dict[RedisAddress, BaseException] = {}

        async def hear(sentinel: RedisAddress) -> None:
            try:
                opinions.append(await self._ask(sentinel))
            except TROUBLE as error:
                await trio.lowlevel.checkpoint_if_cancelled()
                failures[sentinel] = error

        async with trio.open_nursery() as nursery:
            for sentinel in self._addresses:
                nursery.start_soon(hear, sentinel)
        if not opinions:
            raise StoreUnavailable(
                f"The session store cannot be reached: no sentinel names the master of {self._service!r}. "
                + " · ".join(f"{sentinel}: {_reason(error)}" for sentinel, error in failures.items()),
                retry_after=1,
            )
        return max(opinions, key=lambda opinion: opinion.epoch).master

    async def watch(self, link: RedisLink) -> None:
        """Cut the link to a master that is none any more, until cancelled.

        Redis itself cuts the clients of a master that a sentinel demotes; not those of one that no sentinel
        reaches.
        """
        for sentinel in itertools.cycle(self._addresses):
            await trio.sleep(_WATCH_SECONDS)
            if not link.is_up:
                continue
            try:
                opinion = await self._ask(sentinel)
                # Only one of them: it may be the one that is behind.
                if opinion.master != link.address and await self.find() != link.address:
                    link.cut("another one is the master")
            except (*TROUBLE, StoreUnavailable):
                await trio.lowlevel.checkpoint_if_cancelled()

    async def _ask(self, sentinel: RedisAddress) -> _Opinion:
        service = self._service.encode()
        address, facts = await ask_once(
            self._make(sentinel),
            [(b"SENTINEL GET-MASTER-ADDR-BY-NAME", service), (b"SENTINEL MASTER", service)],
        )
        host, port = address
        return _Opinion(int(_pairs(facts)[b"config-epoch"]), RedisAddress(host.decode(), int(port)))


def _pairs(facts: Any) -> dict[bytes, bytes]:
    if isinstance(facts, dict):
        return facts
    return dict(zip(facts[::2], facts[1::2], strict=True))


def _reason(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__
