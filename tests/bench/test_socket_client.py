"""The load's client: every token counted once, however it is cut, in every dialect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gateway.bench.socket_client import (
    ACK_EVENTS,
    BenchError,
    SocketClient,
    masked_frame,
    upgrade_request,
    whole_frames,
)
from gateway.core.websocket_frames import binary_frame, ping_frame, text_frame

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Called by the client."""
        self.written += bytes(data)

    def is_closing(self) -> bool:
        """Called by the client."""
        return False


def exchange(dialect: str, pieces: Callable[[bytes], list[bytes]], frames: bytes) -> tuple[Any, ...]:
    """Give a client an upgrade and ``frames`` in ``pieces``; returns it, its latencies and its wire."""

    async def run() -> tuple[Any, ...]:
        latencies: list[int] = []
        client, wire = SocketClient(dialect, latencies), Wire()
        client.connection_made(wire)
        client.answered.add_done_callback(lambda done: done.exception())
        for piece in pieces(ANSWER + frames):
            client.data_received(piece)
        if client._ack_timer is not None:
            client._ack_timer.cancel()
        return client, latencies, wire.written

    return asyncio.run(run())


def byte_by_byte(data: bytes) -> list[bytes]:
    """The worst cut there is."""
    return [data[at : at + 1] for at in range(len(data))]


def in_sevens(data: bytes) -> list[bytes]:
    """Timestamps, heads and frames cut anywhere."""
    return [data[at : at + 7] for at in range(0, len(data), 7)]


def token(number: int, **more: object) -> dict[str, object]:
    """One token, stamped now."""
    return {
        **more,
        "type": "assistant_message",
        "token": f"tok{number} ",
        "is_final": False,
        "t": time.monotonic_ns(),
    }


@pytest.mark.parametrize("pieces", [byte_by_byte, in_sevens, lambda data: [data]])
def test_a_timestamp_that_is_cut_is_counted_once(pieces: Callable[[bytes], list[bytes]]) -> None:
    """Neither its halves as two tokens, nor a half as an earlier time."""
    frames = b"".join(text_frame(msgspec.json.encode(token(number))) for number in range(50))
    client, latencies, _ = exchange("v1", pieces, frames)
    assert client.tokens == 50
    assert len(latencies) == 49  # the first is told apart
    assert all(0 <= latency < 10**10 for latency in latencies)


@pytest.mark.parametrize("pieces", [byte_by_byte, in_sevens, lambda data: [data]])
@pytest.mark.parametrize("dialect", ["v2-json", "v2-msgpack"])
def test_v2_is_read_in_both_encodings_and_acknowledged(
    dialect: str, pieces: Callable[[bytes], list[bytes]]
) -> None:
    """At the latest every 100 events, with the newest seq; the end of the turn is seen."""
    is_binary = dialect == "v2-msgpack"
    encode = msgspec.msgpack.encode if is_binary else msgspec.json.encode
    frame = binary_frame if is_binary else text_frame
    count = 2 * ACK_EVENTS + 5
    messages: list[object] = [{"type": "welcome", "epoch": "AbCdEfGhIjKlMnOp", "last_seq": 0}]
    messages += [token(seq, seq=seq) for seq in range(1, count - 4)]
    messages.append([token(seq, seq=seq) for seq in range(count - 4, count + 1)])
    messages.append({"seq": count + 1, "type": "turn_ended", "outcome": "completed"})
    client, latencies, written = exchange(dialect, pieces, b"".join(frame(encode(one)) for one in messages))
    assert client.epoch == "AbCdEfGhIjKlMnOp"
    assert (client.tokens, client.last_seq) == (count, count + 1)
    assert len(latencies) == count - 1
    assert client.answered.done()
    last_ack = {"type": "ack", "seq": count + 1}
    if is_binary:
        assert written.endswith(b"\xa3seq\xce" + (count + 1).to_bytes(4, "big"))
    else:
        assert written.endswith(msgspec.json.encode(last_ack))


def test_a_ping_is_answered_between_the_halves_of_a_frame() -> None:
    """A client that does not answer is cut off, and the idle scenario lasts longer than a heartbeat."""
    data = text_frame(msgspec.json.encode(token(1)))
    client, _, written = exchange("v1", lambda all_of_it: [all_of_it], ping_frame(b"beat") + data)
    assert written == masked_frame(b"beat", opcode=10)
    assert client.tokens == 1


def test_a_refused_upgrade_and_a_close_say_why() -> None:
    """What the bench then prints has to help."""

    async def run(data: bytes) -> str:
        client = SocketClient("v1", [])
        client.connection_made(Wire())
        opening = asyncio.ensure_future(client.open(b""))
        await asyncio.sleep(0)
        client.data_received(data)
        waiting = client.answered if opening.done() or client._opened.done() else opening
        with pytest.raises(BenchError) as caught:
            await waiting
        opening.cancel()
        return str(caught.value)

    assert "401" in asyncio.run(run(b"HTTP/1.1 401 Unauthorized\r\n\r\n"))
    closed = b"\x88\x0b" + (4413).to_bytes(2, "big") + b"too slow!"
    assert "4413 too slow!" in asyncio.run(run(ANSWER + closed))


def test_frames_of_every_length_are_found() -> None:
    """RFC 6455 section 5.2: three ways to say a length."""
    for size in (0, 125, 126, 65535, 65536, 100_000):
        frame = text_frame(b"x" * size)
        assert whole_frames(frame + frame[:-1] if size else frame)[0] == len(frame)
        assert whole_frames(frame[:1])[0] == 0


def test_the_upgrade_asks_for_the_dialect() -> None:
    """v1 asks for none."""
    assert b"Protocol" not in upgrade_request("h", "/p", "v1", [])
    request = upgrade_request("h", "/p", "v2-json", ["X-A: b"], "?epoch=e")
    assert request.startswith(b"GET /p?epoch=e HTTP/1.1\r\n")
    assert b"\r\nSec-WebSocket-Protocol: codelab.v2.json\r\nX-A: b\r\n\r\n" in request
