"""The rules for a token after its signature was verified, and how refusals are told."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import NotAuthenticated
from gateway.core.identity import Identity
from gateway.core.jwt_rules import (
    Refusal,
    TokenRefused,
    TokenRules,
    identity_from_claims,
    is_token_subject,
)
from tests.jwt_material import AUDIENCE, ISSUER, NOW, as_bytes, claims

RULES = TokenRules(issuer=ISSUER, audience=AUDIENCE, leeway=10)


def refusal_of_claims(payload: dict[str, object] | bytes, now: float = NOW) -> Refusal:
    """Why the claims are refused; fails when they are not."""
    with pytest.raises(TokenRefused) as refused:
        identity_from_claims(as_bytes(payload), RULES, now)
    return refused.value.reason


def test_claims_become_an_identity() -> None:
    """Subject, scopes and expiry are the token's; it never sees all."""
    payload = as_bytes(claims(scope="api:read  custom:x ", exp=NOW + 60))
    assert identity_from_claims(payload, RULES, NOW) == Identity(
        subject="user-1", scopes=frozenset({"api:read", "custom:x"}), expires_at=NOW + 60, sees_all=False
    )


def test_a_token_without_scope_may_nothing() -> None:
    """No scope is no permission, not the default one."""
    assert identity_from_claims(as_bytes(claims(scope=None)), RULES, NOW).scopes == frozenset()


@pytest.mark.parametrize(
    "scope", [["api:read"], 1, None, {"api:read": 1}, "api:read\tapi:write", 'a"b', "a\\b", "é"]
)
def test_scopes_that_are_no_scope_string_are_refused(scope: object) -> None:
    """RFC 6749 section 3.3 says what a scope is made of."""
    assert refusal_of_claims({**claims(), "scope": scope}) is Refusal.SCOPE


@pytest.mark.parametrize("issuer", [None, "", ISSUER + "/", ISSUER.upper(), "https://evil.test", [ISSUER], 1])
def test_tokens_of_another_issuer_are_refused(issuer: object) -> None:
    """The whole string, and a string (RFC 8725 section 3.8)."""
    assert refusal_of_claims({**claims(), "iss": issuer}) is Refusal.ISSUER


@pytest.mark.parametrize(
    "audience", [None, "", "other", [], ["other"], [AUDIENCE, 1], [[AUDIENCE]], {AUDIENCE: 1}]
)
def test_tokens_for_another_audience_are_refused(audience: object) -> None:
    """A token for another service does not open this one (RFC 8725 section 3.9)."""
    assert refusal_of_claims({**claims(), "aud": audience}) is Refusal.AUDIENCE


def test_one_of_several_audiences_is_enough() -> None:
    """RFC 7519 section 4.1.3."""
    payload = as_bytes(claims(aud=["other", AUDIENCE]))
    assert identity_from_claims(payload, RULES, NOW).subject == "user-1"


@pytest.mark.parametrize("kind", [None, "refresh", "id", "Access", "", ["access"], True])
def test_tokens_that_are_not_access_tokens_are_refused(kind: object) -> None:
    """A refresh token opens nothing here."""
    assert refusal_of_claims({**claims(), "type": kind}) is Refusal.TYPE


@pytest.mark.parametrize(
    "subject",
    [
        None,
        "",
        " ",
        " a",
        "a ",
        "a\r\nX-Admin: 1",
        "a\0",
        "a\x7f",
        "a\tb",
        "é",
        "a" * 257,
        1,
        ["a"],
        {"a": 1},
    ],
)
def test_subjects_that_cannot_stand_in_a_header_are_refused(subject: object) -> None:
    """``sub`` is sent on as ``X-User-ID``."""
    assert refusal_of_claims({**claims(), "sub": subject}) is Refusal.SUBJECT


@pytest.mark.parametrize("subject", ["internal", "anonymous"])
def test_reserved_subjects_are_refused(subject: str) -> None:
    """No token owns what services and anonymous callers own."""
    assert refusal_of_claims(claims(sub=subject)) is Refusal.SUBJECT


@pytest.mark.parametrize("subject", ["a", "a b", "auth0|507f1f77", "u" * 256, "user@example.test", "~!#"])
def test_ordinary_subjects_are_accepted(subject: str) -> None:
    """Printable ASCII up to 256 characters."""
    assert is_token_subject(subject)
    assert identity_from_claims(as_bytes(claims(sub=subject)), RULES, NOW).subject == subject


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exp", Refusal.CLAIMS),
        ("sub", Refusal.SUBJECT),
        ("iss", Refusal.ISSUER),
        ("aud", Refusal.AUDIENCE),
        ("type", Refusal.TYPE),
    ],
)
def test_required_claims_are_required(name: str, reason: Refusal) -> None:
    """None of them has a default."""
    assert refusal_of_claims(claims(**{name: None})) is reason


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", ["1750000000", True, None, [], {}, -1, 1e300, 253_402_300_800])
def test_dates_that_are_no_numeric_dates_are_refused(name: str, value: object) -> None:
    """A finite number of seconds, in the years that there are."""
    assert refusal_of_claims({**claims(), name: value}) is Refusal.CLAIMS


@pytest.mark.parametrize("raw", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" + b"0" * 400])
def test_infinite_dates_are_refused(raw: bytes) -> None:
    """Whether they are refused as JSON or as dates."""
    payload = as_bytes(claims(exp=None))[:-1] + b',"exp":' + raw + b"}"
    assert refusal_of_claims(payload) is Refusal.CLAIMS


def test_expiry_is_exact_at_the_leeway() -> None:
    """The last moment counts as valid, the moment of expiry plus leeway does not (RFC 7519 section 4.1.4)."""
    payload = as_bytes(claims(exp=NOW))
    last_moment = math.nextafter(NOW + 10, 0)
    assert identity_from_claims(payload, RULES, last_moment).subject == "user-1"
    assert refusal_of_claims(payload, NOW + 10) is Refusal.EXPIRED


def test_an_identity_is_never_born_expired() -> None:
    """It ends at ``exp``, or at the leeway's end when only the leeway still carries it."""
    payload = as_bytes(claims(exp=NOW))
    before = math.nextafter(NOW, 0)
    assert identity_from_claims(payload, RULES, before).expires_at == NOW
    assert identity_from_claims(payload, RULES, NOW).expires_at == NOW + 10


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_the_start_is_exact_at_the_leeway(name: str) -> None:
    """From the leeway before it on, and not a moment earlier (RFC 7519 section 4.1.5)."""
    payload = as_bytes(claims(**{name: NOW}))
    assert identity_from_claims(payload, RULES, NOW - 10).subject == "user-1"
    assert refusal_of_claims(payload, math.nextafter(NOW - 10, 0)) is Refusal.NOT_YET_VALID


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        as_bytes(claims())[:-1] + b',"sub":"root"}',
        as_bytes(claims())[:-1] + b',"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_payloads_that_are_not_one_strict_json_object_are_refused(raw: bytes) -> None:
    """A signature does not make them readable in one way only."""
    assert refusal_of_claims(raw) is Refusal.CLAIMS


def test_only_expiry_is_told_apart() -> None:
    """A caller can act on expiry; which other check failed helps only those who probe."""
    messages = {reason: str(TokenRefused(reason)) for reason in Refusal}
    assert "expired" in messages.pop(Refusal.EXPIRED)
    assert len(set(messages.values())) == 1


def test_messages_can_stand_in_a_challenge() -> None:
    """``error_description`` has neither quotes nor backslashes nor non-ASCII (RFC 6750 section 3)."""
    for reason in Refusal:
        assert all(
            " " <= character <= "~" and character not in '"\\' for character in str(TokenRefused(reason))
        )


@pytest.mark.parametrize("names", [set(), {"none"}, {"HS256"}, {"RS256", "HS256"}, {"RS512"}, {""}])
def test_rules_that_accept_too_much_cannot_be_made(names: set[str]) -> None:
    """Symmetric algorithms and none cannot be put on the allow-list."""
    with pytest.raises(ValueError, match="algorithms"):
        TokenRules(issuer=ISSUER, audience=AUDIENCE, algorithms=frozenset(names))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenRules(issuer="", audience=AUDIENCE),
        lambda: TokenRules(issuer=ISSUER, audience=""),
        lambda: TokenRules(issuer=ISSUER, audience=AUDIENCE, leeway=-1),
        lambda: TokenRules(issuer=ISSUER, audience=AUDIENCE, leeway=601),
        lambda: TokenRules(issuer=ISSUER, audience=AUDIENCE, leeway=math.nan),
    ],
)
def test_rules_without_issuer_audience_or_sane_leeway_cannot_be_made(
    make: Callable[[], TokenRules],
) -> None:
    """They would accept tokens for others, or for ever."""
    with pytest.raises(ValueError, match=r"must be"):
        make()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "type", "exp", "nbf", "iat", "scope"]), json_values
    ),
    st.floats(min_value=0, max_value=1e11),
)
def test_random_claims_are_read_or_refused(values: dict[str, object], now: float) -> None:
    """Claims of the right shape with wrong values raise nothing but the documented error."""
    try:
        identity = identity_from_claims(as_bytes({**claims(), **values}), RULES, now)
    except NotAuthenticated:
        return
    assert identity.expires_at is not None
    assert identity.expires_at > now
    assert not identity.sees_all
