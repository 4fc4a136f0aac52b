"""permessage-deflate: what is agreed, and that nothing inflates past its limit."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.message_compression import CompressionTerms, Deflater, Inflater, TooLarge, agree

NAME = "permessage-deflate"


@pytest.mark.parametrize(
    ("offer", "response"),
    [
        ("", "client_no_context_takeover; server_max_window_bits=12"),
        (
            "; client_max_window_bits",
            "client_no_context_takeover; server_max_window_bits=12; client_max_window_bits=12",
        ),
        (
            "; client_max_window_bits=10; server_max_window_bits=9",
            "client_no_context_takeover; server_max_window_bits=9; client_max_window_bits=10",
        ),
        (
            "; server_no_context_takeover",
            "client_no_context_takeover; server_max_window_bits=12; server_no_context_takeover",
        ),
        ('; server_max_window_bits="10"', "client_no_context_takeover; server_max_window_bits=10"),
    ],
)
def test_a_sound_offer_is_accepted_within_our_bounds(offer: str, response: str) -> None:
    """The window is never larger than ours, and the client never keeps its context."""
    terms = agree(NAME + offer)
    assert terms is not None
    assert terms.response == response


@pytest.mark.parametrize(
    "offer",
    [
        "; server_max_window_bits",
        "; server_max_window_bits=7",
        "; server_max_window_bits=8",
        "; server_max_window_bits=16",
        "; server_max_window_bits=09",
        "; server_max_window_bits=x",
        "; client_max_window_bits=",
        "; server_no_context_takeover=1",
        "; server_no_context_takeover; server_no_context_takeover",
        "; whatever",
    ],
)
def test_an_offer_that_breaks_the_rules_is_declined(offer: str) -> None:
    """Unknown, repeated and malformed parameters decline the offer; they never raise."""
    assert agree(NAME + offer) is None


@given(st.text())
def test_agreeing_never_raises(offer: str) -> None:
    """Whatever a client offers, the answer is terms or none."""
    agree(offer)


@given(st.lists(st.binary(max_size=3000), max_size=8), st.booleans())
def test_frames_inflate_to_what_was_sent(payloads: list[bytes], takes_over: bool) -> None:
    """A peer that follows RFC 7692 reads every frame, with and without context takeover."""
    terms = CompressionTerms("", server_window_bits=12, server_takes_over=takes_over, client_window_bits=15)
    deflater = Deflater(terms, is_binary=True)
    inflater = zlib.decompressobj(-12)
    for payload in payloads:
        frame = deflater.frame(payload)
        assert frame[0] == 0xC2
        body = frame[2:] if frame[1] < 126 else frame[4:]
        if not takes_over:
            inflater = zlib.decompressobj(-12)
        assert inflater.decompress(body + b"\x00\x00\xff\xff") == payload


def test_a_bomb_stops_at_the_limit() -> None:
    """Ten megabytes in ten kilobytes raise after the limit, wherever the pieces are cut."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(10_000_000)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    inflater = Inflater(15, limit=100_000)
    inflated: list[int] = []

    def inflate_all() -> None:
        inflated.extend(len(inflater.inflate(bomb[at : at + 50])) for at in range(0, len(bomb), 50))

    with pytest.raises(TooLarge):
        inflate_all()
    assert sum(inflated) <= 100_000


def test_a_bomb_costs_no_memory() -> None:
    """Fifty megabytes in one piece are never made: inflation stops at the limit."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(50_000_000)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    inflater = Inflater(15, limit=100_000)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            inflater.inflate(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_message_of_exactly_the_limit_passes() -> None:
    """The limit itself is allowed."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = compressor.compress(bytes(1000)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    inflater = Inflater(15, limit=1000)
    assert inflater.inflate(data[:-4]) + inflater.finish() == bytes(1000)
