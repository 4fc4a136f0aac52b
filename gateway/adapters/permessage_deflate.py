"""permessage-deflate as wsproto calls it, with inflation stopped at the message limit.

wsproto's own extension inflates whatever comes, parses parameters without mercy on bad ones, and keeps an
inflater per socket. What is sent does not pass through here: ``message_compression.Deflater`` makes frames.
"""

from __future__ import annotations

import zlib

from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from gateway.core.message_compression import CompressionTerms, Inflater, TooLarge, agree


class BoundedDeflate(Extension):
    """The server's side of one socket. ``terms`` is set once the client's offer was accepted."""

    name = "permessage-deflate"

    def __init__(self, max_message_size: int) -> None:
        self.terms: CompressionTerms | None = None
        self._max_message_size = max_message_size
        self._inflater: Inflater | None = None
        self._is_data = False

    def enabled(self) -> bool:
        """Whether an offer was accepted."""
        return self.terms is not None

    def offer(self) -> bool | str:
        """A server offers nothing."""
        return False

    def accept(self, offer: str) -> bool | str | None:
        """Take the first offer that is sound; None declines."""
        if self.terms is not None:
            return None
        self.terms = agree(offer)
        return None if self.terms is None else self.terms.response

    def finalize(self, offer: str) -> None:
        """Only clients finalize."""

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        """Begin a message if this is its first frame; RSV1 anywhere else breaks RFC 7692 section 6."""
        del proto, payload_length
        self._is_data = not opcode.iscontrol()
        if rsv.rsv1:
            if opcode.iscontrol() or opcode is Opcode.CONTINUATION:
                return CloseReason.PROTOCOL_ERROR
            assert self.terms is not None
            self._inflater = Inflater(self.terms.client_window_bits, self._max_message_size)
        return RsvBits(True, False, False)

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        """Inflate what has come of a compressed message."""
        del proto
        if self._inflater is None or not self._is_data:
            return data
        return self._inflate(bytes(data))

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        """The last bytes of a compressed message."""
        del proto
        if self._inflater is None or not self._is_data or not fin:
            return None
        data = self._inflate(None)
        self._inflater = None
        return data

    def frame_outbound(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, data: bytes, fin: bool
    ) -> tuple[RsvBits, bytes]:
        """Control frames only come this way; they are never compressed."""
        del proto, opcode, fin
        return rsv, data

    def _inflate(self, data: bytes | None) -> bytes | CloseReason:
        assert self._inflater is not None
        try:
            return self._inflater.finish() if data is None else self._inflater.inflate(data)
        except TooLarge:
            return CloseReason.MESSAGE_TOO_BIG
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
