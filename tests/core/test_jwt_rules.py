"""The rules for a token before its signature was verified."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import NotAuthenticated
from gateway.core.jwt_rules import (
    ALGORITHMS,
    MAX_HEADER_SIZE,
    MAX_TOKEN_LENGTH,
    Refusal,
    TokenHeader,
    TokenRefused,
    decode_base64url,
    read_header,
)
from tests.jwt_material import as_bytes, base64url

RS256 = frozenset({"RS256"})


def unsigned(header: dict[str, object] | bytes, payload: str = "e30", signature: str = "AAAA") -> str:
    """A token whose signature is anything."""
    return f"{base64url(as_bytes(header))}.{payload}.{signature}"


def head(**changes: object) -> dict[str, object]:
    """A sound header, with changes."""
    return {"alg": "RS256", "typ": "JWT", "kid": "k1", **changes}


def refusal_of_header(token: str, algorithms: frozenset[str] = RS256) -> Refusal:
    """Why the header is refused; fails when it is not."""
    with pytest.raises(TokenRefused) as refused:
        read_header(token, algorithms)
    return refused.value.reason


def test_a_sound_header_says_algorithm_and_key() -> None:
    """What is needed to find the key comes out, nothing else."""
    assert read_header(unsigned(head(x5t="AAAA", custom=1)), RS256) == TokenHeader("RS256", "k1")


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt"])
def test_types_of_access_tokens_are_accepted(typ: str) -> None:
    """Media types compare without regard to case."""
    assert read_header(unsigned(head(typ=typ)), RS256).key_id == "k1"


def test_an_absent_type_is_accepted() -> None:
    """RFC 7519 leaves ``typ`` to the issuer, and the claim ``type`` is checked anyway."""
    assert read_header(unsigned({"alg": "RS256", "kid": "k1"}), RS256).key_id == "k1"


@pytest.mark.parametrize("typ", ["JWE", "dpop+jwt", "logout+jwt", "", None, 1, ["JWT"]])
def test_tokens_of_another_type_are_refused(typ: object) -> None:
    """A token made for another purpose is not an access token (RFC 8725 section 3.11)."""
    assert refusal_of_header(unsigned(head(typ=typ))) is Refusal.TYPE


@pytest.mark.parametrize(
    "alg", ["none", "None", "NONE", "", "HS256", "RS512", "rs256", "ES256", None, 1, ["RS256"]]
)
def test_algorithms_off_the_list_are_refused(alg: object) -> None:
    """Only what is on the allow-list, letter for letter (RFC 8725 section 3.1)."""
    assert refusal_of_header(unsigned(head(alg=alg))) is Refusal.ALGORITHM


def test_a_missing_algorithm_is_refused() -> None:
    """Nothing is assumed."""
    assert refusal_of_header(unsigned({"kid": "k1"})) is Refusal.ALGORITHM


@pytest.mark.parametrize("name", ["crit", "b64", "jku", "jwk", "x5u", "x5c"])
@pytest.mark.parametrize("value", [None, "", "https://keys.test/", [], ["exp"], {}, False])
def test_headers_that_want_to_be_obeyed_refuse_the_token(name: str, value: object) -> None:
    """Whatever their value: a token neither brings its key, nor says where it is, nor changes the rules."""
    assert refusal_of_header(unsigned(head(**{name: value}))) is Refusal.HEADER


@pytest.mark.parametrize(
    "kid", [None, "", " ", "a b ", "k\n1", "k\0", "ключ", "k" * 257, 1, ["k1"], {"a": 1}]
)
def test_key_ids_that_are_no_plain_names_are_refused(kid: object) -> None:
    """A ``kid`` is looked up, and nothing else is done with it (RFC 8725 section 3.10)."""
    assert refusal_of_header(unsigned(head(kid=kid))) is Refusal.UNKNOWN_KEY


def test_a_token_without_key_id_is_refused() -> None:
    """Trying keys until one fits is not done."""
    assert refusal_of_header(unsigned({"alg": "RS256"})) is Refusal.UNKNOWN_KEY


SOUND = base64url(json.dumps(head()).encode())


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "...",
        SOUND,
        f"{SOUND}.e30",
        f"{SOUND}.e30.",
        f"{SOUND}..AAAA",
        f".{SOUND}.e30.AAAA",
        f"{SOUND}.e30.AAAA.",
        f"{SOUND}.e30.AAAA.AAAA",
        f"{SOUND}.e30.AAAA.AAAA.AAAA",
        f" {SOUND}.e30.AAAA",
        f"{SOUND}.e30.AAAA\n",
        f"{SOUND}.e30.AA==",
        f"{SOUND}.e30=.AAAA",
        f"{SOUND}=.e30.AAAA",
        f"{SOUND}.e30.AA+A",
        f"{SOUND}.e30.AA/A",
        f"{SOUND}.e30.AA A",
        f"{SOUND}.e30.AAAAA",
        f"{SOUND}.e30.AB",
        f"{SOUND}.e3\uff11.AAAA",
        f"{SOUND}.\udce9.AAAA",
    ],
)
def test_malformed_compact_serialisations_are_refused(token: str) -> None:
    """Exactly three segments of canonical, unpadded base64url; JWE has five."""
    assert refusal_of_header(token) is Refusal.MALFORMED


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b'"RS256"',
        b"{",
        b'{"alg":"RS256","kid":"k1"} x',
        b'{"alg":"RS256","kid":"k1","alg":"none"}',
        b'{"alg":"RS256","kid":"k1","a":{"b":1,"b":2}}',
        b'{"alg":"RS256","kid":"k1","a":NaN}',
        b'{"alg":"RS256","kid":"k1","a":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"alg":"RS256","kid":"k1","a":' + b"[" * 800 + b"}",
        b'{"alg":"RS256","kid":"\xff"}',
        b'\xef\xbb\xbf{"alg":"RS256","kid":"k1"}',
    ],
)
def test_headers_that_are_not_one_strict_json_object_are_refused(raw: bytes) -> None:
    """Two readers of one header must not see two headers."""
    expected = Refusal.MALFORMED if not raw else Refusal.HEADER
    assert refusal_of_header(unsigned(raw)) is expected


def test_the_longest_token_is_accepted_and_one_character_more_is_not() -> None:
    """The bound is ``MAX_TOKEN_LENGTH``."""
    fixed = len(unsigned(head(), payload="", signature="AAAA"))
    payload = "A" * (MAX_TOKEN_LENGTH - fixed)
    if len(payload) % 4 == 1:
        pytest.fail("the header's length must leave a payload that base64url can have")
    assert read_header(unsigned(head(), payload=payload), RS256).key_id == "k1"
    assert refusal_of_header(unsigned(head(), payload=payload + "A")) is Refusal.MALFORMED


def test_the_largest_header_is_accepted_and_one_byte_more_is_not() -> None:
    """The bound is ``MAX_HEADER_SIZE``."""
    empty = len(as_bytes(head(x5t="")))
    assert read_header(unsigned(head(x5t="a" * (MAX_HEADER_SIZE - empty))), RS256).key_id == "k1"
    over = unsigned(head(x5t="a" * (MAX_HEADER_SIZE - empty + 1)))
    assert refusal_of_header(over) is Refusal.MALFORMED


@given(st.binary(max_size=200))
def test_every_byte_string_has_one_spelling(data: bytes) -> None:
    """Decoding is the inverse of encoding, and no other text decodes to the same bytes."""
    text = base64url(data)
    if data:
        assert decode_base64url(text) == data
        for last in "ABCDwxyz019_-":
            other = text[:-1] + last
            assert other == text or decode_base64url(other) != data


@given(st.text(max_size=300) | st.builds(".".join, st.lists(st.from_regex(r"[\w=+/-]{0,40}"), max_size=6)))
def test_random_text_is_refused_and_nothing_else(text: str) -> None:
    """Whatever comes in, only the documented error comes out."""
    with pytest.raises(TokenRefused):
        read_header(text, frozenset(ALGORITHMS))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "x"]), json_values | st.just("RS256")))
def test_random_headers_are_read_or_refused(values: dict[str, object]) -> None:
    """A header of the right shape with wrong values raises nothing but the documented error."""
    try:
        result = read_header(unsigned(values), RS256)
    except NotAuthenticated:
        return
    assert result.algorithm == "RS256"
