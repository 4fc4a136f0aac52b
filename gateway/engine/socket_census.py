"""The open sockets of this process: how many, whose, and when there are none left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import trio

from gateway.core.websocket_protocol import Dialect
from gateway.engine.relayed_socket import RelayedSocket
from gateway.engine.remote_connection import RemoteConnection
from gateway.engine.session_socket import SessionSocket
from gateway.engine.shared_socket import SharedSocket
from gateway.ports import Admission, Telemetry

OpenSocket = SessionSocket | SharedSocket | RelayedSocket


class SocketCensus:
    """Counts every socket in and out."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._sockets: dict[OpenSocket, None] = {}
        self._by_dialect = Counter[Dialect]()
        self._by_subject = Counter[str]()
        self._emptied: trio.Event | None = None

    def __len__(self) -> int:
        return len(self._sockets)

    def __iter__(self) -> Iterator[OpenSocket]:
        return iter(tuple(self._sockets))

    def __contains__(self, socket: object) -> bool:
        return socket in self._sockets

    @property
    def held_here(self) -> int:
        """How many of them are sockets of this process, and not of a node that only passes them on to it."""
        return self._by_dialect.total()

    def held_by(self, subject: str) -> int:
        """How many sockets of this process one subject has open."""
        return self._by_subject[subject]

    def add(self, socket: OpenSocket, admission: Admission) -> None:
        """A socket opened."""
        self._sockets[socket] = None
        self._count(socket, admission, 1)

    def remove(self, socket: OpenSocket, admission: Admission) -> None:
        """It closed."""
        del self._sockets[socket]
        self._count(socket, admission, -1)
        if not self._sockets and self._emptied is not None:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Wait until no socket is open."""
        while self._sockets:
            self._emptied = trio.Event()
            await self._emptied.wait()

    def _count(self, socket: OpenSocket, admission: Admission, change: int) -> None:
        if isinstance(socket, SessionSocket) and isinstance(socket.connection, RemoteConnection):
            return  # Its holder counts it, so that the nodes' figures can be added up.
        dialect, subject = admission.dialect, admission.identity.subject
        self._by_subject[subject] += change
        if not self._by_subject[subject]:
            del self._by_subject[subject]
        self._by_dialect[dialect] += change
        self._telemetry.set_gauge("gateway_sockets_open", self._by_dialect[dialect], dialect=dialect.value)
