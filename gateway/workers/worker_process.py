"""One worker as the supervisor sees it: a fresh interpreter that inherits its sockets, and nothing else.

No ``fork`` of a process in which Trio ran: what two processes must not share (an event loop's epoll, TLS
states, random numbers, connections to Redis) is not there to be shared.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Protocol

import trio
from attrs import frozen

from gateway.config import Configuration
from gateway.workers.channel import Channel, Message, Setup

_PROGRAM = "gateway.worker"


def dump_configuration(configuration: Configuration) -> bytes:
    """For a worker: it must not read the files again, which may have changed since the others started.

    It goes through a pipe, and not through the environment or the command line, which others can read.
    """
    return pickle.dumps(
        (
            configuration.settings,
            configuration.binds,
            dict(configuration.hypercorn),
            dict(configuration.sources),
        )
    )


def load_configuration(data: bytes) -> Configuration:
    """The same configuration again. Only for what ``dump_configuration`` of our own supervisor made."""
    settings, binds, hypercorn, sources = pickle.loads(data)
    return Configuration(
        settings=settings,
        binds=binds,
        hypercorn=MappingProxyType(hypercorn),
        sources=MappingProxyType(sources),
    )


class Worker(Protocol):
    """A worker as the supervisor needs it: ``WorkerProcess``."""

    @property
    def pid(self) -> int:
        """For people and logs."""
        ...

    def post(self, message: Message) -> None:
        """Tell it something."""
        ...

    def ask_to_stop(self) -> None:
        """Have it drain and end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    async def run(self, take: Callable[[Message], None]) -> int:
        """Listen to it until it ends; its exit code, negative for a signal. Cancelling kills it."""
        ...


@frozen
class Place:
    """What a worker is started with."""

    number: int
    """From 1."""
    count: int
    configuration: bytes
    """See ``dump_configuration``."""
    sockets: Sequence[socket.socket]
    metrics_sockets: Sequence[socket.socket]


StartWorker = Callable[[Place], Awaitable[Worker]]
"""Starts a worker; raises ``OSError``."""


class WorkerProcess:
    """A worker from its start to its end. Resource handling: dead when ``run`` returns or raises."""

    def __init__(self, process: trio.Process, channel: Channel) -> None:
        self._process = process
        self._channel = channel

    @property
    def pid(self) -> int:
        """For people and logs."""
        return self._process.pid

    @classmethod
    async def start(cls, place: Place) -> WorkerProcess:
        """Start it; it listens when it says so. Raises ``OSError``."""
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            descriptors = [each.fileno() for each in (theirs, *place.sockets, *place.metrics_sockets)]
            # -P and the path of this process: what lies in the current folder is not to be imported.
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                # A group of its own: Ctrl-C is for the supervisor, which then asks the workers to stop.
                process_group=0,
                env=_environment(os.environ),
            )
            undo.pop_all()
        channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        channel.post(
            Setup(
                place.number,
                place.count,
                place.configuration,
                [each.fileno() for each in place.sockets],
                [each.fileno() for each in place.metrics_sockets],
            )
        )
        return cls(process, channel)

    def post(self, message: Message) -> None:
        """Tell it something."""
        self._channel.post(message)

    def ask_to_stop(self) -> None:
        """SIGTERM: drain and end."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    async def run(self, take: Callable[[Message], None]) -> int:
        """Listen to it until it ends; its exit code, negative for a signal. Cancelling kills it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._channel.run, take)
                code = await self._process.wait()
                nursery.cancel_scope.cancel()
            return code
        finally:
            if self._process.returncode is None:
                self._process.kill()
                with trio.CancelScope(shield=True):
                    await self._process.wait()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    settings_left_out = {
        name: value for name, value in environment.items() if not name.upper().startswith("GATEWAY__")
    }
    return settings_left_out | {"PYTHONPATH": path}
