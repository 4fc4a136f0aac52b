"""Where a request's body ends, strictly read (RFC 9112 sections 6, 7.1): there the next head begins."""

from __future__ import annotations

import re
from typing import Final

from gateway.core.request_head import BodyFraming, RequestHead, RequestRefused

_MAX_CHUNK_LINE: Final = 64
"""Bytes of a chunk's first line. The size takes 15; nobody uses the extensions that may follow."""

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~]*)?")
_LINE_END: Final = b"\r\n"


class RequestBody:
    """Follows one body through the bytes after its head; decodes nothing, keeps nothing."""

    def __init__(self, head: RequestHead) -> None:
        self._is_chunked = head.framing is BodyFraming.CHUNKED
        self._remaining = head.content_length  # bytes of the body, or of the chunk, until its end
        self._line = b""  # what has come of the line that a chunk begins with
        self._expected_end = b""  # what has to follow a chunk's data, or the last chunk's line
        self._is_last_chunk = False
        self.is_complete = head.framing is BodyFraming.NONE

    def take(self, data: bytes) -> int:
        """How many bytes at the front of ``data`` belong to this body; ``is_complete`` says if it ended.

        Raises ``RequestRefused`` when the chunks are malformed.
        """
        position = 0
        while position < len(data) and not self.is_complete:
            if self._remaining:
                step = min(self._remaining, len(data) - position)
                self._remaining -= step
                position += step
                if not self._remaining:
                    self._end_of_data()
            elif self._expected_end:
                if data[position] != self._expected_end[0]:
                    raise _malformed("does not end in CRLF, or has trailers, which are not taken")
                self._expected_end = self._expected_end[1:]
                position += 1
                self.is_complete = self._is_last_chunk and not self._expected_end
            else:
                position = self._take_line(data, position)
        return position

    def _end_of_data(self) -> None:
        if self._is_chunked:
            self._expected_end = _LINE_END
        else:
            self.is_complete = True

    def _take_line(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position)
        stop = len(data) if end < 0 else end + 1
        self._line += data[position:stop]
        if len(self._line) > _MAX_CHUNK_LINE:
            raise _malformed("begins with a line that is too long")
        if end >= 0:
            match = _CHUNK_LINE.fullmatch(self._line[:-2])
            if match is None or not self._line.endswith(_LINE_END):
                raise _malformed("does not begin with its size in hexadecimal and CRLF")
            self._line = b""
            self._remaining = int(match[1], 16)
            if not self._remaining:
                self._is_last_chunk = True
                self._expected_end = _LINE_END
        return stop


def _malformed(how: str) -> RequestRefused:
    return RequestRefused(400, "chunk", f"The body is malformed: a chunk {how}.")
