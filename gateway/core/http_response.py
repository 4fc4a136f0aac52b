"""Reads one HTTP/1.1 response out of bytes, however they are cut (RFC 9112), on httptools' parser."""

from __future__ import annotations

import httptools


class MalformedResponse(Exception):
    """What came is not an HTTP/1.1 response, or one with an unreasonable head."""


class ResponseReader:
    """Takes the bytes of a connection; gives the response's head, and its body as it comes.

    Interim responses (1xx) are passed over. What is wrong with the response is not raised but kept in
    ``failure``, so that the body that came before it is not lost. Holds no more than the head and the
    body that was not taken yet.
    """

    def __init__(self, max_head_bytes: int) -> None:
        self._max_head_bytes = max_head_bytes
        self._bytes_without_body = 0
        self._is_interim = False
        self._ends_with_connection = False
        self._has_excess = False
        self._keeps_alive = False
        self._body: list[bytes] = []
        self._body_parts = 0
        self.on_body = self._body.append  # called by httptools; a C function, so no Python frame per chunk
        self.status = 0
        """The status code; 0 until the whole head has come."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        """Whether the response has come to its proper end."""
        self.failure: MalformedResponse | None = None
        # Last: it looks the callbacks up once, here.
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    @property
    def leaves_connection_usable(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.is_complete and self._keeps_alive and not self._has_excess and self.failure is None

    def feed(self, data: bytes | bytearray) -> None:
        """Take what was received; ``data`` is not empty."""
        if self._parser is None:
            self._has_excess = True
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.is_complete:
                self._has_excess = True
            else:
                self._fail(f"not a valid HTTP/1.1 response ({type(error).__name__})")
        if self.is_complete:
            self._parser = None  # ends the reference cycle, too
            del self._body[self._body_parts :]  # a response that nobody asked for may follow in one read
        elif self._body:
            self._bytes_without_body = 0
        else:
            # Bounds the head, and trailers as well, which the parser gathers before it hands them on.
            self._bytes_without_body += len(data)
            if self._bytes_without_body > self._max_head_bytes:
                self._fail(f"more than {self._max_head_bytes} bytes of head")

    def feed_eof(self) -> None:
        """The connection has ended: the end of the body when nothing else delimits it."""
        if self.status and self._ends_with_connection and self.failure is None:
            self.is_complete = True
        self._parser = None

    def take_body(self) -> bytes:
        """The body that came since the last call; empty when there is none."""
        body = self._body
        if not body:
            return b""
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        return data

    def _fail(self, reason: str) -> None:
        self._parser = None
        self.failure = MalformedResponse(reason)

    # ------------------------------------------------------------- called by httptools

    def on_message_begin(self) -> None:
        """Called by the parser: the first byte of a response."""
        if self.is_complete:
            self._has_excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser: one field of the head, or of the trailers, which nobody asked for."""
        if not self.status:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by the parser: the head is whole."""
        if self.is_complete or self._parser is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._is_interim = True
            self.headers.clear()
            return
        self.status = status
        coding = self._field(b"transfer-encoding")
        self._ends_with_connection = (
            not coding.lower().endswith(b"chunked")
            if coding
            else not any(name.lower() == b"content-length" for name, _ in self.headers)
        )
        self._keeps_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        """Called by the parser: the response is over."""
        if self._is_interim:
            self._is_interim = False
        elif not self.is_complete:
            self.is_complete = True
            self._body_parts = len(self._body)

    def _field(self, wanted: bytes) -> bytes:
        return b", ".join(value.strip() for name, value in self.headers if name.lower() == wanted)
