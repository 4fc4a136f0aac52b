"""The strict check of an HTTP/1.x request head, before any library sees it (RFC 9112, RFC 9110, RFC 6455).

Two parsers that read one request differently are how requests are smuggled, and a header byte that a
library did not expect is how servers crash. So only what every HTTP implementation reads the same way
passes: one framing, one Host, CRLF line ends, visible ASCII.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
from typing import Final

from attrs import field, frozen

from gateway.core.errors import HandshakeRefused

MAX_FIELDS: Final = 100
"""Header fields per request; Apache's ``LimitRequestFields`` has the same default."""

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(rb"/[!\"$-~]*")  # origin-form: visible ASCII without the fragment's "#"
_VALUE = re.compile(rb"[\t -~]*")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")

_ONLY_ONCE: Final = frozenset(
    (
        b"content-length",
        b"content-type",
        b"host",
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"transfer-encoding",
        b"upgrade",
        b"authorization",
        b"origin",
        b"x-internal-auth",
    )
)
"""Fields that two readers resolve differently when they come twice."""


class RequestRefused(HandshakeRefused):
    """A request head (or its body's framing) that is not served; the connection ends with the answer.

    ``status`` is the HTTP status of the answer, ``reason`` a short stable label for metrics.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Header fields that the answer must carry (RFC 6455 section 4.4 for 426)."""
        return (("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket")) if self.status == 426 else ()


class BodyFraming(enum.Enum):
    """How the end of a request's body is found (RFC 9112 section 6)."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"


@frozen
class RequestHead:
    """A head that passed."""

    method: str
    target: str
    """Origin-form, still percent-encoded."""
    http_version: str
    """``1.0`` or ``1.1``."""
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    """Names in lower case, in the order received."""
    raw: bytes = field(repr=False)
    """The head as received, its empty last line included."""
    framing: BodyFraming = BodyFraming.NONE
    content_length: int = 0
    is_websocket: bool = False
    """Whether it asks for an upgrade to WebSocket, and is fit to get it."""


def find_head_end(buffer: bytes | bytearray, limit: int) -> int | None:
    """Where the head that ``buffer`` begins with ends, or None while more has to come.

    Raises ``RequestRefused`` as soon as what has come can be no head any more, so that nobody waits for the
    rest: bare CR or LF, a first byte that starts no method (TLS, rubbish), more than ``limit`` bytes.
    """
    end = buffer.find(b"\r\n\r\n")
    seen = bytes(buffer if end < 0 else buffer[: end + 4])
    if seen and not _METHOD.match(seen):
        raise RequestRefused(400, "not_http", "This port speaks HTTP/1.1; what came is not HTTP.")
    # A CR that is the last byte so far may still get its LF.
    if _BARE_LINE_END.search(seen[:-1] if seen.endswith(b"\r") else seen):
        raise RequestRefused(400, "line_ends", "Lines of a request end in CRLF, and only there.")
    if len(seen) > limit:
        raise RequestRefused(431, "head_too_large", f"The request head is larger than {limit} bytes.")
    return None if end < 0 else end + 4


def check_request_head(raw: bytes) -> RequestHead:
    """Check one whole head (up to and with its empty line). Raises ``RequestRefused``, nothing else."""
    lines = raw.split(b"\r\n")
    if len(lines) < 3 or lines[-2:] != [b"", b""] or b"" in lines[:-2]:
        raise RequestRefused(400, "malformed", "The request has no head, or more than one.")
    method, target, version = _check_request_line(lines[0])
    fields = _check_fields(lines[1:-2])
    _check_host(fields, version)
    framing, length = _check_framing(fields, version)
    return RequestHead(
        method=method.decode("ascii"),
        target=target.decode("ascii"),
        http_version=version[5:].decode("ascii"),
        headers=tuple((name.decode("ascii"), value.decode("ascii")) for name, value in fields),
        raw=raw,
        framing=framing,
        content_length=length,
        is_websocket=_check_upgrade(fields, method, version, has_body=framing is not BodyFraming.NONE),
    )


def _check_request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    parts = line.split(b" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]) or not _VERSION.fullmatch(parts[2]):
        raise RequestRefused(400, "request_line", "The request line is not 'METHOD /target HTTP/1.1'.")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise RequestRefused(505, "http_version", "This port speaks HTTP/1.1 and no other version of HTTP.")
    if method == b"CONNECT":
        raise RequestRefused(501, "connect", "CONNECT is not served: this is no proxy.")
    if not _TARGET.fullmatch(target):
        raise RequestRefused(400, "target", "The request target is not a path in visible ASCII; encode it.")
    return method, target, version


def _check_fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    if len(lines) > MAX_FIELDS:
        raise RequestRefused(431, "too_many_fields", f"The request has more than {MAX_FIELDS} header fields.")
    fields: list[tuple[bytes, bytes]] = []
    once: set[bytes] = set()
    for line in lines:
        name, colon, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        # A folded line begins with a blank, one before the colon ends up in the name: neither matches.
        if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise RequestRefused(400, "field", "A header field is malformed, folded or not plain ASCII.")
        if name in _ONLY_ONCE:
            if name in once:
                shown = name.decode("ascii")
                raise RequestRefused(400, "duplicate_field", f"The header field {shown} came more than once.")
            once.add(name)
        fields.append((name, value))
    return fields


def _check_host(fields: list[tuple[bytes, bytes]], version: bytes) -> None:
    host = _value(fields, b"host")
    if host is None:
        if version == b"HTTP/1.1":
            raise RequestRefused(400, "host", "The Host header field is missing.")
        return
    try:
        host.decode("idna")  # what wsproto will do, where it would raise
    except UnicodeError:
        host = b""
    if len(host) > 261 or not _HOST.fullmatch(host):
        raise RequestRefused(400, "host", "The Host header field is not 'name' or 'name:port'.")


def _check_framing(fields: list[tuple[bytes, bytes]], version: bytes) -> tuple[BodyFraming, int]:
    length = _value(fields, b"content-length")
    encoding = _value(fields, b"transfer-encoding")
    if encoding is not None:
        if length is not None:
            raise RequestRefused(
                400, "two_framings", "Content-Length and Transfer-Encoding exclude each other."
            )
        if version == b"HTTP/1.0":
            raise RequestRefused(400, "transfer_encoding", "HTTP/1.0 has no Transfer-Encoding.")
        if encoding.lower() != b"chunked":
            raise RequestRefused(501, "transfer_encoding", "The only Transfer-Encoding served is chunked.")
        return BodyFraming.CHUNKED, 0
    if length is None:
        return BodyFraming.NONE, 0
    if not _LENGTH.fullmatch(length):
        raise RequestRefused(400, "content_length", "Content-Length is not a plain decimal number.")
    size = int(length)
    return (BodyFraming.LENGTH, size) if size else (BodyFraming.NONE, 0)


def _check_upgrade(
    fields: list[tuple[bytes, bytes]], method: bytes, version: bytes, *, has_body: bool
) -> bool:
    upgrade = (_value(fields, b"upgrade") or b"").lower()
    tokens = {
        token.strip().lower()
        for name, value in fields
        if name == b"connection"
        for token in value.split(b",")
    }
    protocols = [protocol.strip() for protocol in upgrade.split(b",")]
    if b"h2c" in protocols or any(name == b"http2-settings" for name, _ in fields):
        raise RequestRefused(
            501, "h2c", "HTTP/2 is not spoken on this port; use HTTP/1.1 without an upgrade."
        )
    if b"websocket" not in protocols:
        return False
    if upgrade != b"websocket" or b"upgrade" not in tokens:
        raise RequestRefused(400, "upgrade", "A WebSocket needs 'Connection: Upgrade', 'Upgrade: websocket'.")
    if method != b"GET" or version != b"HTTP/1.1" or has_body:
        raise RequestRefused(400, "upgrade", "A WebSocket begins with a GET of HTTP/1.1 without a body.")
    if _value(fields, b"sec-websocket-version") != b"13":
        raise RequestRefused(426, "websocket_version", "The version of WebSocket spoken here is 13.")
    if not _is_key(_value(fields, b"sec-websocket-key") or b""):
        raise RequestRefused(400, "websocket_key", "Sec-WebSocket-Key is not 16 bytes in base64.")
    return True


def _is_key(value: bytes) -> bool:
    try:
        return len(value) == 24 and len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False


def _value(fields: list[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    return next((value for name, value in fields if name == wanted), None)
