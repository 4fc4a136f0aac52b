"""An Agent Runtime that misbehaves as its message asks it to: raw sockets, one thread per request."""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HUGE_EVENT_BYTES = 50 << 20

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNKED = STREAM.replace(b"Connection: close", b"Transfer-Encoding: chunked")


def event(token: str, *, final: bool = False) -> bytes:
    """One ``assistant_message``."""
    fields = {"type": "assistant_message", "token": token, "is_final": final}
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Handler(socketserver.StreamRequestHandler):
    """Answers one request; the content of its message names the fault."""

    def handle(self) -> None:
        """Read the request, misbehave."""
        content = self._read_content()
        # The gateway hangs up on most of what follows.
        with suppress(OSError):
            getattr(self, "answer_" + content.replace(" ", "_"))()

    def _read_content(self) -> str:
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return str(json.loads(self.rfile.read(length))["message"]["content"])

    def answer_fine(self) -> None:
        """As it should be."""
        self.wfile.write(STREAM + event("all is ") + event("well", final=True))

    def answer_stall(self) -> None:
        """One token, then silence until the gateway hangs up."""
        self.wfile.write(STREAM + event("before it "))
        self.connection.settimeout(60)
        self.rfile.read(1)

    def answer_never(self) -> None:
        """Silence from the start."""
        self.connection.settimeout(60)
        self.rfile.read(1)

    def answer_cut(self) -> None:
        """A chunked stream that ends without its last chunk."""
        self.wfile.write(CHUNKED + chunk(event("before it ")))

    def answer_reset(self) -> None:
        """A stream that ends in a reset."""
        self.wfile.write(CHUNKED + chunk(event("before it ")))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def answer_hang_up(self) -> None:
        """No answer at all."""

    def answer_500(self) -> None:
        """An internal error, with what is nobody's business."""
        body = b"Traceback: password=hunter2"
        self.wfile.write(b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def answer_html(self) -> None:
        """A page for people."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>")

    def answer_broken_utf8(self) -> None:
        """Bytes that are no text, inside an event and as one."""
        self.wfile.write(
            STREAM + b'data: {"type":"assistant_message","token":"a\xff\xc3"}\n\ndata: \xfe\xff\n\n'
        )
        self.wfile.write(event("b", final=True))

    def answer_huge(self) -> None:
        """An event of 50 MB."""
        self.wfile.write(STREAM + b'data: {"type":"assistant_message","token":"')
        for _ in range(HUGE_EVENT_BYTES >> 16):
            self.wfile.write(b"x" * (1 << 16))
        self.wfile.write(b'"}\n\n')

    def answer_rubbish(self) -> None:
        """Something that is not HTTP."""
        self.wfile.write(b"\x00\x01\x02 what?\r\n\r\n")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def running_bad_agent() -> Iterator[str]:
    """Its URL."""
    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
