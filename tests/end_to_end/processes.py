"""Real processes on loopback: started, found by the address they print, ended by their id."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 20.0
"""A start takes about one second; on a machine that is busy with other tests, more."""
STOP_SECONDS = 20.0


class Process:
    """A command of ours that listens."""

    def __init__(self, popen: subprocess.Popen[str], errors: Path) -> None:
        self._popen = popen
        self._errors = errors
        self.url = ""

    @property
    def pid(self) -> int:
        """For ``/proc``."""
        return self._popen.pid

    @property
    def socket_url(self) -> str:
        """``ws://HOST:PORT``."""
        return self.url.replace("http://", "ws://")

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return self.url.removeprefix("http://")

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self._errors.read_text("utf-8", "replace")

    def wait_listening(self) -> None:
        """Read standard output up to the address. Fails when the process ends before, or says nothing."""
        assert self._popen.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._popen.stdout, selectors.EVENT_READ)
            while not self.url:
                ready = selector.select(deadline - time.monotonic())
                line = self._popen.stdout.readline() if ready else ""
                assert line, f"it did not say where it listens, but: {self.log}"
                if line.startswith("Listening on "):
                    self.url = line.removeprefix("Listening on ").strip()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process."""
        self._popen.send_signal(number)

    def wait(self) -> int:
        """Its exit code, negative for a signal, as ``subprocess`` has it."""
        return self._popen.wait(STOP_SECONDS)

    def open_descriptors(self) -> int:
        """How many files and sockets it holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_kilobytes(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text("ascii")
        return int(status.partition("VmRSS:")[2].split()[0])

    def end(self) -> None:
        """Make sure that it is gone, whatever the test did."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with only ``settings`` as settings of the gateway."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}
    kept |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return kept | {f"GATEWAY__{name}": value for name, value in (settings or {}).items()}


@contextmanager
def started(
    command: Sequence[str], folder: Path, settings: Mapping[str, str] | None = None, *, name: str = "process"
) -> Iterator[Process]:
    """A process in ``folder`` that has said where it listens; it is gone at the end."""
    errors = folder / f"{name}-{time.monotonic_ns()}.log"
    with errors.open("wb") as error_file:
        popen = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=error_file,
            text=True,
        )
    process = Process(popen, errors)
    try:
        process.wait_listening()
        yield process
    finally:
        process.end()


@contextmanager
def running_agent(folder: Path, *options: str) -> Iterator[Process]:
    """``gateway agent`` on a free port, without pauses between tokens unless ``options`` say otherwise."""
    command = [sys.executable, "-m", "gateway", "agent", "--bind", "127.0.0.1:0", "--token-delay", "0"]
    with started([*command, *options], folder, name="agent") as process:
        yield process


@contextmanager
def running_gateway(
    folder: Path, agent_url: str, *, bind: str = "127.0.0.1:0", **settings: str
) -> Iterator[Process]:
    """``gateway serve``; its SQLite file is in ``folder`` unless ``settings`` say otherwise."""
    command = [sys.executable, "-m", "gateway", "serve", "--bind", bind]
    with started(command, folder, {"AGENT_URL": agent_url, **settings}, name="gateway") as process:
        yield process


def eventually(condition: object, *, seconds: float = 10.0) -> None:
    """Wait until ``condition()`` holds; real processes have no virtual time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    pause = selectors.DefaultSelector()
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.select(0.02)
    pause.close()
