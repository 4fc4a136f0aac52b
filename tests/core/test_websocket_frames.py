"""Frames as bytes: what a WebSocket client reads out of them is what was put in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, Ping, TextMessage

from gateway.core.websocket_frames import binary_frame, ping_frame, short_client_frame, text_frame

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


@given(st.binary(max_size=125))
def test_a_short_frame_of_a_client_is_read_whole(payload: bytes) -> None:
    """Whatever mask wsproto's client took."""
    client = Connection(ConnectionType.CLIENT)
    assert short_client_frame(client.send(BytesMessage(data=payload))) == (2, payload)


@given(st.binary(max_size=125), st.data())
def test_anything_but_one_whole_short_frame_is_not_taken(payload: bytes, data: st.DataObject) -> None:
    """Cut, with something behind it, unmasked, in pieces, extended."""
    frame = Connection(ConnectionType.CLIENT).send(BytesMessage(data=payload))
    assert short_client_frame(frame[: data.draw(st.integers(0, len(frame) - 1))]) is None
    assert short_client_frame(frame + data.draw(st.binary(min_size=1, max_size=200))) is None
    assert short_client_frame(bytes((frame[0], frame[1] & 0x7F)) + frame[2:]) is None
    for bit in (0x10, 0x20, 0x40, 0x80):
        assert short_client_frame(bytes((frame[0] ^ bit,)) + frame[1:]) is None


@pytest.mark.parametrize("size", [126, 127, 65_536])
def test_a_longer_frame_of_a_client_is_not_taken(size: int) -> None:
    """Its length takes more bytes than two."""
    assert short_client_frame(Connection(ConnectionType.CLIENT).send(BytesMessage(data=bytes(size)))) is None
