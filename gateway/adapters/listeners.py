"""Listening sockets from bind addresses as hypercorn writes them: HOST:PORT, [IPv6]:PORT, unix:PATH, fd://N."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio


async def open_listeners(binds: Sequence[str], *, backlog: int) -> list[trio.SocketListener]:
    """Bind and listen on all of them, or on none. Raises ``OSError`` that names the address.

    Port 0 takes a free port; ``listener.socket.getsockname()`` says which.
    """
    listeners: list[trio.SocketListener] = []
    try:
        for bind in binds:
            listeners += listen_on(bind_sockets(bind), backlog=backlog)
    except OSError as error:
        for listener in listeners:
            listener.socket.close()
        raise OSError(error.errno, f"Cannot listen on {bind}: {os.strerror(error.errno or 0)}") from error
    await trio.lowlevel.checkpoint()
    return listeners


def listen_on(sockets: Sequence[socket.socket], *, backlog: int) -> list[trio.SocketListener]:
    """Listen on sockets that are bound, and take them over. Raises ``OSError``."""
    for plain in sockets:
        plain.listen(backlog)
        plain.setblocking(False)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(plain)) for plain in sockets]


def bind_sockets(bind: str) -> list[socket.socket]:
    """Sockets bound to one address, not listening yet: one per address of its host. Raises ``OSError``."""
    if bind.startswith("unix:"):
        path = bind.removeprefix("unix:")
        with suppress(FileNotFoundError):
            os.unlink(path)
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.bind(path)
        return [plain]
    if bind.startswith("fd://"):
        return [socket.socket(fileno=int(bind.removeprefix("fd://")))]
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    bound: list[socket.socket] = []
    found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        plain = socket.socket(family, kind, protocol)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            plain.bind(address)
        except OSError:
            plain.close()
            for other in bound:
                other.close()
            raise
        bound.append(plain)
        if int(port) == 0:
            break  # a second address would get another port, and only one can be announced
    return bound
