"""A v2 client that listens to one answer across restarts of gateways, and checks every event it gets.

It does what ``docs/protocol.md`` asks of clients: comes back when ``draining`` says, after another end with
full jitter, resumes by epoch and seq, tries the next node when one does not take it. Asyncio's protocols and
no more, so that hundreds of them leave the machine to the gateways.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from gateway.bench.socket_client import masked_frame, upgrade_request, whole_frames

BACKOFF = 0.5
"""protocol.md section 6: the most that is waited before the first try."""
BACKOFF_MOST = 5.0
ACK_EVENTS = 100
ACK_SECONDS = 1.0
RECONNECTABLE = (1001, 1006, 1011, 1012, 1013, 4408, 4413, 4429)
_DRAINING = b'"draining"'


class StreamListener:
    """One session. ``ports`` gives those of the nodes that a client may try now."""

    def __init__(
        self, session_id: str, ports: Callable[[], Sequence[int]], *, pace: float, seed: int, first: int
    ) -> None:
        self.session_id = session_id
        self._ports = ports
        self._pace = pace
        self._random = random.Random(f"{seed}/{session_id}")
        self._choice = first
        self.epoch: str | None = None
        self.last_seq = 0
        self.tokens = 0
        """The next token's number."""
        self.outcomes: list[str] = []
        self.violations: list[str] = []
        self.joins = 0
        self.refused = 0
        """Connections that were not taken, or were lost before their welcome."""
        self.snapshots = 0
        self.longest_gap = 0.0
        """Seconds between two arrivals of tokens."""
        self._token_at: float | None = None
        self.had_token = asyncio.Event()
        self.ended = asyncio.Event()
        self._failures = 0
        self.gaps: list[tuple[float, float]] = []
        """(when it ended, how long) of those that are longer than twice the pace."""

    @property
    def pause(self) -> float:
        """The longest time between two tokens, beyond the pace; seconds."""
        return max(0.0, self.longest_gap - self._pace)

    async def run(self) -> None:
        """Say one message and listen until its turn has ended."""
        loop = asyncio.get_running_loop()
        while not self.ended.is_set():
            ports = list(self._ports())
            port = ports[self._choice % len(ports)]
            try:
                _, socket = await loop.create_connection(lambda: _Socket(self), "127.0.0.1", port)
            except OSError:
                self.refused += 1
                self._choice += 1
                self._failures += 1
                # The next node at once, and slowly when all of them refused.
                await asyncio.sleep(0 if self._failures % len(ports) else self._backoff())
                continue
            resume = f"?epoch={quote(self.epoch)}&last_seq={self.last_seq}" if self.epoch else ""
            path = f"/api/v1/ws/{self.session_id}"
            socket.open(upgrade_request(f"127.0.0.1:{port}", path, "v2-json", [], resume))
            code = await socket.closed
            socket.abort()
            if self.ended.is_set():
                return
            if code not in RECONNECTABLE:
                self.violations.append(f"closed with {code}")
                self.ended.set()
                return
            if not socket.was_welcome:
                self.refused += 1
                self._failures += 1
                self._choice += 1
            now = loop.time()
            if socket.come_back_at is not None:
                self._choice += 1
                await asyncio.sleep(max(0.0, socket.come_back_at - now))
            else:
                await asyncio.sleep(self._backoff())

    def _backoff(self) -> float:
        return self._random.uniform(0, min(BACKOFF_MOST, BACKOFF * 2 ** min(self._failures, 8)))

    # ------------------------------------------------------------------ what a socket got

    def welcome(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The first object; gives what there is to say."""
        self.joins += 1
        self._failures = 0
        if self.epoch is None:
            self.epoch = item["epoch"]
            self.last_seq = item["last_seq"]
        elif not item["resumed"]:
            self.violations.append(f"not resumed at {self.last_seq} of {self.epoch}")
        if self.tokens == 0 and self.last_seq == 0:
            return [{"type": "user_message", "content": "count", "id": "m1"}]
        return []

    def take(self, item: dict[str, Any], now: float) -> None:
        """One object after the welcome."""
        kind = item["type"]
        if kind == "snapshot":
            self.snapshots += 1
            self.violations.append(f"a snapshot: {item['reason']}")
            self.epoch, self.last_seq = item.get("epoch", self.epoch), item["seq"]
            return
        if kind == "nack":
            self.violations.append(f"nack {item['code']}")
            return
        seq = item.get("seq")
        if seq is None or kind in ("ack", "authenticated"):
            return
        first = item.get("first_seq", seq)
        if first != self.last_seq + 1:
            self.violations.append(f"seq {first} came after {self.last_seq}")
        self.last_seq = seq
        if kind == "assistant_message":
            self._tokens(item["token"].split(), now)
        elif kind == "turn_ended":
            self.outcomes.append(item["outcome"])
            self.ended.set()
        elif kind == "error":
            self.violations.append(f"error {item['code']}")

    def _tokens(self, words: list[str], now: float) -> None:
        for word in words:
            if int(word) != self.tokens:
                self.violations.append(f"token {word} came where {self.tokens} was due")
            self.tokens = int(word) + 1
        if self._token_at is not None:
            gap = now - self._token_at
            self.longest_gap = max(self.longest_gap, gap)
            if gap > 2 * self._pace + 0.05:
                self.gaps.append((now, gap))
        self._token_at = now
        self.had_token.set()


class _Socket(asyncio.Protocol):
    """One socket of a listener."""

    def __init__(self, listener: StreamListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._rest = b""
        self._is_upgraded = False
        self.was_welcome = False
        self.come_back_at: float | None = None
        self.closed: asyncio.Future[int] = self._loop.create_future()
        self._unacked = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    def open(self, request: bytes) -> None:
        """Ask for the upgrade."""
        self._transport.write(request)

    def abort(self) -> None:
        """Drop it."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        self._over(1006)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        now = self._loop.time()
        data = self._rest + data
        if not self._is_upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            if b" 101 " not in head.split(b"\r\n", 1)[0]:
                self._over(1013 if b" 503 " in head else 1006)
                return
            self._is_upgraded = True
        end_of_frames, control = whole_frames(data)
        self._rest = data[end_of_frames:]
        at = 0
        for opcode, start, stop in control:
            head_at = start - (2 if stop - start < 126 else 4)
            self._frames(data[at:head_at], now)
            at = stop
            if opcode == 9:
                self._transport.write(masked_frame(data[start:stop], opcode=10))
            elif opcode == 8:
                self._transport.write(masked_frame(data[start : start + 2], opcode=8))
                self._over(int.from_bytes(data[start : start + 2], "big") or 1005)
        self._frames(data[at:end_of_frames], now)

    def _frames(self, frames: bytes, now: float) -> None:
        at = 0
        while at < len(frames):
            length, start = frames[at + 1] & 127, at + 2
            if length == 126:
                length, start = int.from_bytes(frames[start : start + 2], "big"), start + 2
            elif length == 127:
                length, start = int.from_bytes(frames[start : start + 8], "big"), start + 8
            at = start + length
            value = msgspec.json.decode(frames[start:at])
            for item in value if isinstance(value, list) else [value]:
                self._take(item, now)

    def _take(self, item: dict[str, Any], now: float) -> None:
        listener = self._listener
        if not self.was_welcome:
            self.was_welcome = True
            for message in listener.welcome(item):
                self._transport.write(masked_frame(msgspec.json.encode(message)))
            return
        if item["type"] == "draining":
            self.come_back_at = now + item["reconnect_after_ms"] / 1000
            # A client leaves by itself then, whether the gateway has closed the socket or not.
            self._loop.call_at(self.come_back_at, self._over, 1012)
            return
        listener.take(item, now)
        self._unacked += 1
        if self._unacked >= ACK_EVENTS or item["type"] == "turn_ended":
            self._ack()
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_SECONDS, self._ack)
        if listener.ended.is_set():
            self._over(1000)

    def _ack(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._unacked = 0
        if not self._transport.is_closing():
            self._transport.write(masked_frame(b'{"type":"ack","seq":%d}' % self._listener.last_seq))

    def _over(self, code: int) -> None:
        if not self.closed.done():
            self.closed.set_result(code)
