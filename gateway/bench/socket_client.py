"""A WebSocket client that costs next to nothing: bytes in, frames found, timestamps read by pattern.

Nothing of the gateway's own code is used here: what is measured is what came over the wire.
"""

from __future__ import annotations

import asyncio
import re
import time
from urllib.parse import quote

DIALECTS = {"v1": None, "v2-json": "codelab.v2.json", "v2-msgpack": "codelab.v2.msgpack"}
"""What a client asks for by each name: the subprotocol of RFC 6455, or none."""

ACK_EVENTS = 100
"""protocol.md section 4: an acknowledgement at the latest every 100 events …"""
ACK_SECONDS = 1.0
"""… or every second."""

_TEXT_STAMP = re.compile(rb'"t": ?(\d+)')
_TEXT_SEQ = re.compile(rb'"seq":(\d+)')
_BINARY_STAMP = re.compile(rb"\xa1t\xcf(.{8})", re.DOTALL)
_BINARY_SEQ = re.compile(rb"\xa3seq(?:([\x00-\x7f])|\xcc(.)|\xcd(.{2})|\xce(.{4})|\xcf(.{8}))", re.DOTALL)
_FINAL = re.compile(rb'"is_final": ?true')
_EPOCH = re.compile(rb'"epoch": ?"([^"]+)"|\xa5epoch([\xa0-\xbf][\x21-\x7e]+)', re.DOTALL)


class BenchError(Exception):
    """The peer did not do what the scenario needs; the message says what."""


def masked_frame(payload: bytes, *, opcode: int = 1) -> bytes:
    """A client's frame, masked with zeros: no cost, and as good as any to a server."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    else:
        head = bytes((0x80 | opcode, 0xFE)) + size.to_bytes(2, "big")
    return head + b"\0\0\0\0" + payload


def whole_frames(data: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """Where the whole frames in ``data`` end, and the control frames among them: opcode, start, end."""
    at, size, control = 0, len(data), []
    while at + 2 <= size:
        opcode, length, start = data[at] & 15, data[at + 1], at + 2
        if length == 126:
            start += 2
            if start > size:
                break
            length = data[at + 2] << 8 | data[at + 3]
        elif length == 127:
            start += 8
            if start > size:
                break
            length = int.from_bytes(data[at + 2 : start], "big")
        if start + length > size:
            break
        at = start + length
        if opcode >= 8:
            control.append((opcode, start, at))
    return at, control


class SocketClient(asyncio.Protocol):
    """One socket: sends a message, takes what comes, acknowledges where the dialect has it."""

    def __init__(self, dialect: str, latencies: list[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_v2 = dialect != "v1"
        self._is_binary = dialect == "v2-msgpack"
        self._stamp = _BINARY_STAMP if self._is_binary else _TEXT_STAMP
        self._latencies = latencies
        """Nanoseconds that each token but the first of an answer was on its way."""
        self._transport: asyncio.Transport
        self._rest = b""
        self._is_upgraded = False
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self.answered: asyncio.Future[None] = self._loop.create_future()
        """Done with the end of the answer that comes next, whoever asked for it."""
        self._sent_at = 0
        self._unacked = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self.first_latency = 0
        """Nanoseconds from the message to its answer's first token."""
        self.tokens = 0
        """Tokens of the answer so far."""
        self.last_seq = 0
        self.epoch = ""
        self.cuts_at_first_token = False
        self.had_first_token: asyncio.Future[None] = self._loop.create_future()
        self._is_closed_by_us = False

    # ------------------------------------------------------------------ what scenarios call

    async def open(self, request: bytes) -> None:
        """Send the upgrade and wait for its answer; v2: for the welcome too. Raises ``BenchError``."""
        self._transport.write(request)
        await self._opened

    def ask(self, message: bytes) -> asyncio.Future[None]:
        """Send a message; the future is done with the end of its answer."""
        self.answered = self._loop.create_future()
        self.tokens = 0
        self.first_latency = 0
        self._sent_at = time.monotonic_ns()
        self.say(message)
        return self.answered

    def say(self, message: bytes) -> None:
        """Send a message that no answer of its own is expected to."""
        self._transport.write(masked_frame(message, opcode=2 if self._is_binary else 1))

    def cut(self) -> None:
        """Drop the connection, as a network that goes away does."""
        self._is_closed_by_us = True
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        self._transport.abort()

    def leave(self) -> None:
        """Close as a client that is done does, without waiting for the answer."""
        self._is_closed_by_us = True
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        self._transport.write(masked_frame((1000).to_bytes(2, "big"), opcode=8))
        self._transport.close()

    # ------------------------------------------------------------------ called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        if not self._is_closed_by_us:
            self._fail("the connection was lost")

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        now = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
        if not self._is_upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            status = head.split(b"\r\n", 1)[0].decode("latin-1")
            if " 101 " not in status:
                self._fail(f"the upgrade was answered with {status!r}")
                return
            self._is_upgraded = True
            if not self._is_v2:
                self._opened.set_result(None)
        end_of_frames, control = whole_frames(data)
        self._rest = data[end_of_frames:]
        for opcode, start, stop in control:
            self._take_control(opcode, data[start:stop])
        if end_of_frames:
            # Only whole frames are looked at, so that no number is taken for two, or for a shorter one.
            self._take_frames(data[:end_of_frames], now)

    def _take_frames(self, frames: bytes, now: int) -> None:
        stamps = self._stamp.findall(frames)
        if stamps:
            if self._is_binary:
                stamps = [int.from_bytes(stamp, "big") for stamp in stamps]
            self._take_tokens(stamps, now)
        if self._is_v2:
            self._take_v2(frames, len(stamps))
        elif not self.answered.done() and _FINAL.search(frames):
            self.answered.set_result(None)

    def _take_tokens(self, stamps: list[bytes] | list[int], now: int) -> None:
        is_first = not self.tokens
        self.tokens += len(stamps)
        if is_first:
            self.first_latency = now - self._sent_at
            stamps = stamps[1:]
        self._latencies += [now - int(stamp) for stamp in stamps]
        if is_first and not self.had_first_token.done():
            self.had_first_token.set_result(None)
            if self.cuts_at_first_token:
                self.cut()

    def _take_v2(self, frames: bytes, events: int) -> None:
        if not self._opened.done():
            self.epoch = _epoch(frames)
            if not self.epoch:
                self._fail("the first frame is no welcome")
                return
            self._opened.set_result(None)
        # The newest stands last, but for a frame that is not of the log.
        if self._is_binary:
            for groups in reversed(_BINARY_SEQ.findall(frames)):
                self.last_seq = max(self.last_seq, int.from_bytes(b"".join(groups), "big"))
                break
        else:
            at = frames.rfind(b'"seq":')
            if at >= 0 and (seq := _TEXT_SEQ.match(frames, at)) is not None:
                self.last_seq = max(self.last_seq, int(seq[1]))
        self._unacked += events
        is_over = b"turn_ended" in frames
        if self._unacked >= ACK_EVENTS or is_over:
            self._ack()
        elif self._unacked and self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_SECONDS, self._ack)
        if is_over and not self.answered.done():
            self.answered.set_result(None)

    def _ack(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._unacked = 0
        if self._transport.is_closing():
            return
        if self._is_binary:
            ack = b"\x82\xa4type\xa3ack\xa3seq\xce" + self.last_seq.to_bytes(4, "big")
            self._transport.write(masked_frame(ack, opcode=2))
        else:
            self._transport.write(masked_frame(b'{"type":"ack","seq":%d}' % self.last_seq))

    def _take_control(self, opcode: int, payload: bytes) -> None:
        if opcode == 9:
            self._transport.write(masked_frame(payload, opcode=10))
        elif opcode == 8 and not self._is_closed_by_us:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            self._fail(f"the socket was closed with {code} {payload[2:].decode('utf-8', 'replace')}".rstrip())

    def _fail(self, reason: str) -> None:
        for waiting in (self._opened, self.answered, self.had_first_token):
            if not waiting.done():
                waiting.set_exception(BenchError(reason))
                waiting.exception()  # seen: nobody may be waiting for this one


def _epoch(frames: bytes) -> str:
    found = _EPOCH.search(frames)
    if found is None:
        return ""
    # MessagePack: a byte that holds the length, then the text.
    text = found[1] or found[2][1 : 1 + (found[2][0] & 31)]
    return text.decode("ascii")


async def connect(
    host: str, port: int, request: bytes, dialect: str, latencies: list[int], *, within: float
) -> SocketClient:
    """A client whose upgrade was accepted. Raises ``BenchError``, ``TimeoutError`` and ``OSError``."""
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: SocketClient(dialect, latencies), host, port
    )
    try:
        async with asyncio.timeout(within):
            await client.open(request)
    except BaseException:
        client.cut()
        raise
    return client


def upgrade_request(host: str, path: str, dialect: str, headers: list[str], query: str = "") -> bytes:
    """The head of an upgrade (RFC 6455 section 4.1)."""
    lines = [
        f"GET {quote(path)}{query} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *([f"Sec-WebSocket-Protocol: {DIALECTS[dialect]}"] if DIALECTS[dialect] else []),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
