"""Gateways as processes that asyncio clients put under load: each on a port of its own, by its command."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 60.0

LOAD_SETTINGS: Mapping[str, str] = {
    "LOG_LEVEL": "INFO",
    # The load is one machine and one subject: what holds a flood of those back would hold the test back.
    "MAX_CONCURRENT_REQUESTS": "20000",
    "RATE_UPGRADES_PER_MINUTE": "0",
    "RATE_MESSAGES_PER_MINUTE": "0",
    "MAX_SOCKETS_PER_SUBJECT": "100000",
    "MAX_SOCKETS": "100000",
    "MAX_SESSIONS": "100000",
}


class NodeFailed(Exception):
    """A gateway did not start, or did not end as it should."""


class Node:
    """One gateway process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port
        self.pid = process.pid

    @classmethod
    async def start(
        cls, settings: Mapping[str, str], log: Path, *, port: int = 0, module: str = "gateway"
    ) -> Node:
        """Start one; returns when it listens. Raises ``NodeFailed``.

        ``module`` is run in place of the gateway's own, with the same arguments.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}
        kept |= {"PYTHONPATH": str(ROOT)} | {f"GATEWAY__{name}": value for name, value in settings.items()}
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, "serve", "--bind", f"127.0.0.1:{port}"),
                env=kept,
                cwd=log.parent,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                line = (await process.stdout.readline()).decode()
        except TimeoutError:
            line = ""
        found = re.match(r"Listening on http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise NodeFailed(f"A gateway did not start. {' '.join(lines_of(log)[-3:])[-500:]}")
        return cls(process, int(found[1]))

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send(signal.SIGTERM)

    async def tasks(self) -> int:
        """How many Trio tasks it has; only ``tests.faults.watched_gateway`` tells."""
        assert self._process.stdout is not None
        self.send(signal.SIGUSR1)
        async with asyncio.timeout(START_SECONDS):
            line = (await self._process.stdout.readline()).decode()
        return int(line.removeprefix("tasks "))

    async def wait_ended(self) -> int:
        """Its exit code. Raises ``NodeFailed`` when it does not end."""
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            raise NodeFailed(f"A gateway went on for {STOP_SECONDS:g} s after SIGTERM") from None

    async def kill(self) -> None:
        """``kill -9``, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def allow_descriptors(wanted: int) -> None:
    """Have this process, and those it starts, open so many files if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def errors_in(log: Path) -> list[str]:
    """The errors that gateways have logged so far, for a list of violations."""
    return [f"gateway's log: {line[:500]}" for line in lines_of(log) if re.search(r'"level": ?"error"', line)]


def lines_of(log: Path) -> list[str]:
    """What gateways have logged so far."""
    return log.read_text("utf-8", "replace").splitlines()
