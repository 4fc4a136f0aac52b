"""One connection to one Redis, kept up by a task of its own.

    store's nursery
    └── keeper            find the server, connect, prepare, wait until it is lost, again
        └── connection    coredis: one writer, one reader

All commands to that server go through it, in order, as pipelines. coredis' pool is not used: a call that is
cancelled while it opens a connection leaks one of the pool's slots, and once they are gone every call hangs
for good. Here a cancelled call only stops waiting for its answer, and nobody but the keeper ever connects.

Error handling: whatever Redis or the network does becomes ``StoreUnavailable``, said once in the log until it
works again.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import anyio
import trio
from attrs import frozen
from coredis.connection import TCPConnection, TCPLocation
from coredis.exceptions import ReadOnlyError, RedisError

from gateway.adapters.stores.redis_location import RedisAddress
from gateway.adapters.stores.redis_preparation import Preparation, ServerFacts
from gateway.core.errors import StoreUnavailable
from gateway.ports import Telemetry

if TYPE_CHECKING:
    from coredis.commands import CommandRequest
    from coredis.connection._request import RequestBatch

CALL_DEADLINE = 0.9
"""Seconds after which a call gives up: the promise to clients is an answer within 1 s."""
CONNECT_DEADLINE = 0.5
"""Seconds for TCP and TLS, and again for each answer of the handshake: a stuck Redis must not keep us from
noticing for long that it goes on."""
_RECONNECT_FIRST = 0.05
_RECONNECT_MOST = 0.5

Argument = bytes | str | int | float
Command = tuple[Argument, ...]
Answer = Any
"""What Redis answered; an exception instance when that was an error."""
Ask = Callable[[Sequence[Command]], Awaitable[list[Answer]]]
"""Sends commands in one write and gives their answers."""
TROUBLE = (RedisError, TimeoutError, OSError, anyio.ClosedResourceError, anyio.BrokenResourceError)
"""What coredis raises when Redis, or the way to it, fails."""


class Arrival(NamedTuple):
    """What is known of a server that was just connected to."""

    uptime: float
    """Seconds that its process has run for."""
    took_over: bool | None
    """Whether it follows another one that a connection was had to, and ran while that one did. So what it
    lacks is only the newest of what that one had; one that was restarted may hold a copy of any age. None:
    this is the first one that was connected to."""


Arrive = Callable[[Ask, Arrival], Awaitable[None]]
"""Finds out, on a fresh connection, whether Redis has what it had."""


@frozen
class _Command:
    """A command as a pipeline takes it: coredis' own request object costs 15 µs for each."""

    name: bytes
    serialized_arguments: tuple[Argument, ...]
    decode: bool = False


def pipeline(connection: TCPConnection, commands: Sequence[Command]) -> RequestBatch:
    """Send commands in one write; await the result for their answers. Raises ``TROUBLE``."""
    requests = [_Command(cast("bytes", name), tuple(arguments)) for name, *arguments in commands]
    return connection.create_request_batch(cast("list[CommandRequest[Any]]", requests))


class RedisLink:
    """See the module. ``arrive`` is called with each fresh connection before anybody else can use it."""

    def __init__(
        self,
        *,
        find: Callable[[], Awaitable[RedisAddress]],
        make: Callable[[RedisAddress], TCPConnection],
        preparation: Preparation,
        arrive: Arrive,
        telemetry: Telemetry,
    ) -> None:
        self._find = find
        self._make = make
        self._preparation = preparation
        self._arrive = arrive
        self._telemetry = telemetry
        self._connection: TCPConnection | None = None
        self._connected = trio.Event()
        self._away: str | None = None
        """Set once an attempt to connect has failed: then calls do not wait for the next."""
        self._facts: ServerFacts | None = None
        self._lost_at = 0.0
        self.address: RedisAddress | None = None
        """Of the server that it is connected to, or was last."""

    @property
    def is_up(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None and self._connection.usable

    # ------------------------------------------------------------------ calls

    async def batch(
        self, commands: Sequence[Command], *, large: bool = False, durable: bool = False
    ) -> list[Answer]:
        """Commands in one write. Raises ``StoreUnavailable`` when none of it was sent.

        After that each answer stands for itself; it is an exception where Redis refused or where no answer
        came, and then nobody knows whether it happened. With ``durable`` all are exceptions unless they are
        as safe as the store is to be. Ends within ``CALL_DEADLINE``, with ``large`` as long as something
        comes all the time. Cancelled, the commands may still happen.
        """
        give_up_at = trio.current_time() + CALL_DEADLINE
        connection = await self._wait_connected(give_up_at)
        waits_for_disk = durable and self._facts is not None and self._facts.waits_for_disk
        if waits_for_disk:
            commands = [*commands, (b"WAITAOF", 1, 0, int(CALL_DEADLINE * 800))]
        try:
            request = pipeline(connection, commands)
        except TROUBLE as error:
            raise self.unavailable(error) from error
        # A caller that is cancelled must not take the connection from all others; the deadline is ours.
        request.disconnect_on_cancellation = False
        request.response_timeout = None
        while True:
            received = connection.statistics.bytes_read
            with trio.CancelScope(deadline=give_up_at):
                answers: list[Answer] = await request
                return _with_disk(answers) if waits_for_disk else answers
            if not large or connection.statistics.bytes_read == received:
                break
            give_up_at = trio.current_time() + CALL_DEADLINE
        connection.invalidate("no answer in time")
        silence = TimeoutError()
        self.unavailable(silence)
        return [silence] * (len(commands) - waits_for_disk)

    def cut(self, reason: str) -> None:
        """Give the connection up: the keeper finds the server anew."""
        if self._connection is not None:
            self._connection.invalidate(reason)

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """The error to raise for what went wrong; logged when it is the first since something worked."""
        what = "is not reachable"
        match error:
            case TimeoutError():
                what = "does not answer in time"
            case ReadOnlyError():
                what = "refuses to write"
                # It is a replica by now: somebody else is the master.
                self.cut("not the master any more")
            case RedisError() if str(error).startswith(("OOM", "MISCONF", "NOREPLICAS")):
                what = "refuses to write"
            case RedisError() if "unction" in str(error):
                # Somebody flushed the functions; they are loaded again when the connection is made.
                what = "was emptied"
                self.cut("functions are missing")
        unavailable = error
        if not isinstance(unavailable, StoreUnavailable):
            unavailable = StoreUnavailable(
                f"The session store {what}. Nothing was accepted; try again.", retry_after=1
            )
        if self._away is None:
            self._away = unavailable.message
            self._telemetry.error("store_failing", cause=error, server=str(self.address))
        return unavailable

    def note_works(self) -> None:
        """Something worked; said in the log when it is the first since something went wrong."""
        if self._away is not None:
            self._away = None
            self._telemetry.info("store_recovered", server=str(self.address))

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

    async def run(
        self, *, patient: bool = False, task_status: trio.TaskStatus[StoreUnavailable | None]
    ) -> None:
        """Keep the connection up until cancelled. Started with None once it is; or with why it cannot be.

        A ``patient`` one goes on trying in that case, another one returns.
        """
        is_first, delay = True, _RECONNECT_FIRST
        async with trio.open_nursery() as nursery:
            while True:
                connection, lost = None, trio.Event()
                try:
                    self.address = await self._find()
                    connection = self._make(self.address)
                    await nursery.start(run_until_lost, connection, lost)
                    await self._prepare(connection)
                    self._connection = connection
                    self._connected.set()
                    if is_first:
                        is_first, self._away = False, None
                        task_status.started(None)
                    self.note_works()
                    delay = _RECONNECT_FIRST
                    await lost.wait()
                except (*TROUBLE, StoreUnavailable) as error:
                    # coredis makes an error of a cancellation that strikes while it connects.
                    await trio.lowlevel.checkpoint_if_cancelled()
                    if is_first:
                        is_first = False
                        task_status.started(cannot_open(error))
                        if not patient:
                            return
                    self.unavailable(error)
                finally:
                    if self._connection is not None:
                        self._lost_at = trio.current_time()
                    self._connection = None
                    self._connected = trio.Event()
                    if connection is not None:
                        connection.invalidate("over")
                        close_buffers(connection)
                await trio.sleep(delay)
                delay = min(_RECONNECT_MOST, delay * 2)

    async def _prepare(self, connection: TCPConnection) -> None:
        before, facts = self._facts, await self._preparation.prepare(connection)
        silent_for = trio.current_time() - self._lost_at + CALL_DEADLINE
        took_over = None
        if before is not None:
            took_over = facts.run_id != before.run_id and facts.uptime > silent_for

        async def ask(commands: Sequence[Command]) -> list[Answer]:
            answers: list[Answer] = await pipeline(connection, commands)
            return answers

        await self._arrive(ask, Arrival(facts.uptime, took_over))
        self._facts = facts


def _with_disk(answers: list[Answer]) -> list[Answer]:
    *answers, disk = answers
    if isinstance(disk, BaseException):
        return [disk] * len(answers)
    return answers if disk[0] >= 1 else [TimeoutError("the disk")] * len(answers)


def cannot_open(error: BaseException) -> StoreUnavailable:
    """Why a store cannot be opened, with what to do about it where that is known."""
    if isinstance(error, StoreUnavailable):
        return error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    match cause:
        case ssl.SSLCertVerificationError(verify_code=62 | 64):
            return StoreUnavailable(
                "The session store cannot be opened: Redis shows a certificate that is for another host "
                f"({cause.verify_message}). Name the host in STORE_URL as the certificate does."
            )
        case ssl.SSLCertVerificationError():
            return StoreUnavailable(
                "The session store cannot be opened: the certificate that Redis shows is not trusted "
                f"({cause.verify_message}). Put the certificate of its authority into a file and name that "
                "in SSL_CERT_FILE."
            )
        case ssl.SSLError():
            return StoreUnavailable(
                f"The session store cannot be opened: TLS failed ({cause.reason or 'no reason was given'}). "
                "Is that port one for TLS, and needs no client certificate (tls-auth-clients no)?"
            )
    reasons = [str(each) or type(each).__name__ for each in (error, error.__cause__) if each is not None]
    return StoreUnavailable(f"The session store in Redis cannot be opened: {': '.join(reasons)}")


def make_connection(
    address: RedisAddress,
    *,
    database: int = 0,
    username: str | None,
    password: str | None,
    tls: ssl.SSLContext | None,
) -> TCPConnection:
    """A connection that nobody runs yet; ``close_buffers`` when it is over."""
    return TCPConnection(
        TCPLocation(address.host, address.port),
        connect_timeout=CONNECT_DEADLINE,
        stream_timeout=CONNECT_DEADLINE,
        db=database,
        username=username,
        password=password,
        ssl_context=tls,
        client_name="gateway",
    )


async def ask_once(connection: TCPConnection, commands: Sequence[Command]) -> list[Answer]:
    """Connect, ask, close. Raises ``TROUBLE``, for an error that Redis answers too."""
    failure: BaseException | None = None
    answers: list[Answer] = []
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(run_until_lost, connection, trio.Event())
            answers = await pipeline(connection, commands)
        except TROUBLE as error:
            await trio.lowlevel.checkpoint_if_cancelled()
            failure = error
        finally:
            connection.invalidate("over")
            close_buffers(connection)
    if failure is not None:
        raise failure
    return raise_errors(answers)


def raise_errors(answers: list[Answer]) -> list[Answer]:
    """The answers, if none of them is an error."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


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
