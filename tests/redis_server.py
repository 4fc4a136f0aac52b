"""A real Redis for tests: started on a port of its own, paused, killed, started again, emptied.

Several of them as one Redis: ``redis_groups``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

PORTS = range(22100, 23000)
_START_SECONDS = 10.0


def require_redis() -> str:
    """The path of ``redis-server``. Skips the test without it, and fails it in CI, where it must be there."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not installed: install Redis 7.0 or newer to run this test"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class RedisServer:
    """One ``redis-server`` process; all methods block, for milliseconds."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        program: str | None = None,
        ports: Sequence[int] = PORTS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._program = program or require_redis()
        self._directory = directory
        self.options = options
        self._tls = tls
        self.port = free_port(ports)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What a gateway's ``STORE_URL`` is."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of its process; it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [self._program, *self._arguments(), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._directory), "--logfile", f"redis-{self.port}.log", *self.options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                if self.ask("PING").startswith(("+PONG", "-NOAUTH")):
                    return
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError("redis-server does not answer; its log says why")
            time.sleep(0.005)

    def _arguments(self) -> list[str]:
        if self._tls is not None:
            return ["--port", "0", "--tls-port", str(self.port), "--save", ""]
        return ["--port", str(self.port), "--save", ""]

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        connection: socket.socket = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_hostname="localhost")
        with connection:
            yield connection

    def ask(self, command: str) -> str:
        """The answer to an inline command: its first line, or the text that it is."""
        with self._connected() as connection:
            connection.sendall(command.encode() + b"\r\n")
            with connection.makefile("rb") as lines:
                line = lines.readline().decode().strip()
                return lines.read(int(line[1:])).decode() if line[:1] == "$" and line != "$-1" else line

    def says(self, command: str, text: str) -> bool:
        """Whether a text is in the answer to a command."""
        return text in self.ask(command)

    def first_key(self, slot: int) -> str:
        """A key that a node of a cluster has in a slot, or nothing."""
        with self._connected() as connection:
            connection.sendall(f"CLUSTER GETKEYSINSLOT {slot} 1\r\n".encode())
            with connection.makefile("rb") as lines:
                if lines.readline() == b"*0\r\n":
                    return ""
                lines.readline()
                return lines.readline().decode().strip()

    def isolate(self) -> None:
        """Cut it off from replicas and sentinels, for good; clients that are connected go on with it."""
        with self._connected() as connection:
            lines = connection.makefile("rb")
            connection.sendall(b"CONFIG SET requirepass nobody-knows-it\r\n")
            assert lines.readline() == b"+OK\r\n"
            connection.sendall(b"CLIENT KILL TYPE replica\r\nCLIENT LIST\r\n")
            lines.readline()
            clients = lines.read(int(lines.readline()[1:])).decode().splitlines()
            for client in clients:
                if " name=sentinel-" in client:
                    connection.sendall(f"CLIENT KILL ID {client.split()[0][3:]}\r\n".encode())
            lines.close()

    def empty(self) -> None:
        """Drop all data and all functions."""
        assert self.ask("FLUSHALL") == "+OK"
        assert self.ask("FUNCTION FLUSH") == "+OK"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP, SIGCONT."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def free_port(ports: Sequence[int]) -> int:
    """One of some ports that nobody listens on."""
    for port in random.sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
