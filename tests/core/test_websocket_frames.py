"""Frames as bytes: what a WebSocket client reads out of them is what was put in."""

from __future__ import annotations

import pytest
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, Ping, TextMessage

from gateway.core.websocket_frames import binary_frame, ping_frame, text_frame

SIZES = (0, 1, 125, 126, 127, 65_535, 65_536, 70_000)


@pytest.mark.parametrize("size", SIZES)
def test_a_client_reads_the_payload_back(size: int) -> None:
    """At every boundary of the length's encoding, for text and for binary frames."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(text_frame(b"x" * size) + binary_frame(b"y" * size))
    text = "".join(event.data for event in client.events() if isinstance(event, TextMessage))
    assert text == "x" * size
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(binary_frame(b"y" * size))
    assert b"".join(event.data for event in client.events() if isinstance(event, BytesMessage)) == b"y" * size


@pytest.mark.parametrize(("size", "head"), [(125, 2), (126, 4), (65_535, 4), (65_536, 10)])
def test_the_head_is_as_short_as_it_may_be(size: int, head: int) -> None:
    """RFC 6455 section 5.2 wants the minimal number of bytes for the length."""
    assert len(text_frame(b"x" * size)) == len(binary_frame(b"x" * size)) == size + head


def test_a_ping_is_a_ping() -> None:
    """With its payload, and never one that no control frame may carry."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(ping_frame(b"abc"))
    assert list(client.events()) == [Ping(payload=b"abc")]
    with pytest.raises(ValueError, match="125"):
        ping_frame(bytes(126))
