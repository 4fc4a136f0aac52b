"""A client's socket that another node holds, as the session sees it: a connection like any other.

All that a socket is owed (position, replay, merging, acknowledgements, windows) is decided here, where the
session runs, by the very code that serves sockets of this node. The holder passes frames on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import trio

from gateway.core.letters import Ended, Letter, Sent
from gateway.core.websocket_protocol import CloseCode
from gateway.ports import ClientConnection, ConnectionClosed, Hear

UNSENT_BYTES = 1 << 20
"""On their way to the holder, or waiting there for the client: more wait here."""
MOST_FRAMES = 1024
"""Frames of the client that wait to be read here: a flood, for reading waits for nothing slow."""


class RemoteConnection(ClientConnection):
    """See ``ports.ClientConnection``. ``post`` sends a letter to the holder.

    A v1 session has to know exactly what its client cannot have received, so with ``waits`` each send counts
    as unfinished until the holder says that the kernel has it. A v2 client says itself what it has.
    """

    def __init__(self, relay: int, post: Callable[[Letter], None], *, waits: bool) -> None:
        self._relay = relay
        self._post = post
        self._waits = waits
        self._frames: deque[str | bytes] = deque()
        self._said = trio.Event()
        self._sizes: deque[int] = deque()
        """Of the payloads that the holder has not told of yet."""
        self._taken = 0
        self._unsent_bytes = 0
        self._moved = trio.Event()
        self._closed: ConnectionClosed | None = None

    # ------------------------------------------------------------------ what the holder tells

    def said(self, frame: str | bytes) -> None:
        """A frame of the client."""
        if self._closed is not None:
            return
        self._frames.append(frame)
        self._said.set()
        if len(self._frames) > MOST_FRAMES:
            self._end(CloseCode.RATE_LIMITED, "too many messages at once")

    def took(self, count: int) -> None:
        """So many payloads of all are in the kernel's hands."""
        while self._taken < count and self._sizes:
            self._taken += 1
            self._unsent_bytes -= self._sizes.popleft()
        self._moved.set()

    def gone(self, code: int, reason: str) -> None:
        """The client's socket is over."""
        if self._closed is None:
            self._closed = ConnectionClosed(code, reason)
            self._said.set()
            self._moved.set()

    def lost(self, code: int, reason: str) -> None:
        """The way to the holder is over: what was on it counts as taken, for no token may come twice."""
        self.took(self._taken + len(self._sizes))
        self.gone(code, reason)

    @property
    def is_over(self) -> bool:
        """Whether the client's socket is, or the way to it."""
        return self._closed is not None

    # ------------------------------------------------------------------ ClientConnection

    @property
    def sends_pings(self) -> bool:
        """The holder does."""
        return False

    @property
    def unsent(self) -> int:
        """Payloads that the holder has not told of."""
        return len(self._sizes)

    async def receive(self, hear: Hear | None = None) -> str | bytes:  # noqa: ARG002
        """The next frame. Raises ``ConnectionClosed``."""
        await trio.lowlevel.checkpoint()
        while not self._frames:
            if self._closed is not None:
                raise self._closed
            self._said = trio.Event()
            await self._said.wait()
        return self._frames.popleft()

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Send to the holder. Raises ``ConnectionClosed``."""
        self._sizes.extend(map(len, payloads))
        self._unsent_bytes += sum(map(len, payloads))
        if self._closed is not None:
            raise self._closed
        self._post(Sent(self._relay, tuple(payloads)))
        return not self._is_full

    @property
    def _is_full(self) -> bool:
        return bool(self._sizes) if self._waits else self._unsent_bytes > UNSENT_BYTES

    async def wait_sent(self) -> None:
        """Wait until there is room. Raises ``ConnectionClosed``."""
        await trio.lowlevel.checkpoint()
        while self._is_full:
            if self._closed is not None:
                raise self._closed
            self._moved = trio.Event()
            await self._moved.wait()

    async def ping(self) -> None:
        """Not called: see ``sends_pings``."""
        await trio.lowlevel.checkpoint()

    async def close(self, code: int, reason: str = "") -> None:
        """Have the holder close it."""
        if self._closed is None:
            self._end(code, reason)

    def _end(self, code: int, reason: str) -> None:
        self._post(Ended(self._relay, int(code), reason))
        self.gone(int(code), reason)
