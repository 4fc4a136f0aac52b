"""The event stream parser against the standard, in any chunks, and its limits."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.errors import AgentProtocolError
from gateway.core.sse import ServerSentEvent, SseParser

LIMIT = 1 << 20


def parse(*chunks: bytes) -> list[ServerSentEvent]:
    """All events that the chunks complete."""
    parser = SseParser(LIMIT)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces, cut at the places."""
    edges = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


def parse_as_the_standard_says(stream: bytes) -> list[ServerSentEvent]:
    """The algorithm of the HTML standard word for word: the whole text first, then line by line."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unterminated = re.split("\r\n|\r|\n", text)
    events, data, name, event_id = [], "", "", None
    for line in lines:
        if line == "":
            if data:
                events.append(ServerSentEvent(name or "message", data[:-1].encode(), event_id))
            data, name = "", ""
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data += value + "\n"
            elif field == "event":
                name = value
            elif field == "id" and "\0" not in value:
                event_id = value
    return events


PIECES = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b":", b": ", b" ", b"\xef\xbb\xbf", b"\0", b"\xff"),
        *(
            b"data",
            b"data:",
            b"data: ",
            b"data: x",
            b"event: message\n",
            b"event: done\n",
            b"event:",
            b"id: 7\n",
        ),
        *(
            b"id: a\0b\n",
            b"id\n",
            b": ping\n",
            b"retry: 5\n",
            b"unknown: y\n",
            b"{}",
            b"\xe2\x80\xa8",
            b"\xe2\x80",
        ),
        *(b'event: message\ndata: {"type":"x"}\n\n', b"data: [DONE]\n\n", "data: \u0085ж\u2028\n\n".encode()),
        *(b"event: message\r\ndata: {}\r\n\r\n", b"event: message\ndata: 1\ndata: 2\n\n"),
    ]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.lists(st.integers(0, 400), max_size=12))
@example(b"event: message\ndata: {}\n\nevent: message\ndata: {}\n\n", [])
@example(b"event: message\r\ndata: {}\r\n\r\ndata: x\r", [24])
def test_every_stream_cut_anywhere_parses_as_the_standard_says(stream: bytes, places: list[int]) -> None:
    """The short way for whole events, the line by line way and the standard's algorithm agree."""
    assert parse(*cut(stream, places)) == parse_as_the_standard_says(stream)


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_any_bytes_parse_as_the_standard_says(stream: bytes, places: list[int]) -> None:
    """Rubbish, too, means the same however it is cut."""
    assert parse(*cut(stream, places)) == parse_as_the_standard_says(stream)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_an_event_is_given_as_soon_as_its_blank_line_ended(end: bytes) -> None:
    """A CR completes the event at once; the LF that may follow it is swallowed later."""
    parser = SseParser(LIMIT)
    assert parser.feed(b"data: a" + end) == []
    assert parser.feed(end[:1]) == [ServerSentEvent("message", b"a")]
    assert parser.feed(end[1:] + b"data: b" + end + end) == [ServerSentEvent("message", b"b")]


def test_an_event_byte_by_byte() -> None:
    """One event over many segments is one event."""
    stream = b'event: plan\r\nid: 3\r\ndata: {"a":\r\ndata: 1}\r\n\r\n'
    chunks = [stream[index : index + 1] for index in range(len(stream))]
    assert parse(*chunks) == [ServerSentEvent("plan", b'{"a":\n1}', "3")]


def test_several_events_in_one_chunk() -> None:
    """All the events that one read brought are returned at once, in order."""
    names = [event.data for event in parse(b"data: 1\n\n: ping\n\nevent: x\ndata: 2\n\ndata: 3\n\ndata: 4\n")]
    assert names == [b"1", b"2", b"3"]


@pytest.mark.parametrize("chunks", [(b"\xef\xbb\xbfdata: a\n\n",), (b"\xef", b"\xbb", b"\xbfdata: a\n\n")])
def test_a_leading_byte_order_mark_loses_no_event(chunks: tuple[bytes, ...]) -> None:
    """The mark is dropped once, at the very start, wherever it is cut."""
    assert parse(*chunks) == [ServerSentEvent("message", b"a")]


def test_a_byte_order_mark_later_on_is_part_of_the_field_name() -> None:
    """Only the first line may begin with one."""
    assert parse(b"data: a\n\n\xef\xbb\xbfdata: b\n\n") == [ServerSentEvent("message", b"a")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1d", "\x1e"])
def test_only_cr_and_lf_end_lines(separator: str) -> None:
    """Characters that Python's str.splitlines takes for line ends stay inside tokens."""
    data = f'{{"token":"a{separator}b"}}'.encode()
    assert parse(b"event: message\ndata: " + data + b"\n\n") == [ServerSentEvent("message", data)]
    assert parse(b"event: message\r", b"data: " + data, b"\r\r") == [ServerSentEvent("message", data)]


@pytest.mark.parametrize("prefix", [b"data: ", b"event: message\ndata: ", b"event: other\ndata: "])
def test_invalid_utf8_is_replaced(prefix: bytes) -> None:
    """Each broken sequence becomes U+FFFD, and what is valid stays as it came."""
    (event,) = parse(prefix + b"\xd0\xb6\xff\xe2\x80|\n\n")
    assert event.data == "ж\ufffd\ufffd|".encode()


def test_an_id_stays_until_another_one_comes() -> None:
    """Every later event carries it; one with NUL is ignored; an empty one resets it."""
    events = parse(b"data: 0\n\nid: 1\ndata: 1\n\ndata: 2\n\nid: x\0y\ndata: 3\n\nid:\ndata: 4\n\n")
    assert [event.event_id for event in events] == [None, "1", "1", "1", ""]


@pytest.mark.parametrize("value", [b"x", b"1.5", b"-1", b"", "\u0663".encode(), b"9" * 5000])
def test_a_retry_that_is_not_a_time_is_ignored(value: bytes) -> None:
    """Only ASCII digits, and few enough to mean a time."""
    parser = SseParser(LIMIT)
    parser.feed(b"retry: 1500\nretry: " + value + b"\n")
    assert parser.retry == 1500


def test_an_event_without_data_is_not_given_and_its_name_is_forgotten() -> None:
    """A blank line after nothing but a name resets the name."""
    assert parse(b"event: lost\n\ndata: a\n\n") == [ServerSentEvent("message", b"a")]


def test_an_event_with_one_empty_data_line_is_given() -> None:
    """Empty data is data: some runtimes end with ``event: done`` and an empty ``data:``."""
    assert parse(b"event: done\ndata:\n\n") == [ServerSentEvent("done", b"")]


@pytest.mark.parametrize("size", [1, 7, 1000, 65536])
def test_an_event_over_the_limit_is_refused_before_it_is_complete(size: int) -> None:
    """It is found as soon as it is too large, in any chunks, and nothing of it is kept."""
    parser = SseParser(100)
    assert parser.feed(b"data: before\n\n") == [ServerSentEvent("message", b"before")]
    stream = b"data: " + b"x" * 200
    for start in range(0, len(stream), size):
        assert not parser.overflowed
        assert parser.feed(stream[start : start + size]) == []
        if parser.overflowed:
            assert start <= 100
            break
    with pytest.raises(AgentProtocolError, match="more than 100 bytes"):
        parser.feed(b"\n\n")


def test_events_before_the_one_over_the_limit_are_still_given() -> None:
    """What was complete is not lost to what came after it in the same chunk."""
    parser = SseParser(100)
    assert parser.feed(b"data: a\n\ndata: " + b"x" * 200 + b"\n\ndata: b\n\n") == [
        ServerSentEvent("message", b"a")
    ]
    assert parser.overflowed


@given(
    st.integers(60, 140),
    st.sampled_from([b"event: message\n", b"", b"event: x\n"]),
    st.lists(st.integers(0, 200)),
)
def test_where_the_limit_lies_does_not_depend_on_the_cuts(
    length: int, head: bytes, places: list[int]
) -> None:
    """A data line of exactly the limit passes and one byte more does not, on either way through."""
    parser = SseParser(100)
    stream = head + b"data: " + b"x" * (length - 6) + b"\n\n"
    events: list[ServerSentEvent] = []
    for chunk in cut(stream, places):
        if not parser.overflowed:
            events += parser.feed(chunk)
    assert (len(events), parser.overflowed) == ((1, False) if length <= 100 else (0, True))


def test_many_small_data_lines_count_towards_the_limit() -> None:
    """Empty data lines cost a byte each, so they cannot fill the memory."""
    parser = SseParser(100)
    parser.feed(b"data\n" * 150)
    assert parser.overflowed


def test_comments_without_blank_lines_never_reach_the_limit() -> None:
    """A heartbeat that goes on for days holds nothing."""
    parser = SseParser(100)
    for _ in range(1000):
        assert parser.feed(b": ping\n") == []
    assert parser.feed(b"data: a\n\n") == [ServerSentEvent("message", b"a")]


def test_a_50_mb_event_in_small_chunks_costs_no_more_memory_than_its_size() -> None:
    """The line is held once, in a buffer that grows: no list of pieces, no copy per chunk."""
    size, piece = 50_000_000, b"x" * 4000
    parser = SseParser(2 * size)
    tracemalloc.start()
    try:
        parser.feed(b"data: ")
        for _ in range(size // len(piece)):
            parser.feed(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size
    (event,) = parser.feed(b"\n\n")
    assert len(event.data) == size


def test_a_50_mb_event_over_the_limit_holds_little() -> None:
    """With an ordinary limit the same stream is refused after one limit's worth of memory."""
    parser, piece = SseParser(LIMIT), b"x" * 4000
    tracemalloc.start()
    try:
        parser.feed(b"data: ")
        while not parser.overflowed:
            parser.feed(piece)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * LIMIT
    assert held < LIMIT // 10


def test_a_limit_too_small_to_be_meant_is_refused() -> None:
    """A limit under 64 bytes would refuse the field names themselves."""
    with pytest.raises(ValueError, match="at least 64"):
        SseParser(63)
