"""``gateway.core.letters``: what nodes tell each other comes out as it went in, and rubbish is refused."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.identity import Identity
from gateway.core.letters import (
    Ended,
    Gone,
    Letter,
    Opened,
    Said,
    Sent,
    Took,
    UnreadableLetter,
    decode_batch,
    encode_batch,
)
from gateway.core.trace_context import TraceContext
from gateway.core.websocket_protocol import Dialect

EVERY: list[Letter] = [
    Opened(1, "s", Identity("ada", frozenset({"api:read"}), 12.5), Dialect.V2_JSON, "e", 7, "::1", "req"),
    Opened(2, "s", Identity("internal", sees_all=True), Dialect.V1, None, 0, "", ""),
    Opened(3, "s", Identity("a"), Dialect.V1, None, 0, "", "", TraceContext("00-a-b-01", "vendor=1")),
    Said(1, "text é"),
    Said(2, b"\x00\xff"),
    Took(1, 1 << 40),
    Sent(1, (b"a", b"")),
    Gone(1, 1006, ""),
    Ended(2, 1012, "restarting"),
]


def test_letters_come_out_as_they_went_in() -> None:
    """Every kind, in order, with the batch's number."""
    assert decode_batch(encode_batch(41, EVERY)) == (41, EVERY)


def test_what_a_newer_version_adds_is_passed_over() -> None:
    """Old and new nodes run side by side while they are replaced."""
    number, *letters = msgspec.msgpack.decode(encode_batch(0, EVERY))
    longer = msgspec.msgpack.encode([number, *([*letter, "new"] for letter in letters)])

    assert decode_batch(longer) == (0, EVERY)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([0, []]),
        msgspec.msgpack.encode([0, ["x", 1]]),
        msgspec.msgpack.encode([0, ["m", 1, 2]]),
        msgspec.msgpack.encode([0, ["o", 1, "s"]]),
        msgspec.msgpack.encode([0, ["o", 1, "s", ["a", [], None, False], "v9", None, 0, "", ""]]),
        encode_batch(0, EVERY)[:-1],
    ],
)
def test_rubbish_is_refused(data: bytes) -> None:
    """It is an error of its own, whatever is wrong."""
    with pytest.raises(UnreadableLetter):
        decode_batch(data)


@given(st.binary(max_size=60))
def test_no_bytes_do_harm(data: bytes) -> None:
    """They are read or refused, nothing else."""
    with contextlib.suppress(UnreadableLetter):
        decode_batch(data)
