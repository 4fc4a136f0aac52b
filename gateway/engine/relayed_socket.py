"""A client's socket on this node whose session runs on another: frames go through as they are.

connection nursery
├── reader       socket → letters
├── flusher      letters → socket, while the socket does not take all it is given
└── heartbeat
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from gateway.core.delivery import encode_control
from gateway.core.flow import Flow
from gateway.core.letters import Gone, Letter, Said, Took
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.engine.flusher import Ending, Flusher, wait_sent_in_time
from gateway.engine.heartbeat import Heartbeat, Heartbeats
from gateway.ports import ClientConnection, ConnectionClosed


class RelayedSocket:
    """Carries one socket. ``post`` sends a letter to the node that serves it."""

    def __init__(
        self,
        relay: int,
        connection: ClientConnection,
        dialect: Dialect,
        post: Callable[[Letter], None],
        *,
        flow: Flow,
        heartbeats: Heartbeats,
    ) -> None:
        self._relay = relay
        self._connection = connection
        self._post = post
        self._flow = flow
        self._heartbeats = heartbeats
        self._waiting: list[bytes] = []
        self._taken = 0
        self._in_hand = 0
        """Payloads given to the connection and not taken by the kernel yet."""
        self._is_greeted = False
        self._is_blocked = False
        self._flusher = Flusher(lambda: self._is_blocked, self._wait_taken)
        self._ending: tuple[int, str] | None = None
        self._over = trio.CancelScope()
        self.dialect = dialect
        self.is_v2 = dialect.is_v2
        self.alive_at = trio.current_time()
        self.rtt: float | None = None

    @property
    def unacked_bytes(self) -> int:
        """Counted where the session runs."""
        return 0

    # ------------------------------------------------------------------ what the other node tells

    def sent(self, payloads: Sequence[bytes]) -> None:
        """Payloads for the client."""
        self._is_greeted = True
        self._waiting += payloads
        if not self._is_blocked:
            self._flush()

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon; the first call decides the code."""
        if self._ending is None:
            self._ending = (code, reason)
            self._over.cancel()

    def send_control(self, fields: dict[str, object]) -> None:
        """Send one object of this node's own, which the other does not count; never before its welcome."""
        if self._is_greeted and not self._is_blocked:
            payload = encode_control(fields, self.dialect)
            self._flow.frames_sent += 1
            self._flow.bytes_sent += len(payload)
            try:
                self._is_blocked = not self._connection.send_nowait((payload,))
            except ConnectionClosed:
                self._is_blocked = True
            if self._is_blocked:
                self._flusher.need()

    def _flush(self) -> None:
        payloads, self._waiting = self._waiting, []
        if not payloads:
            return
        self._flow.frames_sent += len(payloads)
        self._flow.bytes_sent += sum(map(len, payloads))
        self._in_hand = len(payloads)
        try:
            if self._connection.send_nowait(payloads):
                self._took()
                return
        except ConnectionClosed:
            pass  # The reader learns it too, and says how it ended.
        self._is_blocked = True
        self._flusher.need()

    def _took(self) -> None:
        self._taken += self._in_hand
        self._in_hand = 0
        self._post(Took(self._relay, self._taken))

    # ------------------------------------------------------------------ the connection's tasks

    async def run(self) -> tuple[int, str]:
        """Carry the socket until it is over; returns the code and reason to close it with."""
        closed: tuple[int, str] | None = None
        with self._over:
            if self._ending is not None:
                return self._ending
            async with trio.open_nursery() as nursery:
                self._flusher.begin(partial(nursery.start_soon, self._run_flusher))
                heartbeat = Heartbeat(self._heartbeats, self._connection, self, nursery.start_soon)
                try:
                    await self._read()
                except ConnectionClosed as ending:
                    closed = (ending.code, ending.reason)
                finally:
                    self._flusher.finish()
                    heartbeat.finish()
                nursery.cancel_scope.cancel()
        # What the kernel has of the last batch matters to a v1 client that comes back.
        if self._in_hand:
            self._post(Took(self._relay, self._taken + max(0, self._in_hand - self._connection.unsent)))
        code, reason = self._ending or closed or (int(CloseCode.RESTARTING), "restarting; reconnect")
        self._post(Gone(self._relay, int(code), reason))
        return int(code), reason

    async def _read(self) -> None:
        while True:
            frame = await self._connection.receive()
            self._flow.note_received(frame)
            self._post(Said(self._relay, frame))

    async def _run_flusher(self) -> None:
        try:
            ending = await self._flusher.run()
        except ConnectionClosed:
            return  # The reader learns it too, and says how it ended.
        if ending is not None:
            self.end(*ending)

    async def _wait_taken(self) -> Ending | None:
        ending = await wait_sent_in_time(self._connection, self._heartbeats.limits.send_timeout)
        if ending is None:
            self._is_blocked = False
            self._took()
            self._flush()
        return ending
