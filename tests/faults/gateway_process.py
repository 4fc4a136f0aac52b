"""The gateway under test: started, killed and started again on the same port and store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0


class GatewayFailed(Exception):
    """The gateway did not start, or ended by itself."""


class GatewayProcess:
    """One gateway after the other on one port. ``kill`` is synchronous: it strikes where it is called."""

    def __init__(self, launcher: trio.Process, port: int, log: Path) -> None:
        self._launcher = launcher
        self._log = log
        self._lines = _Lines(launcher)
        self.port = port
        self.pid: int | None = None
        self.starts = 0
        self._listens = False
        self.start_seconds: list[float] = []
        self.wake = trio.Event()
        """Set when it was killed."""

    async def begin(self) -> None:
        """Start it; it may not listen yet. Raises ``GatewayFailed``."""
        self._started = trio.current_time()
        await self._tell(f"start {self._log}\n")
        self.pid = int(await self._lines.expect("pid "))
        self.starts += 1
        self._listens = False
        self.wake = trio.Event()

    async def wait_listening(self) -> None:
        """Wait until it listens. Raises ``GatewayFailed`` unless it was killed meanwhile."""
        if self._listens:
            return
        with trio.move_on_after(START_SECONDS):
            async with trio.open_nursery() as nursery:

                async def until_killed() -> None:
                    await self.wake.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_killed)
                await self._lines.expect("Listening on ")
                self._listens = True
                self.start_seconds.append(trio.current_time() - self._started)
                nursery.cancel_scope.cancel()
            return
        raise GatewayFailed(f"It did not listen within {START_SECONDS:g} s: {self.log_tail()}")

    def kill(self) -> bool:
        """``kill -9``; False when it is dead already."""
        if self.pid is None or self.wake.is_set():
            return False
        os.kill(self.pid, signal.SIGKILL)
        self.wake.set()
        return True

    def send(self, number: signal.Signals) -> bool:
        """Send a signal that does not end it; False when it is dead."""
        if self.pid is None or self.wake.is_set():
            return False
        os.kill(self.pid, number)
        return True

    async def reap(self) -> int:
        """Wait for the end of a gateway that was told to end; its exit code, negative for a signal."""
        pid, self.pid = self.pid, None
        await self._tell(f"reap {pid}\n")
        return int(await self._lines.expect("exit "))

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGTERM)
        self.wake.set()
        return await self.reap()

    def log_tail(self, lines: int = 3) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-lines:])

    async def _tell(self, line: str) -> None:
        assert self._launcher.stdin is not None
        await self._launcher.stdin.send_all(line.encode())


class _Lines:
    """Lines of the launcher and its gateways, in which one is looked for."""

    def __init__(self, launcher: trio.Process) -> None:
        assert launcher.stdout is not None
        self._stream = launcher.stdout
        self._rest = b""

    async def expect(self, prefix: str) -> str:
        """The rest of the next line that begins so; lines before it are those of gateways now dead."""
        wanted = prefix.encode()
        while True:
            while b"\n" in self._rest:
                line, self._rest = self._rest.split(b"\n", 1)
                if line.startswith(wanted):
                    return line[len(wanted) :].decode()
            data = await self._stream.receive_some()
            if not data:
                raise GatewayFailed("The launcher ended.")
            self._rest += data


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def gateway_process(
    folder: Path, settings: Mapping[str, str], *, cold: bool = False
) -> AsyncIterator[GatewayProcess]:
    """A gateway to be started in ``folder``; it, and all before it, are dead at the end."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}
    kept |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    kept |= {f"GATEWAY__{name}": value for name, value in settings.items()}
    port = free_port()
    command = ["serve", "--bind", f"127.0.0.1:{port}"]
    launcher = await trio.lowlevel.open_process(
        [
            sys.executable,
            "-m",
            "tests.faults.gateway_launcher",
            "--cold" if cold else "--fork",
            *command,
        ],
        cwd=folder,
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    log = folder / "gateway.log"
    log.touch()
    try:
        yield GatewayProcess(launcher, port, log)
    finally:
        with trio.CancelScope(shield=True):
            assert launcher.stdin is not None
            assert launcher.stdout is not None
            await launcher.stdin.aclose()
            with trio.move_on_after(5) as patience:
                await launcher.wait()
            if patience.cancelled_caught:
                launcher.kill()
                await launcher.wait()
            await launcher.stdout.aclose()
