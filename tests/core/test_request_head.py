"""The strict check of request heads: what passes is read the same way by everybody, the rest is refused."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.http_refusal import refusal_of
from gateway.core.request_head import (
    MAX_FIELDS,
    BodyFraming,
    RequestHead,
    RequestRefused,
    check_request_head,
    find_head_end,
)

LIMIT = 1024


def head(*lines: bytes) -> bytes:
    """A head of these lines."""
    return b"\r\n".join(lines) + b"\r\n\r\n"


UPGRADE = (
    b"Host: localhost",
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def refusal(raw: bytes) -> tuple[int, str]:
    """Status and reason of the refusal of a head."""
    with pytest.raises(RequestRefused) as caught:
        check_request_head(raw)
    return caught.value.status, caught.value.reason


def test_a_plain_request_passes_with_all_that_it_says() -> None:
    """Method, target, version and fields come out as they went in, names in lower case."""
    raw = head(b"GET /a%2Fb?c=d HTTP/1.1", b"Host: [::1]:80", b"X-A:  b\t", b"x-a: c")
    assert check_request_head(raw) == RequestHead(
        method="GET",
        target="/a%2Fb?c=d",
        http_version="1.1",
        headers=(("host", "[::1]:80"), ("x-a", "b"), ("x-a", "c")),
        raw=raw,
    )


def test_a_websocket_upgrade_is_recognised() -> None:
    """Tokens are compared without regard to case, beside others."""
    assert check_request_head(head(b"GET /ws/a HTTP/1.1", *UPGRADE)).is_websocket


@pytest.mark.parametrize(
    ("lines", "framing", "length"),
    [
        ((), BodyFraming.NONE, 0),
        ((b"Content-Length: 0",), BodyFraming.NONE, 0),
        ((b"Content-Length: 12",), BodyFraming.LENGTH, 12),
        ((b"Transfer-Encoding: Chunked",), BodyFraming.CHUNKED, 0),
    ],
)
def test_the_framing_of_the_body_is_told(lines: tuple[bytes, ...], framing: BodyFraming, length: int) -> None:
    """One of the three framings of RFC 9112 section 6."""
    checked = check_request_head(head(b"POST / HTTP/1.1", b"Host: a", *lines))
    assert (checked.framing, checked.content_length, checked.is_websocket) == (framing, length, False)


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (b"GET / HTTP/2.0", 505, "http_version"),
        (b"GET / HTTP/0.9", 505, "http_version"),
        (b"GET /", 400, "request_line"),
        (b"GET  / HTTP/1.1", 400, "request_line"),
        (b"GET / HTTP/1.1 ", 400, "request_line"),
        (b"GET / http/1.1", 400, "request_line"),
        (b"G\x00T / HTTP/1.1", 400, "request_line"),
        (b"CONNECT a:443 HTTP/1.1", 501, "connect"),
        (b"GET http://a/ HTTP/1.1", 400, "target"),
        (b"OPTIONS * HTTP/1.1", 400, "target"),
        (b"GET /a#b HTTP/1.1", 400, "target"),
        (b"GET /\x7f HTTP/1.1", 400, "target"),
        (b"GET /\xc3\xa9 HTTP/1.1", 400, "target"),
    ],
)
def test_odd_request_lines_are_refused(line: bytes, status: int, reason: str) -> None:
    """Each with the status that says why."""
    assert refusal(head(line, b"Host: a")) == (status, reason)


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        ((), 400, "host"),
        ((b"Host:",), 400, "host"),
        ((b"Host: a b",), 400, "host"),
        ((b"Host: a/b",), 400, "host"),
        ((b"Host: a@b",), 400, "host"),
        ((b"Host: xn--",), 400, "host"),
        ((b"Host: a", b"HOST: a"), 400, "duplicate_field"),
        ((b"Host: a", b"Content-Length: 1", b"Content-Length: 1"), 400, "duplicate_field"),
        ((b"Host: a", b"Content-Length: 1, 1"), 400, "content_length"),
        ((b"Host: a", b"Content-Length: +1"), 400, "content_length"),
        ((b"Host: a", b"Content-Length: 0x1"), 400, "content_length"),
        ((b"Host: a", b"Content-Length:"), 400, "content_length"),
        ((b"Host: a", b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400, "two_framings"),
        ((b"Host: a", b"Transfer-Encoding: chunked, chunked"), 501, "transfer_encoding"),
        ((b"Host: a", b"Transfer-Encoding: \x0bchunked"), 400, "field"),
        ((b"Host : a",), 400, "field"),
        ((b" Host: a",), 400, "field"),
        ((b"Host: a", b" folded"), 400, "field"),
        ((b"Host: a", b"X"), 400, "field"),
        ((b"Host: a", b": x"), 400, "field"),
        ((b"Host: a", b"X: \x00"), 400, "field"),
        ((b"Host: a", b"X: \xe9"), 400, "field"),
        ((b"Host: a", b"Upgrade: h2c", b"Connection: Upgrade"), 501, "h2c"),
        ((b"Host: a", b"Upgrade: h2c, websocket", b"Connection: Upgrade"), 501, "h2c"),
        ((b"Host: a", b"HTTP2-Settings: AAA"), 501, "h2c"),
        ((b"Host: a", *[b"X: y"] * MAX_FIELDS), 431, "too_many_fields"),
    ],
)
def test_odd_fields_are_refused(lines: tuple[bytes, ...], status: int, reason: str) -> None:
    """What two parsers could read differently, and what crashes one of ours."""
    assert refusal(head(b"GET / HTTP/1.1", *lines)) == (status, reason)


@pytest.mark.parametrize(
    ("number", "line", "status", "reason"),
    [
        (0, b"Host: a", 400, "upgrade"),
        (1, b"Connection: keep-alive", 400, "upgrade"),
        (2, b"Upgrade: websocket, x", 400, "upgrade"),
        (3, b"Sec-WebSocket-Version: 8", 426, "websocket_version"),
        (4, b"Sec-WebSocket-Key: short", 400, "websocket_key"),
        (4, b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZ!==", 400, "websocket_key"),
    ],
)
def test_malformed_upgrades_are_refused(number: int, line: bytes, status: int, reason: str) -> None:
    """RFC 6455 section 4.2.1, one requirement at a time; line 0 stands for a request that is not a GET."""
    lines = list(UPGRADE)
    lines[number] = line
    method = b"POST" if number == 0 else b"GET"
    assert refusal(head(method + b" / HTTP/1.1", *lines)) == (status, reason)


def test_http_1_0_gets_no_upgrade() -> None:
    """An upgrade needs HTTP/1.1."""
    assert refusal(head(b"GET / HTTP/1.0", *UPGRADE)) == (400, "upgrade")


def test_http_1_0_needs_no_host() -> None:
    """Health checkers still speak it."""
    assert check_request_head(head(b"GET / HTTP/1.0")).http_version == "1.0"


@pytest.mark.parametrize(
    "raw", [b"", b"\r\n\r\n", b"GET / HTTP/1.1", b"GET / HTTP/1.1\r\n\r\nHost: a\r\n\r\n"]
)
def test_what_is_not_one_head_is_refused(raw: bytes) -> None:
    """Nothing, an unfinished head, two heads."""
    assert refusal(raw)[0] == 400


@pytest.mark.parametrize(
    ("buffer", "end"),
    [
        (b"", None),
        (b"G", None),
        (b"GET / HTTP/1.1\r", None),
        (b"GET / HTTP/1.1\r\n\r", None),
        (b"GET / HTTP/1.1\r\n\r\n", 18),
        (b"GET / HTTP/1.1\r\n\r\n\n\x00", 18),
    ],
)
def test_the_end_of_a_head_is_found(buffer: bytes, end: int | None) -> None:
    """None while it may still come; what follows the head is not looked at."""
    assert find_head_end(buffer, LIMIT) == end


@pytest.mark.parametrize(
    ("buffer", "status"),
    [
        (b"\x16\x03\x01", 400),
        (b"\r\n", 400),
        (b"GET /\n", 400),
        (b"GET /\rx", 400),
        (b"GET /" + b"x" * LIMIT, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * LIMIT + b"\r\n\r\n", 431),
    ],
)
def test_what_can_be_no_head_is_refused_at_once(buffer: bytes, status: int) -> None:
    """Nobody waits for the rest of it."""
    with pytest.raises(RequestRefused) as caught:
        find_head_end(buffer, LIMIT)
    assert caught.value.status == status


PIECES = st.sampled_from(
    [b"GET", b"POST", b" ", b"/", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b": ", b":"]
    + [b"Host: a\r\n", b"Content-Length", b"1", b"Transfer-Encoding: chunked\r\n", b"\xe9", b"\x00", b"\t"]
    + [line + b"\r\n" for line in UPGRADE]
)
ALMOST_HEADS = st.one_of(
    st.binary(max_size=60),
    st.lists(PIECES, max_size=20).map(b"".join),
    st.lists(PIECES, max_size=12).map(lambda pieces: b"GET / HTTP/1.1\r\n" + b"".join(pieces) + b"\r\n\r\n"),
)


@given(ALMOST_HEADS)
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    """Nothing but RequestRefused is ever raised, and every refusal can be told as an HTTP response."""
    refused: RequestRefused | None = None
    try:
        end = find_head_end(data, LIMIT)
        if end is not None:
            check_request_head(data[:end])
    except RequestRefused as caught:
        refused = caught
    if refused is not None:
        assert refusal_of(refused).as_response().startswith(b"HTTP/1.1 %d " % refused.status)


@given(ALMOST_HEADS)
def test_what_passes_is_read_the_same_way_by_h11(data: bytes) -> None:
    """The parser of hypercorn and wsproto takes every head that passes, and finds the same in it."""
    try:
        end = find_head_end(data, LIMIT)
        if end is None:
            return
        checked = check_request_head(data[:end])
    except RequestRefused:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data[:end])
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert request.method.decode() == checked.method
    assert request.target.decode() == checked.target
    assert request.http_version.decode() == checked.http_version
    assert [(name.decode(), value.decode()) for name, value in request.headers] == [
        (name, value.lower() if name == "transfer-encoding" else value) for name, value in checked.headers
    ]


@given(ALMOST_HEADS, st.data())
def test_the_end_does_not_depend_on_how_the_bytes_come(data: bytes, draw: st.DataObject) -> None:
    """Cut anywhere, the first part is unfinished or already refused, or its end is the whole's end."""
    cut = draw.draw(st.integers(0, len(data)))
    try:
        whole = find_head_end(data, LIMIT)
    except RequestRefused:
        return
    assert find_head_end(data[:cut], LIMIT) in {None, whole}
