"""What is used of hypercorn, trio-websocket, wsproto and coredis beyond their documentation.

Their minor versions are pinned for these; when one is raised, this says what to look at.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import deque
from collections.abc import Callable
from importlib.metadata import version

import pytest
import trio_websocket
import wsproto
from coredis._utils import logger as coredis_logger
from coredis.connection import TCPConnection, TCPLocation
from coredis.connection._request import RequestBatch
from coredis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from coredis.parser import Parser
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.events import Updated
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from quart_trio.asgi import TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Ping

from gateway.adapters.stores.redis_link import close_buffers


@pytest.mark.parametrize(
    ("package", "prefix"),
    [
        ("hypercorn", "0.18."),
        ("trio-websocket", "0.12."),
        ("wsproto", "1."),
        ("quart-trio", "0.12."),
        ("coredis", "6.9."),
    ],
)
def test_the_versions_are_those_that_were_read(package: str, prefix: str) -> None:
    """The guards were written against these sources."""
    assert version(package).startswith(prefix)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (TCPServer.__init__, ["self", "app", "config", "context", "state", "stream"]),
        (TCPServer.run, ["self"]),
        (TCPServer.protocol_send, ["self", "event"]),
        (TCPServer._read_data, ["self"]),
        (ASGIWrapper.__init__, ["self", "app"]),
        (WorkerContext.__init__, ["self", "max_requests"]),
        (Lifespan.__init__, ["self", "app", "config", "state"]),
        (Lifespan.wait_for_startup, ["self"]),
        (Lifespan.wait_for_shutdown, ["self"]),
        (Updated.__init__, ["self", "idle"]),
        (trio_websocket.WebSocketConnection._reader_task, ["self"]),
        (trio_websocket.WebSocketRequest.__init__, ["self", "connection", "event"]),
        (TrioASGIWebsocketConnection.handle_messages, ["self", "nursery", "receive"]),
        (TCPConnection.run, ["self", "task_status"]),
        (TCPConnection.invalidate, ["self", "reason"]),
        (TCPConnection.send_command, ["self", "command", "args"]),
        (TCPConnection.create_request_batch, ["self", "commands", "timeout"]),
    ],
)
def test_the_signatures_are_those_that_are_called(
    function: Callable[..., object], parameters: list[str]
) -> None:
    """Name by name."""
    assert list(inspect.signature(function).parameters) == parameters


def test_hypercorn_takes_a_stream_without_a_tls_handshake_for_plain() -> None:
    """``CheckedStream`` has no ``do_handshake``; hypercorn goes by that, and reads ``socket``."""
    source = inspect.getsource(TCPServer.run)
    assert "except AttributeError:  # Not SSL" in source
    assert "self.stream.socket" in source


def test_hypercorn_says_when_a_response_is_complete() -> None:
    """``Updated(idle=True)`` comes once the next request may be read."""
    assert "Updated" in inspect.getsource(TCPServer.protocol_send)


def test_wsproto_still_refuses_pings_while_closing() -> None:
    """The guard in ``GuardedConnection.send`` has a reason as long as this raises."""
    connection = wsproto.connection.Connection(ConnectionType.SERVER)
    connection.send(CloseConnection(code=1000))
    assert connection.state is ConnectionState.LOCAL_CLOSING
    with pytest.raises(wsproto.utilities.LocalProtocolError):
        connection.send(Ping(payload=b"x").response())


def test_wsproto_only_appends_and_pops_its_events() -> None:
    """A list with ``popleft`` does in place of its deque (``GuardedConnection.forget_handshake``)."""
    source = inspect.getsource(wsproto.connection.Connection)
    assert set(re.findall(r"self\._events(\.\w+|\b)", source)) == {"", ".append", ".popleft"}
    assert isinstance(wsproto.connection.Connection(ConnectionType.SERVER)._events, deque)


def test_two_events_of_trio_websocket_are_awaited_by_clients_only() -> None:
    """Sockets of a server share one (``WebSocketServer._upgrade``)."""
    names = r"\._(?:open_handshake|for_testing_peer_closed_connection)(?: = [\w.()]+|[\w.]*)"
    used = re.findall(names, inspect.getsource(trio_websocket._impl))
    assert sorted(used) == [
        "._for_testing_peer_closed_connection = trio.Event()",
        "._for_testing_peer_closed_connection.set",
        "._open_handshake = trio.Event()",
        *["._open_handshake.set"] * 2,
        *["._open_handshake.wait"] * 2,
    ]
    clients = (trio_websocket.connect_websocket, trio_websocket.wrap_client_stream)
    waits = [inspect.getsource(client).count("_open_handshake.wait()") for client in clients]
    assert waits == [1, 1]


def test_trio_websocket_runs_the_reader_from_an_accepted_request() -> None:
    """The reader consults the protocol object it was given, and only closes through the stream."""
    source = inspect.getsource(trio_websocket.WebSocketConnection._reader_task)
    assert "self._wsproto.events()" in source
    assert "self._stream.receive_some" in source


def coredis_connection() -> TCPConnection:
    """One that nobody runs; its buffers are closed as the store closes them."""
    connection = TCPConnection(
        TCPLocation("localhost", 1),
        connect_timeout=1.0,
        stream_timeout=1.0,
        db=0,
        username=None,
        password=None,
        ssl_context=None,
        client_name="gateway",
    )
    close_buffers(connection)
    return connection


def test_a_coredis_connection_has_what_is_read_of_it() -> None:
    """Whether it can be used, the server's version, the bytes received; buffers that are closed by hand."""
    connection = coredis_connection()

    assert not connection.usable
    assert connection.server_version is None
    assert connection.statistics.bytes_read == 0
    buffers = {name for name in vars(connection) if "_buffer_" in name}
    assert buffers == {
        f"_{kind}_buffer_{end}"
        for kind in ("write", "push_message", "streamed_message")
        for end in ("in", "out")
    }


def test_a_coredis_batch_reads_only_what_a_command_of_ours_has() -> None:
    """Its own request objects cost 15 µs each; a batch's deadline and reaction to a cancel can be set."""
    source = inspect.getsource(TCPConnection.create_request_batch)
    assert set(re.findall(r"cmd\.(\w+)", source)) == {"name", "decode", "serialized_arguments"}
    fields = {field.name for field in dataclasses.fields(RequestBatch)}
    assert {"disconnect_on_cancellation", "response_timeout"} <= fields


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("MOVED 3999 10.0.0.1:6381", MovedError, "3999 10.0.0.1:6381"),
        ("ASK 3999 10.0.0.1:6381", AskError, "3999 10.0.0.1:6381"),
        ("TRYAGAIN Multiple keys request", TryAgainError, "Multiple keys request"),
        ("CLUSTERDOWN Hash slot not served", ClusterDownError, "Hash slot not served"),
        ("READONLY You can't write", ReadOnlyError, "You can't write"),
        ("OOM command not allowed", ResponseError, "OOM command not allowed"),
        ("MISCONF Redis is configured", ResponseError, "MISCONF Redis is configured"),
        ("NOREPLICAS Not enough good replicas", ResponseError, "NOREPLICAS Not enough good replicas"),
        ("ERR Function not found", ResponseError, "Function not found"),
        ("ERR Library 'gateway' already exists", ResponseError, "Library 'gateway' already exists"),
    ],
)
def test_coredis_tells_errors_apart(line: str, kind: type[RedisError], text: str) -> None:
    """By class where it has one, otherwise by how the text begins; a redirection says where to."""
    error = Parser().parse_error(line)

    assert (type(error), str(error)) == (kind, text)
    if isinstance(error, AskError):
        assert (error.slot_id, error.host, error.port) == (3999, "10.0.0.1", 6381)


def test_coredis_logs_under_its_name() -> None:
    """Each failed attempt to connect with a traceback: it is quietened by that name."""
    assert coredis_logger.name == "coredis"
