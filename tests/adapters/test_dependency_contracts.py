"""What is used of hypercorn, trio-websocket and wsproto beyond their documentation.

Their minor versions are pinned for these; when one is raised, this says what to look at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version

import pytest
import trio_websocket
import wsproto
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.events import Updated
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from quart_trio.asgi import TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Ping


@pytest.mark.parametrize(
    ("package", "prefix"),
    [("hypercorn", "0.18."), ("trio-websocket", "0.12."), ("wsproto", "1."), ("quart-trio", "0.12.")],
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


def test_trio_websocket_runs_the_reader_from_an_accepted_request() -> None:
    """The reader consults the protocol object it was given, and only closes through the stream."""
    source = inspect.getsource(trio_websocket.WebSocketConnection._reader_task)
    assert "self._wsproto.events()" in source
    assert "self._stream.receive_some" in source
