"""Clients beside those that are measured: busy ones, of which some never read. A process of its own.

    python -m gateway.bench.neighbour_load < assignment.json

Reads a ``NeighbourAssignment``, a line; writes ``ready``, a line, once all of them are being answered. They
go on until standard input ends. Then it writes a ``NeighbourMeasurement``.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gateway.bench.emitter import Plan
from gateway.bench.gauges import SOCKETS_OPEN, read_gauges
from gateway.bench.load import ANSWER_SECONDS, cancel, message, report, until_quiet
from gateway.bench.process_figures import resident_kilobytes
from gateway.bench.socket_client import BenchError, SocketClient, connect, masked_frame, upgrade_request

_RECEIVE_BYTES = 4096
"""Of the kernel, for a client that never reads: what it holds there is no cost of the gateway's."""
_LOOK_SECONDS = 0.05
_ASK_SECONDS = 0.2
"""Between questions for metrics, which cost the gateway some milliseconds: nobody else is measured then."""
_CANCEL_SECONDS = 0.3


class NeighbourAssignment(msgspec.Struct, kw_only=True, frozen=True):
    """What to do, and to whom."""

    host: str
    port: int
    pid: int
    path: str
    """With ``%d`` for the session's name."""
    dialect: str
    headers: tuple[str, ...] = ()
    readers: int
    stalled: int
    """Clients that ask and then never read."""
    plan: Plan
    """Whoever was answered asks again."""


class NeighbourMeasurement(msgspec.Struct, kw_only=True, frozen=True):
    """What they saw."""

    tokens_per_s: float
    """Of those that read, together."""
    closed_after_s: tuple[float, ...] = ()
    """Of those that never read, in order: from asking until the process had closed the connection."""
    still_open: int = 0
    given_up_after_s: float | None = None
    """Nobody but clients that never read: until the first was no longer served, by the gateway's own count.
    From then on its session is one without a socket, whose turn goes on."""
    kb_per_stalled: float | None = None
    """The most that the process's resident memory had grown by until then, for each."""


class StalledClient:
    """Upgrades, asks, and never reads again."""

    def __init__(self, assignment: NeighbourAssignment, session: str) -> None:
        self._assignment = assignment
        self._session = session
        self._socket = socket.socket()
        self.asked_at = 0.0
        self.closed_after: float | None = None

    async def ask(self, text: bytes) -> None:
        """Connect and ask. Raises ``BenchError`` and ``OSError``."""
        loop, assignment = asyncio.get_running_loop(), self._assignment
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        await loop.sock_connect(self._socket, (assignment.host, assignment.port))
        await loop.sock_sendall(self._socket, _request(assignment, self._session))
        head = b""
        while b"\r\n\r\n" not in head:
            # Byte by byte: what comes after the head stays where it is.
            data = await loop.sock_recv(self._socket, 1)
            if not data:
                raise BenchError("the connection was lost in the upgrade")
            head += data
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise BenchError(f"the upgrade was answered with {head.splitlines()[0].decode('latin-1')!r}")
        opcode = 2 if assignment.dialect == "v2-msgpack" else 1
        await loop.sock_sendall(self._socket, masked_frame(text, opcode=opcode))
        self.asked_at = time.monotonic()

    def look(self, held: set[tuple[int, int]]) -> None:
        """Notice when the connection is none of those (local port, remote port) that the process holds."""
        if self.closed_after is None and (self._assignment.port, self._socket.getsockname()[1]) not in held:
            self.closed_after = time.monotonic() - self.asked_at

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def held_connections() -> set[tuple[int, int]]:
    """(local port, remote port) of the TCP connections that a process of this machine has open.

    What its owner has closed and the kernel still delivers is in the table too, but has no inode.
    """
    found: set[tuple[int, int]] = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net", table)
        for line in path.read_text("ascii").splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] != "0":
                found.add((int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16)))
    return found


class Neighbourhood:
    """All of them."""

    def __init__(self, assignment: NeighbourAssignment) -> None:
        self._assignment = assignment
        self._plan = assignment.plan
        self._name = f"neighbour-{time.time_ns()}"
        self._readers: list[SocketClient] = []
        self._stalled: list[StalledClient] = []
        self._latencies: list[int] = []
        self._answered_tokens = 0
        self._asked = 0

    async def live(self, ended: asyncio.Event) -> NeighbourMeasurement:
        """Be there until ``ended``, and leave nothing behind. Raises ``BenchError`` and ``OSError``."""
        assignment = self._assignment
        before = resident_kilobytes(assignment.pid)
        for number in range(assignment.stalled):
            stalled = StalledClient(assignment, self._session(number))
            self._stalled.append(stalled)
            await stalled.ask(self._message())
        for number in range(assignment.stalled, assignment.stalled + assignment.readers):
            request = _request(assignment, self._session(number))
            self._readers.append(await self._connect(request))
        asking = [asyncio.ensure_future(self._ask_on(client)) for client in self._readers]
        if self._readers:
            await asyncio.wait([client.had_first_token for client in self._readers], timeout=ANSWER_SECONDS)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        started, had = time.monotonic(), self._tokens
        watching = asyncio.ensure_future(self._watch(ended, asking))
        peak, given_up_after = before, None
        if assignment.stalled and not assignment.readers:
            peak, given_up_after = await self._watch_memory(ended)
        await watching
        tokens_per_s = (self._tokens - had) / (time.monotonic() - started)
        for one in asking:
            one.cancel()
        await self._leave()
        closed = sorted(one.closed_after for one in self._stalled if one.closed_after is not None)
        return NeighbourMeasurement(
            tokens_per_s=round(tokens_per_s),
            closed_after_s=tuple(round(seconds, 2) for seconds in closed),
            still_open=assignment.stalled - len(closed),
            given_up_after_s=given_up_after,
            kb_per_stalled=None if given_up_after is None else round((peak - before) / assignment.stalled, 1),
        )

    async def _watch_memory(self, ended: asyncio.Event) -> tuple[int, float | None]:
        """The most memory until the first client is not served any more, and when that was."""
        assignment, peak = self._assignment, 0
        while not ended.is_set():
            resident = resident_kilobytes(assignment.pid)
            gauges = await asyncio.to_thread(
                read_gauges, assignment.host, assignment.port, assignment.headers
            )
            if gauges.get(SOCKETS_OPEN, 0) < assignment.stalled:
                return peak, round(time.monotonic() - self._stalled[0].asked_at, 2)
            peak = max(peak, resident)
            await asyncio.sleep(_ASK_SECONDS)
        return peak, None

    async def _watch(self, ended: asyncio.Event, asking: Sequence[asyncio.Future[None]]) -> None:
        """Look at all of them until ``ended``. Raises ``BenchError`` when one that reads is cut off."""
        while not ended.is_set():
            held = held_connections() if self._stalled else set()
            for stalled in self._stalled:
                stalled.look(held)
            for one in asking:
                if one.done():
                    one.result()
            await asyncio.sleep(_LOOK_SECONDS)

    @property
    def _tokens(self) -> int:
        return self._answered_tokens + sum(client.tokens for client in self._readers)

    async def _ask_on(self, client: SocketClient) -> None:
        while True:
            await client.ask(self._message())
            self._answered_tokens += client.tokens
            client.tokens = 0
            self._latencies.clear()

    async def _leave(self) -> None:
        """Stop what still runs for them, so that whoever is measured next has no neighbours."""
        assignment = self._assignment
        for number, stalled in enumerate(self._stalled):
            stalled.close()
            self._readers.append(await self._connect(_request(assignment, self._session(number))))
        for client in self._readers:
            self._asked += 1
            client.say(cancel(assignment.dialect, f"{self._name}-{self._asked}"))
        await asyncio.sleep(_CANCEL_SECONDS)
        for client in self._readers:
            client.cut()
        await until_quiet(assignment.pid)

    async def _connect(self, request: bytes) -> SocketClient:
        assignment = self._assignment
        host, port, dialect = assignment.host, assignment.port, assignment.dialect
        return await connect(host, port, request, dialect, self._latencies, within=ANSWER_SECONDS)

    def _session(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _message(self) -> bytes:
        self._asked += 1
        return message(self._assignment.dialect, self._plan, f"{self._name}-{self._asked}")


def _request(assignment: NeighbourAssignment, session: str) -> bytes:
    path = assignment.path.replace("%d", session)
    host = f"{assignment.host}:{assignment.port}"
    return upgrade_request(host, path, assignment.dialect, list(assignment.headers))


async def _run(assignment: NeighbourAssignment) -> NeighbourMeasurement:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 1):
            loop.remove_reader(sys.stdin.fileno())
            ended.set()

    loop.add_reader(sys.stdin.fileno(), read)
    return await Neighbourhood(assignment).live(ended)


def main() -> int:
    """Do what standard input says."""
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=NeighbourAssignment)
    return report(_run(assignment))


if __name__ == "__main__":
    sys.exit(main())
