"""The rule for session ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import HandshakeRefused
from gateway.core.session_id import is_session_id, parse_session_id


@pytest.mark.parametrize("segment", ["a", "A-z_0.9:x", "...", "x" * 128, "-", ".a", "123"])
def test_accepts_what_the_protocol_allows(segment: str) -> None:
    """1 to 128 characters of the allowed set name themselves."""
    assert segment == parse_session_id(segment)


@pytest.mark.parametrize("segment", ["a%3Ab", "a%3ab"])
def test_decodes_the_colon(segment: str) -> None:
    """encodeURIComponent encodes the colon, so that encoding is undone."""
    assert parse_session_id(segment) == "a:b"


@pytest.mark.parametrize(
    "segment",
    ["", ".", "..", "x" * 129, "%3A" * 129, "a/b", "a%2fb", "a%2Fb", "%2e", "%2e%2e", ".%2E", "a%00", "a\x00",
     "a%0d%0ab", "a\n", "a\r\nb", "a b", "a%20b", "é", "%C3%A9", "a@host", "a\\b", "a%5cb", "a?b", "a#b",
     "a;b", "a%", "%", "%41", "%253A", "a\u202eb", "\uff41"],
)  # fmt: skip
def test_refuses_everything_else(segment: str) -> None:
    """Other characters, dots alone, other encodings, and what is too long are refused."""
    with pytest.raises(HandshakeRefused):
        parse_session_id(segment)


@given(st.text(max_size=200))
def test_what_is_accepted_cannot_change_a_path(segment: str) -> None:
    """Whatever comes in, what comes out is a plain segment that encodes and decodes to itself."""
    try:
        session_id = parse_session_id(segment)
    except HandshakeRefused:
        return

    assert is_session_id(session_id)
    assert not set(session_id) & set("/%?#\\@ \r\n\x00")


@pytest.mark.parametrize("value", [None, 1, ["a"], {"a": 1}, b"a", True])
def test_only_text_is_an_id_in_json(value: object) -> None:
    """A JSON value that is not a string is no session id."""
    assert not is_session_id(value)
