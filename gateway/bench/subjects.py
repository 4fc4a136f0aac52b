"""What is measured: gateways and peers, started here or running already, each in a process of its own."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from attrs import frozen

from gateway.bench.socket_client import BenchError

START_SECONDS = 30.0
STOP_SECONDS = 15.0
SOCKET_PATH = "/api/v1/ws/bench-%d"

_STORE_FILE = "gateway.sqlite3"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

_SETTINGS = {
    "LOG_LEVEL": "WARNING",
    # The load is one machine and one subject: what holds a flood of those back would hold the bench back.
    "MAX_CONCURRENT_REQUESTS": "20000",
    "RATE_UPGRADES_PER_MINUTE": "0",
    "RATE_MESSAGES_PER_MINUTE": "0",
    "MAX_SOCKETS_PER_SUBJECT": "100000",
    "MAX_SOCKETS": "100000",
    "MAX_SESSIONS": "100000",
    # To see what it says of itself; costs nothing while nobody asks.
    "METRICS_PUBLIC": "true",
    # Nobody is left who would come back, and to wait for 10 000 sockets takes as long as to open them.
    "DRAIN_TIMEOUT": "1",
}


@frozen
class Running:
    """A process that serves."""

    host: str
    port: int
    pid: int
    store_file: Path | None = None
    """Where it keeps sessions, if that is a file we know of."""


@frozen
class Launch:
    """How to get a running one; entering the context manager starts it, leaving it ends it."""

    name: str
    start: Callable[[], AbstractContextManager[Running]]


@frozen
class Subject:
    """One row of the tables: what runs, and how it is spoken to."""

    name: str
    launch: Launch
    is_peer: bool = False
    dialect: str = "v1"
    path: str = SOCKET_PATH
    headers: tuple[str, ...] = ()


def gateway_launch(store: str, agent_url: str, settings: Mapping[str, str] | None = None) -> Launch:
    """A gateway of this package on ``memory://`` or ``sqlite``, in a folder that is removed afterwards.

    ``settings`` are added to those that every measured gateway has.
    """
    return Launch(f"gateway {store}", partial(_gateway, store, agent_url, settings or {}))


def running_launch(name: str, url: str, pid: int) -> Launch:
    """Something that runs already."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "ws") or not parts.hostname:
        raise BenchError(f"{url!r} is no URL of the form http://HOST:PORT")
    running = Running(parts.hostname, parts.port or 80, pid)

    @contextmanager
    def start() -> Iterator[Running]:
        yield running

    return Launch(name, start)


def peer_launch(script: Path, agent_url: str, python: str) -> Launch:
    """A relay as a user would write one: ``NAME.mjs PORT AGENT_PORT`` or a FastAPI module with ``app``."""
    if not script.is_file():
        raise BenchError(f"{script} is not there")
    agent_port = urlsplit(agent_url).port
    environment: dict[str, str] = {}
    if script.suffix in (".mjs", ".js"):
        name = "Node"

        def command(port: int) -> list[str]:
            return ["node", str(script.resolve()), str(port), str(agent_port)]
    elif script.suffix == ".py":
        name = "FastAPI"
        environment["AGENT_PORT"] = str(agent_port)

        def command(port: int) -> list[str]:
            options = ["--loop", "uvloop", "--http", "httptools", "--log-level", "warning"]
            module = f"{script.stem}:app"
            return [
                python,
                "-m",
                "uvicorn",
                module,
                "--app-dir",
                str(script.resolve().parent),
                "--port",
                str(port),
                *options,
            ]
    else:
        raise BenchError(f"{script}: a peer is a Node script (.mjs, .js) or a FastAPI module (.py)")
    return Launch(name, partial(_peer, name, command, environment))


@contextmanager
def running_emitter() -> Iterator[str]:
    """The emitter's URL."""
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        command = [sys.executable, "-m", "gateway.bench.emitter"]
        with _process(command, child_environment({}), Path(folder)) as process:
            yield _wait_listening(process)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of a gateway, so that children find this package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}
    path = os.pathsep.join(filter(None, (str(_PACKAGE_ROOT), kept.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path} | dict(extra)


def gateway_command(
    store: str, agent_url: str, folder: Path, settings: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """How to start a gateway in ``folder``: its command and its environment."""
    url = "memory://" if store == "memory://" else f"sqlite:///{folder}/{_STORE_FILE}"
    all_settings = {**_SETTINGS, "STORE_URL": url, "AGENT_URL": agent_url, **(settings or {})}
    environment = child_environment({f"GATEWAY__{name}": value for name, value in all_settings.items()})
    return [sys.executable, "-m", "gateway", "serve", "--bind", "127.0.0.1:0"], environment


@contextmanager
def _gateway(store: str, agent_url: str, settings: Mapping[str, str]) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        command, environment = gateway_command(store, agent_url, Path(folder), settings)
        with _process(command, environment, Path(folder)) as process:
            parts = urlsplit(_wait_listening(process))
            assert parts.hostname is not None
            assert parts.port is not None
            store_file = None if store == "memory://" else Path(folder, _STORE_FILE)
            yield Running(parts.hostname, parts.port, process.pid, store_file)


@contextmanager
def _peer(
    name: str, command: Callable[[int], Sequence[str]], environment: Mapping[str, str]
) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder,
        _process(command(port), child_environment(environment), Path(folder)) as process,
    ):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                yield Running("127.0.0.1", port, process.pid)
                return
        raise BenchError(f"the {name} peer did not start; what it said is above")


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """A child whose standard error is ours; it is gone at the end."""
    try:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise BenchError(f"{command[0]} cannot be started: {error.strerror}") from None
    with ExitStack() as stack:
        if process.stdout is not None:
            stack.callback(process.stdout.close)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_listening(process: subprocess.Popen[str]) -> str:
    """The URL that a process of ours prints once it listens."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line.startswith("Listening on "):
        raise BenchError("a process of the bench did not start; what it said is above")
    return line.removeprefix("Listening on ").strip()
