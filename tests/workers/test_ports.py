"""Sockets of several workers on one port."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.workers.ports import SharedPorts

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="SO_REUSEPORT spreads connections on Linux only"
)


@pytest.fixture
def ports() -> Iterator[SharedPorts]:
    """A free port of 127.0.0.1."""
    with closing(SharedPorts(["127.0.0.1:0"])) as found:
        yield found


def address_of(ports: SharedPorts) -> tuple[str, int]:
    """The one port."""
    found = ports.of_worker(1)[0].getsockname()
    assert isinstance(found, tuple)
    return found


def accepted(sockets: list[socket.socket]) -> int:
    """How many connections wait on these."""
    count = 0
    for each in sockets:
        each.setblocking(False)
        while True:
            try:
                each.accept()[0].close()
            except BlockingIOError:
                break
            count += 1
    return count


def test_every_worker_has_the_same_port(ports: SharedPorts) -> None:
    """Also when nobody said which, and also a worker that comes later."""
    assert {ports.of_worker(number)[0].getsockname() for number in (1, 2, 3)} == {address_of(ports)}


def test_connections_are_spread(ports: SharedPorts) -> None:
    """Of 400 at once every one of four workers gets its share, within what chance allows."""
    workers = [ports.of_worker(number) for number in (1, 2, 3, 4)]
    for sockets in workers:
        sockets[0].listen(400)
    clients = [socket.create_connection(address_of(ports)) for _ in range(400)]
    shares = [accepted(sockets) for sockets in workers]
    for client in clients:
        client.close()

    assert sum(shares) == 400
    assert min(shares) > 50  # six standard deviations


def test_what_waits_for_a_dead_worker_is_kept(ports: SharedPorts) -> None:
    """The supervisor's copy listens on: the worker that is started again finds the connection."""
    inherited = ports.of_worker(1)[0].dup()
    inherited.listen(8)
    inherited.close()
    with socket.create_connection(address_of(ports)):
        assert accepted(ports.of_worker(1)) == 1


def test_a_worker_that_was_given_up_gets_nothing(ports: SharedPorts) -> None:
    """All go to the others, and its own socket is a new one on the same port later."""
    address = address_of(ports)
    one, two = ports.of_worker(1), ports.of_worker(2)
    one[0].listen(64)
    two[0].listen(64)
    ports.give_up(1)
    clients = [socket.create_connection(address) for _ in range(32)]
    assert accepted(two) == 32
    for client in clients:
        client.close()

    assert ports.of_worker(1)[0].getsockname() == address


def test_the_port_is_reserved_while_no_worker_listens(ports: SharedPorts) -> None:
    """Nobody else can take it, and nobody can connect."""
    address = address_of(ports)
    ports.give_up(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with closing(socket.socket()) as stranger, pytest.raises(OSError, match="in use") as refused:
        stranger.bind(address)
    assert refused.value.errno == errno.EADDRINUSE


def test_another_gateways_port_is_not_shared(ports: SharedPorts) -> None:
    """A second one of the same user is told that the address is in use, whichever way it would share."""
    host, port = address_of(ports)
    ports.of_worker(1)[0].listen(1)

    with pytest.raises(OSError, match=f"Cannot listen on {host}:{port}") as refused:
        SharedPorts([f"{host}:{port}"])
    assert refused.value.errno == errno.EADDRINUSE


def test_unix_sockets_are_one_for_all(tmp_path: Path) -> None:
    """They cannot be bound twice."""
    with closing(SharedPorts([f"unix:{tmp_path}/s"])) as ports:
        assert ports.of_worker(1) == ports.of_worker(2)


def test_nothing_is_left_open(ports: SharedPorts) -> None:
    """After ``close`` the port is free."""
    address = address_of(ports)
    ports.of_worker(2)[0].listen(1)
    ports.close()
    with closing(socket.socket()) as next_one:
        next_one.bind(address)
