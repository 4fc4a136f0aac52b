"""Any bytes whatever on an open socket: they end that socket at most, and nothing is logged as a crash."""

from __future__ import annotations

from contextlib import suppress

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.adapters.websocket import WebSocketServer, WebSocketSettings
from gateway.ports import ClientConnection, ConnectionClosed
from tests.adapters.socket_harness import (
    RecordingTelemetry,
    ScriptedGate,
    client_frame,
    read_head_and_serve,
    upgrade_request,
)

FRAMES = st.builds(
    client_frame,
    st.integers(0, 0x7F),
    st.one_of(st.binary(max_size=130), st.text(max_size=60).map(str.encode)),
    final=st.booleans(),
    masked=st.sampled_from([True, True, True, False]),
)
BYTES = st.lists(st.one_of(FRAMES, FRAMES, st.binary(max_size=20)), max_size=8)
CHUNKS = st.lists(st.integers(1, 200), min_size=1, max_size=10)


async def _echo_or_close(connection: ClientConnection) -> None:
    """Echo, ping now and then, and begin a close by itself after a few messages."""
    try:
        for _ in range(4):
            message = await connection.receive()
            payload = message.encode() if isinstance(message, str) else message
            if not connection.send_nowait([payload]):
                await connection.wait_sent()
            with trio.move_on_after(0.01):
                await connection.ping()
    except ConnectionClosed:
        pass
    await connection.close(1000)


async def _feed(data: bytes, chunks: list[int]) -> RecordingTelemetry:
    telemetry = RecordingTelemetry()
    settings = WebSocketSettings(max_message_size=100, close_timeout=1)
    server = WebSocketServer(ScriptedGate(_echo_or_close), telemetry, settings)
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_head_and_serve, server, near)
        await far.send_all(upgrade_request())
        with suppress(trio.BrokenResourceError):  # the server has closed
            position = number = 0
            while position < len(data):
                size = chunks[number % len(chunks)]
                await far.send_all(data[position : position + size])
                position += size
                number += 1
                if number % 3 == 0:
                    await trio.testing.wait_all_tasks_blocked()
            await far.send_stream.aclose()
    return telemetry


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(BYTES, CHUNKS)
def test_any_frames_end_at_most_their_own_socket(pieces: list[bytes], chunks: list[int]) -> None:
    """Legal and illegal frames, cut anywhere, with messages and closes of ours in between."""
    telemetry = trio.run(_feed, b"".join(pieces), chunks, clock=trio.testing.MockClock(autojump_threshold=0))
    assert telemetry.causes == []
