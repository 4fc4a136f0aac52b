"""Serves the reference Agent Runtime on a TCP port, until it is cancelled."""

import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import wrap_app

from gateway.reference_agent.approvals import load_policy
from gateway.reference_agent.brain import Brain
from gateway.reference_agent.llm_brain import open_llm_brain
from gateway.reference_agent.memory_state import MemoryState
from gateway.reference_agent.routes import create_app
from gateway.reference_agent.runtime import Runtime
from gateway.reference_agent.scripted_brain import ScriptedBrain
from gateway.reference_agent.settings import AgentSettings
from gateway.reference_agent.sqlite_state import open_sqlite_state
from gateway.reference_agent.state import StateStore

SEND_DEADLINE = 30.0
"""Seconds a client may take to accept one write. hypercorn writes inside a shielded scope, so without a
deadline of our own a client that stops reading would hold its connection for ever."""

KEEP_ALIVE = 75.0
"""Seconds an idle connection is kept: longer than HTTP clients keep theirs, so that they close first."""


class ClientStream:
    """A socket with what hypercorn asks of a stream, with a deadline on writing and an immediate close.

    It has no ``send_eof``, which hypercorn does without: it would wait there before it closes, and be
    cancelled by Quart-Trio at that very point, so that a connection to be closed would stay open for good.
    """

    def __init__(self, stream: trio.SocketStream, send_deadline: float) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._send_deadline = send_deadline

    async def send_all(self, data: bytes) -> None:
        """Send, or raise `trio.BrokenResourceError` when the client does not take the data in time."""
        try:
            with trio.fail_after(self._send_deadline):
                await self._stream.send_all(data)
        except trio.TooSlowError:
            self.abort()
            raise trio.BrokenResourceError("the client stopped reading") from None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close; never blocks for long."""
        await self._stream.aclose()

    def abort(self) -> None:
        """Close at once, waking whoever reads or writes."""
        self.socket.close()


class ConnectionServer(TCPServer):
    """hypercorn's server of one connection: its keep-alive timeout runs between requests, and only there."""

    async def protocol_send(self, event: Event) -> None:
        """Pass on what the protocol says."""
        # "Idle" comes in the application's task, which Quart-Trio has cancelled by then.
        with trio.CancelScope(shield=isinstance(event, Updated)):
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        # A client that connects and leaves would otherwise hold a descriptor until the timeout.
        await self.idle_task.stop()


class HttpServer:
    """Serves an ASGI application on listeners; a fault in one connection stays in that connection."""

    def __init__(self, app: AppWrapper, config: Config, *, send_deadline: float = SEND_DEADLINE) -> None:
        self._app = app
        self._send_deadline = send_deadline
        self._config = config
        self._context = WorkerContext(None)
        self._connections = 0
        self._log = structlog.get_logger("reference_agent")

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return self._connections

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; then every connection is closed and its request cancelled."""
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(
                self._serve_connection, listeners, handler_nursery=nursery, task_status=task_status
            )

    async def _serve_connection(self, socket_stream: trio.SocketStream) -> None:
        stream = ClientStream(socket_stream, self._send_deadline)
        self._connections += 1
        try:
            state = cast(ConnectionState, {})
            # hypercorn's type names SSLStream, but it only uses `socket` and what every stream has.
            await ConnectionServer(self._app, self._config, self._context, state, cast(Any, stream)).run()
        except* Exception as group:
            # Some malformed requests raise out of hypercorn and would otherwise end the process.
            self._log.warning("connection_failed", error=repr(group.exceptions[0]))
        finally:
            self._connections -= 1
            stream.abort()


def split_bind(bind: str) -> tuple[str, int]:
    """``HOST:PORT`` in its parts. Raises `ValueError`, saying what is expected."""
    host, colon, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"bind address {bind!r}: expected HOST:PORT, for example 127.0.0.1:8001")
    return host, int(port)


@asynccontextmanager
async def open_store(settings: AgentSettings) -> AsyncIterator[StateStore]:
    """The store that the settings ask for, closed at the end. Raises `ValueError` if it cannot be used."""
    if settings.db is None:
        yield MemoryState()
    else:
        async with open_sqlite_state(settings.db) as store:
            yield store


@asynccontextmanager
async def open_brain(settings: AgentSettings) -> AsyncIterator[Brain]:
    """The brain that the settings ask for, closed at the end. Raises `ValueError` if it cannot be used."""
    if settings.llm == "scripted":
        yield ScriptedBrain(settings.token_delay)
    else:
        async with open_llm_brain(settings, random.random) as brain:
            yield brain


async def serve_agent(
    settings: AgentSettings, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run one reference Agent Runtime until cancelled.

    Reports its address (``http://HOST:PORT``) through ``task_status`` once it is listening. Raises `OSError`
    when the address cannot be bound and `ValueError` for settings that cannot be used. On cancellation all
    connections are closed; keyed turns that were running are carried on by the next start on the same
    database.
    """
    host, port = split_bind(settings.bind)
    policy = load_policy(settings.approvals)
    async with AsyncExitStack() as resources:
        # Bound before any nursery is opened, so that a taken port is a plain OSError.
        listeners = list(await trio.open_tcp_listeners(port, host=host))
        for listener in listeners:
            resources.push_async_callback(listener.aclose)
        store = await resources.enter_async_context(open_store(settings))
        brain = await resources.enter_async_context(open_brain(settings))
        turns = await resources.enter_async_context(trio.open_nursery())
        runtime = Runtime(settings, brain, policy, store, turns)
        app = wrap_app(create_app(runtime, settings), Config().wsgi_max_body_size, "asgi")
        async with trio.open_nursery() as nursery:
            await nursery.start(HttpServer(app, hypercorn_config()).serve, listeners)
            name = f"[{host}]" if ":" in host else host
            task_status.started(f"http://{name}:{listeners[0].socket.getsockname()[1]}")


def hypercorn_config(keep_alive: float = KEEP_ALIVE) -> Config:
    """How hypercorn speaks HTTP here; it binds nothing itself."""
    config = Config()
    config.keep_alive_timeout = keep_alive
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    return config
