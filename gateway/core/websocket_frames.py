"""Frames that a WebSocket server sends, as bytes (RFC 6455 section 5.2): final, unmasked, unextended; and the
short ones that it is sent.

A ``FrameEncoder`` turns one payload into one whole data frame. It is the single place through which data
frames are made, so that an encoder that compresses can take its place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

FrameEncoder = Callable[[bytes], bytes]
"""One payload in, one whole data frame out."""

MAX_CONTROL_PAYLOAD = 125
"""RFC 6455 section 5.5: no control frame carries more."""

_SHORT = 126  # from here on the length takes two bytes of its own
_LONG = 1 << 16  # … and from here on eight
_CLIENT_HEAD = 6  # two bytes, and the four of the masking key
_TEXT_HEADS = tuple(bytes((0x81, size)) for size in range(_SHORT))
_BINARY_HEADS = tuple(bytes((0x82, size)) for size in range(_SHORT))


def text_frame(payload: bytes) -> bytes:
    """A text frame; ``payload`` must be UTF-8."""
    size = len(payload)
    if size < _SHORT:
        return _TEXT_HEADS[size] + payload
    if size < _LONG:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


def binary_frame(payload: bytes) -> bytes:
    """A binary frame."""
    size = len(payload)
    if size < _SHORT:
        return _BINARY_HEADS[size] + payload
    if size < _LONG:
        return struct.pack("!BBH", 0x82, 126, size) + payload
    return struct.pack("!BBQ", 0x82, 127, size) + payload


def ping_frame(payload: bytes) -> bytes:
    """A ping of at most 125 bytes; raises ``ValueError`` over that."""
    if len(payload) > MAX_CONTROL_PAYLOAD:
        raise ValueError("a ping carries at most 125 bytes")
    return bytes((0x89, len(payload))) + payload


def short_client_frame(data: bytes) -> tuple[int, bytes] | None:
    """Opcode and payload, if ``data`` is one frame of a client's and nothing else; None if not, or if broken.

    Final, masked, unextended, of at most 125 bytes (RFC 6455 section 5.2).
    """
    size = len(data) - _CLIENT_HEAD
    if not 0 <= size <= MAX_CONTROL_PAYLOAD or data[1] != 0x80 | size or data[0] & 0xF0 != 0x80:
        return None
    key = (data[2:_CLIENT_HEAD] * (size // 4 + 1))[:size]
    payload = int.from_bytes(data[_CLIENT_HEAD:]) ^ int.from_bytes(key)
    return data[0] & 0x0F, payload.to_bytes(size)
