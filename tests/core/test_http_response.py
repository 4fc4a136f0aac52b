"""One HTTP/1.1 response out of bytes that are cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.http_response import ResponseReader

MAX_HEAD = 4096
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
RESPONSES = {
    "chunked": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nTrailer: t\r\n\r\n",
    "length": HEAD + b"Content-Length: 7\r\n\r\nabcdefg",
    "interim": b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
    + HEAD
    + b"Content-Length: 7\r\n\r\nabcdefg",
    "until the connection ends": HEAD + b"\r\nabcdefg",
}


def read(*chunks: bytes) -> ResponseReader:
    """A reader that was fed the chunks."""
    reader = ResponseReader(MAX_HEAD)
    for chunk in chunks:
        if chunk:
            reader.feed(chunk)
    return reader


@pytest.mark.parametrize("framing", RESPONSES)
@given(places=st.lists(st.integers(0, 200), max_size=10))
def test_every_framing_cut_anywhere_gives_the_same_response(framing: str, places: list[int]) -> None:
    """Status, headers, body and end are found wherever the bytes are cut."""
    stream = RESPONSES[framing]
    edges = [0, *sorted({place % len(stream) for place in places}), len(stream)]
    reader = read(*(stream[start:end] for start, end in itertools.pairwise(edges)))
    assert (reader.status, reader.headers[0]) == (200, (b"Content-Type", b"text/event-stream"))
    assert (b"X", b"1") not in reader.headers
    assert (b"Trailer", b"t") not in reader.headers
    assert reader.take_body() == b"abcdefg"
    assert reader.take_body() == b""
    ends_with_connection = framing == "until the connection ends"
    assert reader.is_complete != ends_with_connection
    assert reader.leaves_connection_usable != ends_with_connection
    reader.feed_eof()
    assert reader.is_complete
    assert reader.failure is None


@pytest.mark.parametrize("framing", ["chunked", "length", "interim"])
def test_a_connection_that_ends_early_leaves_the_response_incomplete(framing: str) -> None:
    """A body that says how long it is cannot be ended by the connection."""
    stream = RESPONSES[framing]
    for end in range(1, len(stream)):
        reader = read(stream[:end])
        reader.feed_eof()
        assert not reader.is_complete


@pytest.mark.parametrize(
    "stream",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_what_is_not_a_response_is_a_failure(stream: bytes) -> None:
    """It is kept for the reader to ask, and the connection is of no more use."""
    reader = read(stream)
    assert reader.failure is not None
    assert not reader.leaves_connection_usable


def test_the_body_before_a_broken_chunk_is_not_lost() -> None:
    """What came whole can still be taken after the failure."""
    reader = read(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nXX\r\n")
    assert reader.take_body() == b"abc"
    assert reader.failure is not None


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 100 Continue\r\nX: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3;x=",
    ],
)
def test_a_head_without_end_is_a_failure(start: bytes) -> None:
    """Heads, trailers and chunk extensions are bounded."""
    reader = read(start)
    for _ in range(50):
        reader.feed(b"x" * 100)
    assert reader.failure is not None
    assert "4096 bytes" in str(reader.failure)


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("in_one_read", [True, False])
def test_bytes_after_the_response_spoil_the_connection(framing: str, in_one_read: bool) -> None:
    """Somebody talks out of turn there: the next response could be forged."""
    excess = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    reader = read(RESPONSES[framing] + excess) if in_one_read else read(RESPONSES[framing], excess)
    assert reader.take_body() == b"abcdefg"
    assert reader.is_complete
    assert not reader.leaves_connection_usable


def test_connection_close_is_heeded() -> None:
    """The response is good, its connection is not used again."""
    reader = read(HEAD + b"Connection: close\r\nContent-Length: 1\r\n\r\na")
    assert reader.is_complete
    assert not reader.leaves_connection_usable


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_body_is_complete_with_its_head(status: int) -> None:
    """No length and no end of connection is needed."""
    assert read(b"HTTP/1.1 %d X\r\n\r\n" % status).is_complete
