"""The one connection to Redis that a gateway's store has, kept up by a task of its own.

    store's nursery
    └── keeper            connect, prepare, wait until it is lost, again
        └── connection    coredis: one writer, one reader

All commands of all sessions go through it, in order, as pipelines. coredis' pool is not used: a call that is
cancelled while it opens a connection leaks one of the pool's slots, and once they are gone every call hangs
for good. Here a cancelled call only stops waiting for its answer, and nobody but the keeper ever connects.

Resource handling: ``running_connection`` owns the keeper. Error handling: whatever Redis or the network does
becomes ``StoreUnavailable``, said once in the log until it works again.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import trio
from attrs import frozen
from coredis.connection import TCPConnection, TCPLocation
from coredis.exceptions import RedisError

from gateway.adapters.stores.redis_keys import COMMITS, GENERATION, Library, keys_of
from gateway.adapters.stores.redis_location import RedisLocation
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

if TYPE_CHECKING:
    from coredis.commands import CommandRequest

CALL_DEADLINE = 0.9
"""Seconds after which a call gives up: the promise to clients is an answer within 1 s."""
CONNECT_DEADLINE = 0.5
"""Seconds for TCP and TLS, and again for each answer of the handshake: a stuck Redis must not keep us from
noticing for long that it goes on."""
_RECONNECT_FIRST = 0.05
_RECONNECT_MOST = 0.5
_OLDEST_VERSION = (7, 0)
_WAITAOF_VERSION = (7, 2)

Argument = bytes | str | int | float
Answer = Any
"""What Redis answered; an exception instance when that was an error."""
TROUBLE = (RedisError, TimeoutError, OSError, anyio.ClosedResourceError, anyio.BrokenResourceError)
"""What coredis raises when Redis, or the way to it, fails."""


@frozen
class _Command:
    """A command as a pipeline takes it: coredis' own request object costs 15 µs for each."""

    name: bytes
    serialized_arguments: tuple[Argument, ...]
    decode: bool = False


class RedisConnection:
    """See the module. Get one from ``running_connection``."""

    def __init__(
        self,
        location: RedisLocation,
        *,
        library: Library,
        full_sync: bool,
        new_token: Callable[[], str],
        telemetry: Telemetry,
    ) -> None:
        self._location = location
        self._library = library
        self._full_sync = full_sync
        self._new_token = new_token
        self._telemetry = telemetry
        self._tls = ssl.create_default_context() if location.tls else None
        self._connection: TCPConnection | None = None
        self._connected = trio.Event()
        self._away: str | None = "The session store is not open."
        """Set once an attempt to connect has failed: then calls do not wait for the next."""
        self._waits_for_disk = False
        self._highest_count = 0
        self.generation = b""
        """The generation that Redis' data is of; see ``redis_keys.GENERATION``."""

    # ------------------------------------------------------------------ calls

    async def call(self, *command: Argument) -> Answer:
        """One command. Raises ``StoreUnavailable``, for an error that Redis answers too.

        Cancelled, the command may still happen.
        """
        (answer,) = await self.batch([command])
        if isinstance(answer, BaseException):
            raise self.unavailable(answer) from answer
        return answer

    async def batch(self, commands: Sequence[tuple[Argument, ...]], *, large: bool = False) -> list[Answer]:
        """Commands in one write. Raises ``StoreUnavailable`` when none of it was sent.

        After that each answer stands for itself; it is an exception where Redis refused or where no answer
        came, and then nobody knows whether it happened. Ends within ``CALL_DEADLINE``, with ``large`` as long
        as something comes all the time. Cancelled, the commands may still happen.
        """
        give_up_at = trio.current_time() + CALL_DEADLINE
        connection = await self._wait_connected(give_up_at)
        requests = [_Command(cast("bytes", name), tuple(arguments)) for name, *arguments in commands]
        try:
            request = connection.create_request_batch(cast("list[CommandRequest[Any]]", requests))
        except TROUBLE as error:
            raise self.unavailable(error) from error
        # A caller that is cancelled must not take the connection from all others; the deadline is ours.
        request.disconnect_on_cancellation = False
        request.response_timeout = None
        while True:
            received = connection.statistics.bytes_read
            with trio.CancelScope(deadline=give_up_at):
                return await request
            if not large or connection.statistics.bytes_read == received:
                break
            give_up_at = trio.current_time() + CALL_DEADLINE
        connection.invalidate("no answer in time")
        silence = TimeoutError()
        self.unavailable(silence)
        return [silence] * len(commands)

    async def function(self, name: str, keys: Sequence[bytes], *arguments: Argument) -> Answer:
        """Call one of the library's functions. Raises ``StoreUnavailable``."""
        return await self.call(*self.function_call(name, keys, arguments))

    async def each(self, name: str, session_ids: Sequence[str], *arguments: Argument) -> list[Answer]:
        """Call a function for each of some sessions, in one write. Raises ``StoreUnavailable``."""
        answers = await self.batch(
            [self.function_call(name, keys_of(each), arguments) for each in session_ids]
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise self.unavailable(answer) from answer
        return answers

    def function_call(
        self, name: str, keys: Sequence[bytes], arguments: Sequence[Argument]
    ) -> tuple[Argument, ...]:
        """The command that calls a function."""
        return (b"FCALL", self._library.function(name), len(keys), *keys, *arguments)

    def commit_tail(self) -> list[tuple[Argument, ...]]:
        """What goes behind the last command of a group commit; give its answers to ``note_commit``."""
        tail: list[tuple[Argument, ...]] = [(b"INCR", COMMITS)]
        if self._waits_for_disk:
            tail.append((b"WAITAOF", 1, 0, int(CALL_DEADLINE * 800)))
        return tail

    @property
    def highest_count(self) -> int:
        """The highest count of commits that Redis has answered."""
        return self._highest_count

    async def note_commit(self, answers: Sequence[Answer], seen: int) -> None:
        """Check the answers to ``commit_tail``; ``seen`` is what ``highest_count`` was when it was sent.

        Raises ``StoreUnavailable``: whether the commit is stored is unknown.
        """
        for answer in answers:
            if isinstance(answer, BaseException):
                raise self.unavailable(answer) from answer
        if len(answers) > 1 and answers[1][0] < 1:
            raise self.unavailable(TimeoutError("the disk"))
        await self._compare_count(answers[0] - 1, seen)
        self._highest_count = max(self._highest_count, answers[0])
        self._note_works()

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """The error to raise for what went wrong; logged when it is the first since something worked."""
        match error:
            case TimeoutError():
                what = "does not answer in time"
            case RedisError() if str(error).startswith(("OOM", "MISCONF", "READONLY", "NOREPLICAS")):
                what = "refuses to write"
            case RedisError() if "unction" in str(error):
                # Somebody flushed the functions; they are loaded again when the connection is made.
                what = "was emptied"
                if self._connection is not None:
                    self._connection.invalidate("functions are missing")
            case _:
                what = "is not reachable"
        unavailable = StoreUnavailable(
            f"The session store {what}. Nothing was accepted; try again.", retry_after=1
        )
        if self._away is None:
            self._away = unavailable.message
            self._telemetry.error("store_failing", cause=error)
        return unavailable

    def _note_works(self) -> None:
        if self._away is not None:
            self._away = None
            self._telemetry.info("store_recovered")

    async def _wait_connected(self, give_up_at: float) -> TCPConnection:
        while True:
            connection = self._connection
            if connection is not None and connection.usable:
                return connection
            if self._away is not None:
                # Whoever tries again and again must not keep the others from running.
                await trio.lowlevel.checkpoint()
                raise StoreUnavailable(self._away, retry_after=1)
            with trio.CancelScope(deadline=give_up_at):
                await self._connected.wait()
                await trio.lowlevel.checkpoint()
                continue
            raise self.unavailable(TimeoutError())

    # ------------------------------------------------------------------ the keeper

    async def run(self, *, task_status: trio.TaskStatus[StoreUnavailable | None]) -> None:
        """Keep the connection up until cancelled. Started with None once it is; or with why it cannot be."""
        is_first, delay = True, _RECONNECT_FIRST
        async with trio.open_nursery() as nursery:
            while True:
                connection, lost = self.make(), trio.Event()
                try:
                    await nursery.start(run_until_lost, connection, lost)
                    await self._prepare(connection)
                    self._connection = connection
                    self._connected.set()
                    self._away_over(is_first)
                    if is_first:
                        is_first = False
                        task_status.started(None)
                    delay = _RECONNECT_FIRST
                    await lost.wait()
                except (*TROUBLE, StoreUnavailable) as error:
                    # coredis makes an error of a cancellation that strikes while it connects.
                    await trio.lowlevel.checkpoint_if_cancelled()
                    if is_first:
                        task_status.started(self._cannot_open(error))
                        return
                    self.unavailable(error)
                finally:
                    self._connection = None
                    self._connected = trio.Event()
                    connection.invalidate("over")
                    close_buffers(connection)
                await trio.sleep(delay)
                delay = min(_RECONNECT_MOST, delay * 2)

    def _away_over(self, is_first: bool) -> None:
        if is_first:
            self._away = None
        else:
            self._note_works()

    def make(self) -> TCPConnection:
        """A connection that nobody runs yet, to the same Redis; ``close_buffers`` when it is over."""
        location = self._location
        return TCPConnection(
            TCPLocation(location.host, location.port),
            connect_timeout=CONNECT_DEADLINE,
            stream_timeout=CONNECT_DEADLINE,
            db=location.database,
            username=location.username,
            password=location.password,
            ssl_context=self._tls,
            client_name="gateway",
        )

    def _cannot_open(self, error: BaseException) -> StoreUnavailable:
        if isinstance(error, StoreUnavailable):
            return error
        reason = str(error.__cause__ or error) or type(error).__name__
        return StoreUnavailable(f"The session store in Redis cannot be opened: {reason}")

    async def _prepare(self, connection: TCPConnection) -> None:
        """Make a fresh connection fit for use, and find out whether Redis still has what it had."""
        await connection.create_request(b"PING")
        version = tuple(int(part) for part in (connection.server_version or "0").split(".")[:2])
        if version < _OLDEST_VERSION:
            raise StoreUnavailable(
                f"The session store needs Redis 7.0 or newer; this one is {connection.server_version}."
            )
        if self._full_sync:
            self._waits_for_disk = await self._must_wait_for_disk(connection, version)
        try:
            await connection.create_request(b"FUNCTION LOAD", self._library.code)
        except RedisError as error:
            if "already exists" not in str(error):
                raise
        await connection.create_request(b"SET", GENERATION, self._new_token(), b"NX")
        generation = await connection.create_request(b"GET", GENERATION)
        self.generation = cast("bytes", generation)
        count = await connection.create_request(b"GET", COMMITS)
        await self._compare_count(int(cast("bytes", count or b"0")), self._highest_count, connection)

    async def _must_wait_for_disk(self, connection: TCPConnection, version: tuple[int, ...]) -> bool:
        """Whether each commit has to ask for the disk. Raises ``StoreUnavailable`` when it could not."""
        reply = cast("dict[bytes, bytes]", await connection.create_request(b"CONFIG GET", b"append*"))
        if reply.get(b"appendonly") != b"yes":
            raise StoreUnavailable(
                "STORE_SYNC=full needs a Redis that keeps a log: set appendonly yes in it."
            )
        if reply.get(b"appendfsync") == b"always":
            return False
        if version < _WAITAOF_VERSION:
            raise StoreUnavailable("STORE_SYNC=full needs appendfsync always, or Redis 7.2 or newer.")
        return True

    async def _compare_count(self, count: int, seen: int, connection: TCPConnection | None = None) -> None:
        """Redis counts fewer commits than were seen: it lost some, so begin a new generation."""
        connection = connection or self._connection
        if count >= seen or connection is None:
            return
        lost, self._highest_count = seen - count, count
        name, *arguments = self.function_call("doubt", [GENERATION], [self.generation, self._new_token()])
        self.generation = cast("bytes", await connection.create_request(cast("bytes", name), *arguments))
        self._telemetry.error("store_lost_data", commits=lost)


async def run_until_lost(
    connection: TCPConnection, lost: trio.Event, *, task_status: trio.TaskStatus[None]
) -> None:
    """Run a connection, and set ``lost`` when it is over. Started when it is up; raises ``TROUBLE`` else."""
    try:
        await connection.run(task_status=task_status)
    finally:
        lost.set()


def close_buffers(connection: TCPConnection) -> None:
    """coredis leaves these open when it could not connect, and Python warns of it."""
    for buffer in (
        connection._write_buffer_in,
        connection._write_buffer_out,
        connection._push_message_buffer_in,
        connection._push_message_buffer_out,
        connection._streamed_message_buffer_in,
        connection._streamed_message_buffer_out,
    ):
        buffer.close()


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
