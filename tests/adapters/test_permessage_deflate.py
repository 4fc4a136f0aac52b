"""Compression on real sockets, against a client that is not ours."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
import trio
import websockets.sync.client
from websockets.exceptions import ConnectionClosedError
from websockets.extensions import ClientExtensionFactory
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from gateway.adapters.websocket import WebSocketSettings
from tests.adapters.socket_harness import (
    TEXT,
    RawClient,
    RecordingTelemetry,
    ScriptedGate,
    client_frame,
    raw_client,
    upgrade_request,
    websocket_port,
)

ON = WebSocketSettings(compresses=True, max_message_size=100_000)
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"


@pytest.mark.parametrize(
    "offers",
    [
        [ClientPerMessageDeflateFactory()],
        [ClientPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)],
        [ClientPerMessageDeflateFactory(server_max_window_bits=9, client_max_window_bits=9)],
        [],
    ],
)
async def test_another_client_reads_back_what_it_sent(offers: Sequence[ClientExtensionFactory]) -> None:
    """Messages of all sizes echo unchanged, whatever the client offers, compressed or not."""
    texts = ["", "a", "token " * 5, "repetition " * 5000, "token " * 5]

    def talk(port: int) -> list[str | bytes]:
        with websockets.sync.client.connect(
            f"ws://127.0.0.1:{port}/ws/s", extensions=offers, compression=None, proxy=None
        ) as client:
            assert len(client.protocol.extensions) == len(offers)
            echoed = []
            for text in texts:
                client.send(text)
                echoed.append(client.recv(timeout=5))
            client.send(["frag", "ment", "ed"])
            echoed.append(client.recv(timeout=5))
            return echoed

    telemetry = RecordingTelemetry()
    async with websocket_port(ScriptedGate(), telemetry, ON) as port:
        assert await trio.to_thread.run_sync(talk, port) == [*texts, "fragmented"]
    assert telemetry.errors == []


async def test_nothing_is_agreed_while_it_is_off() -> None:
    """With WS_COMPRESSION=off an offer is passed over."""
    async with websocket_port(ScriptedGate(), RecordingTelemetry()) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            client = RawClient(stream)
            await client.send(upgrade_request("/ws/s", OFFER))
            assert b"extensions" not in (await client.read_head()).lower()


async def test_an_offer_that_is_nonsense_is_declined_and_the_socket_opens() -> None:
    """A malformed offer costs the client its compression and nothing else."""
    nonsense = "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=banana"
    async with (
        websocket_port(ScriptedGate(), RecordingTelemetry(), ON) as port,
        raw_client(port, upgrade_request("/ws/s", nonsense)) as client,
    ):
        await client.send(client_frame(TEXT, b"plain"))
        assert await client.read_frame() == (TEXT, b"plain")


async def test_a_bomb_costs_its_sender_1009() -> None:
    """A small frame that inflates to 50 MB ends that socket with 1009; nothing else notices."""

    def send_bomb(port: int) -> int | None:
        with websockets.sync.client.connect(
            f"ws://127.0.0.1:{port}/ws/s", compression="deflate", proxy=None, max_size=None
        ) as client:
            client.send("x" * 50_000_000)
            with pytest.raises(ConnectionClosedError):
                client.recv(timeout=5)
            return client.close_code

    telemetry = RecordingTelemetry()
    async with websocket_port(ScriptedGate(), telemetry, ON) as port:
        assert await trio.to_thread.run_sync(send_bomb, port) == 1009
    assert telemetry.errors == []


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", zlib.compress(b"not raw")])
async def test_what_is_not_deflate_ends_its_socket(payload: bytes) -> None:
    """Rubbish in a compressed frame is closed with 1007, without a crash."""
    telemetry = RecordingTelemetry()
    async with (
        websocket_port(ScriptedGate(), telemetry, ON) as port,
        raw_client(port, upgrade_request("/ws/s", OFFER)) as client,
    ):
        frame = bytearray(client_frame(TEXT, payload))
        frame[0] |= 0x40
        await client.send(bytes(frame))
        assert await client.read_close() == 1007
    assert telemetry.errors == []
