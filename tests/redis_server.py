"""A real Redis for tests: started on a port of its own, paused, killed, started again, emptied."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
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

    def __init__(self, directory: Path, *options: str) -> None:
        self._program = require_redis()
        self._directory = directory
        self._options = options
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What a gateway's ``STORE_URL`` is."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._directory), "--logfile", "redis.log", *self._options]
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
                raise AssertionError("redis-server does not answer; its redis.log says why")
            time.sleep(0.005)

    def ask(self, command: str) -> str:
        """The first line of the answer to an inline command."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(command.encode() + b"\r\n")
            with connection.makefile("rb") as lines:
                return lines.readline().decode().strip()

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


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
