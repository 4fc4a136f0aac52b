"""permessage-deflate (RFC 7692) for a server: what is agreed, and bytes in and out. Bounded, and pure.

Figures, token events of English prose in v1 and v2, 64 and 75 bytes a frame: 80 % of the bytes saved with
context takeover (12 and 15 bytes a frame, 4 to 6 µs each), 1 to 3 % without (9 µs each). A deflater is 36 KB
for the life of its socket. An inflater lives only while a compressed message comes in, because
``client_no_context_takeover`` is always part of the agreement: clients say little, and rarely.
"""

from __future__ import annotations

import struct
import zlib

from attrs import frozen

WINDOW_BITS = 12
"""Largest window that is agreed to, 4 KB: a conversation's frames repeat within hundreds of bytes."""
MEMORY_LEVEL = 5
"""With the window above, zlib's formula gives 32 KB a deflater (zconf.h); its defaults give 256 KB."""
_COMPRESSION_LEVEL = 3
"""Costs half the time of level 6, and on small repetitive frames saves the same."""
_TAIL = b"\x00\x00\xff\xff"  # RFC 7692 section 7.2.1: not sent, put back before inflating
_FLAG = 0x40  # RSV1 of the first frame, RFC 7692 section 6


class TooLarge(Exception):
    """The message inflates to more than it may."""


@frozen
class CompressionTerms:
    """What was agreed for one socket."""

    response: str
    """The parameters for ``Sec-WebSocket-Extensions``, without the extension's name."""
    server_window_bits: int
    server_takes_over: bool
    """Whether a frame may refer to what earlier frames said."""
    client_window_bits: int


def agree(offer: str) -> CompressionTerms | None:
    """Terms for one offered ``permessage-deflate; …``, or None to decline it (RFC 7692 section 7.1).

    An offer with an unknown, repeated or malformed parameter is declined, as the RFC demands.
    """
    names: dict[str, str | None] = {}
    for part in offer.split(";")[1:]:
        name, equals, value = (text.strip() for text in part.partition("="))
        if name in names:
            return None
        names[name] = value.strip('"') if equals else None
    server_bits = client_bits = 15
    for name, given in names.items():
        if name in ("server_no_context_takeover", "client_no_context_takeover"):
            if given is not None:
                return None
        elif name in ("server_max_window_bits", "client_max_window_bits"):
            if given is None and name == "client_max_window_bits":
                continue
            bits = _window_bits(given)
            if bits is None:
                return None
            if name == "server_max_window_bits":
                server_bits = bits
            else:
                client_bits = bits
        else:
            return None
    if server_bits == 8:
        return None  # zlib cannot make a raw stream of that window
    server_bits = min(server_bits, WINDOW_BITS)
    takes_over = "server_no_context_takeover" not in names
    parameters = ["client_no_context_takeover", f"server_max_window_bits={server_bits}"]
    if not takes_over:
        parameters.append("server_no_context_takeover")
    if "client_max_window_bits" in names:
        client_bits = max(9, min(client_bits, WINDOW_BITS))
        parameters.append(f"client_max_window_bits={client_bits}")
    return CompressionTerms("; ".join(parameters), server_bits, takes_over, client_bits)


class Deflater:
    """Makes compressed data frames of one socket: ``frame`` is a ``FrameEncoder``."""

    __slots__ = ("_bits", "_compressor", "_opcode", "_takes_over")

    def __init__(self, terms: CompressionTerms, *, is_binary: bool) -> None:
        self._opcode = (0x82 if is_binary else 0x81) | _FLAG
        self._bits = terms.server_window_bits
        self._takes_over = terms.server_takes_over
        self._compressor = self._new()

    def frame(self, payload: bytes) -> bytes:
        """One whole, final, compressed data frame. Frames must be sent in the order they are made in."""
        data = self._compressor.compress(payload) + self._compressor.flush(zlib.Z_SYNC_FLUSH)
        if not self._takes_over:
            self._compressor = self._new()
        size = len(data) - len(_TAIL)
        if size < 126:
            head = bytes((self._opcode, size))
        elif size < 1 << 16:
            head = struct.pack("!BBH", self._opcode, 126, size)
        else:
            head = struct.pack("!BBQ", self._opcode, 127, size)
        return head + data[:size]

    def _new(self) -> zlib._Compress:
        return zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, -self._bits, MEMORY_LEVEL)


class Inflater:
    """Inflates one message, piece by piece, never to more than ``limit`` bytes."""

    __slots__ = ("_decompressor", "_left")

    def __init__(self, window_bits: int, limit: int) -> None:
        # zlib inflates any smaller window with a larger one, and cannot take 8.
        self._decompressor = zlib.decompressobj(-max(9, window_bits))
        self._left = limit

    def inflate(self, data: bytes) -> bytes:
        """What ``data`` adds to the message. Raises ``TooLarge``, and ``zlib.error`` for what is not deflate.

        One byte more than the limit is asked for and no more, so a bomb costs its sender and nobody memory.
        """
        inflated = self._decompressor.decompress(data, self._left + 1)
        self._left -= len(inflated)
        if self._left < 0:
            raise TooLarge
        return inflated

    def finish(self) -> bytes:
        """The end of the message. Raises as ``inflate``."""
        return self.inflate(_TAIL)


def _window_bits(text: str | None) -> int | None:
    """8 to 15 without leading zeros (RFC 7692 section 7.1.2), or None."""
    if text is None or not (text.isascii() and text.isdigit()) or text[0] == "0" or len(text) > 2:
        return None
    return int(text) if 8 <= int(text) <= 15 else None
