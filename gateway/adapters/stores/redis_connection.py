"""What the store talks to: all of Redis' masters as one, however many there are.

``redis_one_master`` is a single server, or the one that sentinels name; ``redis_cluster`` are several.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

import trio
from attrs import frozen
from coredis.connection import TCPConnection

from gateway.adapters.stores.redis_keys import SOLE_SHARD, Library, Shard, keys_of
from gateway.adapters.stores.redis_link import Answer, Argument, Ask, Command
from gateway.adapters.stores.redis_location import RedisAddress
from gateway.core.errors import StoreUnavailable

IsThere = Callable[[bytes], bool]
"""Whether a key is where somebody asks."""
CheckKept = Callable[[Ask, IsThere], Awaitable[int]]
"""Finds out, by asking one server, which sessions it has less of than was acknowledged, and puts them in
doubt; gives how many."""


@frozen
class Subscription:
    """A way to hear of what is published in a channel; nobody runs the connection yet."""

    connection: TCPConnection
    address: RedisAddress
    command: bytes
    """What subscribes."""


class ShardOf(NamedTuple):
    """Where a session is indexed."""

    shard: Shard
    is_near: bool
    """Whether that is on the same server as the session: then one write in order reaches both."""


class RedisConnection(ABC):
    """See the module. Get one from ``redis_connect``, and keep it up by ``running_connection``."""

    shards: tuple[Shard, ...] = (SOLE_SHARD,)
    """The parts that each index over sessions has."""
    publish_command = b"PUBLISH"

    def __init__(self, library: Library) -> None:
        self._library = library
        self.generation = b""
        """The generation that Redis' data is of; see ``redis_keys.GENERATION``."""
        self.check_kept: CheckKept = _nothing_to_check
        """Set by whoever knows what was acknowledged."""

    # ------------------------------------------------------------------ what differs

    @abstractmethod
    async def batch(
        self, commands: Sequence[Command], *, large: bool = False, together: bool = False
    ) -> list[Answer]:
        """Commands, in one write to each server. Raises ``StoreUnavailable`` when none of it was sent.

        After that each answer stands for itself; it is an exception where Redis refused or where no answer
        came, and then nobody knows whether it happened. Ends within ``CALL_DEADLINE``, with ``large`` as long
        as something comes all the time. Commands are in order as far as they are about one session or its
        shard; with ``together`` all go to the server of the first that has a key, and nothing comes between.
        Cancelled, the commands may still happen.
        """

    @abstractmethod
    async def commit(self, commands: Sequence[Command]) -> list[Answer]:
        """``batch`` for a group commit: answers that are no exceptions are as safe as the store is to be."""

    @abstractmethod
    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """The error to raise for what went wrong; logged when it is the first since something worked."""

    @abstractmethod
    def note_works(self) -> None:
        """A whole group commit was stored."""

    @abstractmethod
    async def run(self, *, task_status: trio.TaskStatus[StoreUnavailable | None]) -> None:
        """Keep connections up until cancelled. Started with None once they are, or with why they are not."""

    @abstractmethod
    def subscription(self, channel: bytes) -> Subscription:
        """How to subscribe to a channel, now. Raises ``StoreUnavailable``."""

    @abstractmethod
    def is_current(self, address: RedisAddress, channel: bytes) -> bool:
        """Whether a subscription made there still hears what is published."""

    def shard_of(self, session_id: str) -> ShardOf:  # noqa: ARG002 - with one server there is one shard
        """Where a session is indexed, as of now."""
        return ShardOf(SOLE_SHARD, True)

    @property
    def check_keys(self) -> Sequence[bytes]:
        """Keys to write in order to prove that everything can be written."""
        return [shard.checked for shard in self.shards]

    # ------------------------------------------------------------------ what does not

    async def call(self, *command: Argument) -> Answer:
        """One command. Raises ``StoreUnavailable``, for an error that Redis answers too.

        Cancelled, the command may still happen.
        """
        (answer,) = await self.all_of([command])
        return answer

    async def all_of(self, commands: Sequence[Command]) -> list[Answer]:
        """``batch``, and each command has to work. Raises ``StoreUnavailable``."""
        answers = await self.batch(commands)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise self.unavailable(answer) from answer
        return answers

    async def function(self, name: str, keys: Sequence[bytes], *arguments: Argument) -> Answer:
        """Call one of the library's functions. Raises ``StoreUnavailable``."""
        return await self.call(*self.function_call(name, keys, arguments))

    async def each(self, name: str, session_ids: Sequence[str], *arguments: Argument) -> list[Answer]:
        """Call a function for each of some sessions, in one write. Raises ``StoreUnavailable``."""
        return await self.all_of([self.function_call(name, keys_of(each), arguments) for each in session_ids])

    def function_call(self, name: str, keys: Sequence[bytes], arguments: Sequence[Argument]) -> Command:
        """The command that calls a function."""
        return (b"FCALL", self._library.function(name), len(keys), *keys, *arguments)


async def _nothing_to_check(ask: Ask, is_there: IsThere) -> int:  # noqa: ARG001
    return 0


@asynccontextmanager
async def running_connection(connection: RedisConnection) -> AsyncIterator[None]:
    """Keep ``connection`` up inside the block. Entering raises ``StoreUnavailable`` if Redis is not there."""
    failure: Exception | None = None
    with _own_log_only():
        async with trio.open_nursery() as nursery:
            failure = await nursery.start(connection.run)
            if failure is None:
                try:
                    yield
                except Exception as error:
                    # Through the nursery it would come out as a group.
                    failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@contextmanager
def _own_log_only() -> Iterator[None]:
    """coredis logs each failed attempt with a traceback, many a second; ours says once that Redis is away."""
    logger = logging.getLogger("coredis")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled
