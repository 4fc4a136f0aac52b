"""A TCP proxy between a client and the gateway that cuts connections after random numbers of bytes."""

from __future__ import annotations

import random
import socket
import struct

import trio


class CuttingProxy:
    """Passes bytes both ways; each connection is reset once its budget of bytes has passed."""

    def __init__(self, port: int, randomness: random.Random, *, mean_bytes: float = 3000.0) -> None:
        self._target = port
        self._random = randomness
        self._mean_bytes = mean_bytes
        self.port = 0
        self.cuts = 0
        self.connections = 0
        self._was_cut = trio.lowlevel.ParkingLot()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def wait_cuts(self, count: int) -> None:
        """Wait until there have been so many cuts."""
        while self.cuts < count:
            await self._was_cut.park()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        budget = self._random.expovariate(1 / self._mean_bytes)
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self._target)
        except OSError:
            await trio.aclose_forcefully(client)
            return
        pipe = _Pipe(budget)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipe.pump, client, server, nursery.cancel_scope)
                nursery.start_soon(pipe.pump, server, client, nursery.cancel_scope)
        finally:
            self.cuts += pipe.was_cut
            self._was_cut.unpark_all()
            if pipe.was_cut and self._random.random() < 0.5:
                _reset_on_close(client)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(client)
                await trio.aclose_forcefully(server)


class _Pipe:
    """Both directions of one connection, with one budget."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.was_cut = False

    async def pump(
        self, source: trio.SocketStream, target: trio.SocketStream, over: trio.CancelScope
    ) -> None:
        """Pass bytes on until an end or the cut; then end the other direction too."""
        try:
            while data := await source.receive_some(4096):
                if len(data) >= self._budget:
                    self.was_cut = True
                    await target.send_all(bytes(data)[: int(self._budget)])
                    break
                self._budget -= len(data)
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        over.cancel()


def _reset_on_close(stream: trio.SocketStream) -> None:
    """Close with RST (SO_LINGER with a time of zero), as a dying network does."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
