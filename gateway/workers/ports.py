"""The sockets that workers accept on: held by the supervisor, so that a worker may die and the port stays.

Each worker has a listening socket of its own on the same TCP port (``SO_REUSEPORT``), among which the kernel
spreads connections by their addresses. With one socket for all, whoever wakes up first takes what is there:
of 400 sockets that came back at once, four workers got 197, 71, 62 and 70; now 100, 108, 96 and 96. Where
that does not exist (Unix sockets, inherited ones, systems other than Linux) all share one.

Connections that come while a worker is being started again wait for it in its socket's queue.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from gateway.adapters.listeners import bind_sockets


class SharedPorts:
    """The addresses of one ``BIND``. Every method may raise ``OSError`` that names the address."""

    def __init__(self, binds: Sequence[str]) -> None:
        self._shared: list[socket.socket] = []
        self._reserved: list[socket.socket] = []
        """Bound and never listening: the port is ours while no worker listens, and port 0 is decided."""
        self._of_worker: dict[int, list[socket.socket]] = {}
        try:
            for bind in binds:
                self._reserve(bind)
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"Cannot listen on {bind}: {os.strerror(error.errno or 0)}") from error

    def _reserve(self, bind: str) -> None:
        if bind.startswith(("unix:", "fd://")) or sys.platform != "linux":
            self._shared += bind_sockets(bind)
            return
        # SO_REUSEPORT would let a second gateway of the same user in without a word, so first without.
        probes = bind_sockets(bind)
        addresses = [probe.getsockname() for probe in probes]
        for probe, address in zip(probes, addresses, strict=True):
            probe.close()
            self._reserved.append(_bound(probe.family, address))

    def of_worker(self, number: int) -> list[socket.socket]:
        """Its sockets; they are bound anew if they were given up."""
        if number not in self._of_worker:
            self._of_worker[number] = [
                _bound(reserved.family, reserved.getsockname()) for reserved in self._reserved
            ]
        return [*self._shared, *self._of_worker[number]]

    def give_up(self, number: int) -> None:
        """Have other workers take what would come to this one; what waits for it is reset."""
        for each in self._of_worker.pop(number, ()):
            each.close()

    def close(self) -> None:
        """Let go of everything."""
        for number in list(self._of_worker):
            self.give_up(number)
        for each in (*self._shared, *self._reserved):
            each.close()
        self._shared, self._reserved = [], []


def _bound(family: int, address: object) -> socket.socket:
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        plain.bind(address)  # type: ignore[arg-type]
    except OSError:
        with suppress(OSError):
            plain.close()
        raise
    return plain
