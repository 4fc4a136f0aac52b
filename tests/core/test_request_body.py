"""Where a body ends, however its bytes come."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.request_body import RequestBody
from gateway.core.request_head import RequestRefused, check_request_head


def body(*lines: bytes) -> RequestBody:
    """The body after a head with these lines."""
    return RequestBody(
        check_request_head(b"\r\n".join([b"POST / HTTP/1.1", b"Host: a", *lines]) + b"\r\n\r\n")
    )


def chunked(chunks: list[bytes]) -> bytes:
    """A chunked body."""
    framed = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks if chunk]
    return b"".join(framed) + b"0\r\n\r\n"


def take_in_pieces(following: RequestBody, data: bytes, size: int) -> int:
    """Feed ``data`` piece by piece until the body ends; returns how much belonged to it."""
    taken = 0
    while taken < len(data) and not following.is_complete:
        taken += following.take(data[taken : taken + size])
    return taken


def test_no_body_is_complete_at_once() -> None:
    """Without framing there is no body (RFC 9112 section 6.3)."""
    following = body()
    assert following.is_complete
    assert following.take(b"GET") == 0


@given(st.binary(min_size=1, max_size=50), st.binary(max_size=20), st.integers(1, 70))
def test_a_length_is_counted(content: bytes, rest: bytes, size: int) -> None:
    """Exactly as many bytes as stated belong to it."""
    following = body(b"Content-Length: %d" % len(content))
    assert take_in_pieces(following, content + rest, size) == len(content)
    assert following.is_complete


@given(st.lists(st.binary(max_size=30), max_size=5), st.binary(max_size=20), st.integers(1, 70))
def test_chunks_are_followed(chunks: list[bytes], rest: bytes, size: int) -> None:
    """The end is behind the last chunk's empty line, whatever the chunks hold."""
    data = chunked(chunks)
    following = body(b"Transfer-Encoding: chunked")
    assert take_in_pieces(following, data + rest, size) == len(data)
    assert following.is_complete


@pytest.mark.parametrize("data", [b"3;a=b\r\nabc\r\n0\r\n\r\n", b"A\r\n0123456789\r\n000\r\n\r\n"])
def test_extensions_and_leading_zeros_are_allowed(data: bytes) -> None:
    """They are legal, and everybody ignores them."""
    following = body(b"Transfer-Encoding: chunked")
    assert following.take(data) == len(data)
    assert following.is_complete


@pytest.mark.parametrize(
    "data",
    [
        b"3\nabc",
        b"\r\n",
        b"-1\r\n",
        b"0x3\r\nabc",
        b"3 \r\nabc",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n",
        b"0\r\nTrailer: x\r\n\r\n",
        b"1" * 16 + b"\r\n",
        b"3;" + b"x" * 100,
        b"3;\x00\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_malformed_chunks_are_refused(data: bytes, size: int) -> None:
    """However they are cut."""
    following = body(b"Transfer-Encoding: chunked")
    with pytest.raises(RequestRefused):
        take_in_pieces(following, data, size)


@given(st.binary(max_size=60), st.integers(1, 70))
def test_any_bytes_are_followed_or_refused(data: bytes, size: int) -> None:
    """Nothing but RequestRefused is ever raised."""
    following = body(b"Transfer-Encoding: chunked")
    with suppress(RequestRefused):
        assert take_in_pieces(following, data, size) <= len(data)
