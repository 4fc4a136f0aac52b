"""Which tokens open: the lines of RFC 8725 that need a key to be shown, and whatever else may come."""

from __future__ import annotations

import hmac
import json
import math

import pytest
import trio.testing
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import InvalidToken, NotAuthenticated
from gateway.core.identity import Credentials, Identity
from tests.adapters.token_door import ALL, door
from tests.jwt_material import (
    NOW,
    SigningKey,
    as_bytes,
    base64url,
    claims,
    ec_key,
    ed_key,
    header,
    rsa_key,
    token,
)


@pytest.mark.parametrize("key", [rsa_key(), ec_key(), ed_key()], ids=lambda key: key.algorithm)
async def test_a_good_token_opens(key: SigningKey) -> None:
    """With each algorithm that can be allowed, and without a checkpoint."""
    it = door(key, algorithms=ALL)
    bearer = token(key)
    with trio.testing.assert_no_checkpoints():
        identity = await it.enter(bearer, socket=True)
    assert identity == Identity("user-1", frozenset({"api:read", "api:write"}), NOW + 600)


@pytest.mark.parametrize("key", [ec_key(), ed_key()], ids=lambda key: key.algorithm)
async def test_other_algorithms_are_refused_until_they_are_allowed(key: SigningKey) -> None:
    """Even for a key that the issuer publishes."""
    it = door(key)
    assert await it.refusal(token(key)) == "algorithm"
    assert it.keys.asked == []


async def test_a_token_without_signature_is_refused() -> None:
    """``none`` in any spelling, with an empty signature or any other."""
    it = door(algorithms=ALL)
    payload = base64url(as_bytes(claims()))
    for name in ("none", "None", "NONE", "nOnE", ""):
        head = base64url(as_bytes(header(rsa_key(), alg=name)))
        assert await it.refusal(f"{head}.{payload}.") == "malformed"
        assert await it.refusal(f"{head}.{payload}.AAAA") == "algorithm"


async def test_a_public_key_does_not_work_as_a_shared_secret() -> None:
    """HS256 with the published key in any of its encodings (RFC 8725 section 2.1)."""
    it = door(algorithms=ALL)
    public = rsa_key().private.public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    secrets = [
        public.public_bytes(serialization.Encoding.PEM, spki),
        public.public_bytes(serialization.Encoding.DER, spki),
        json.dumps(rsa_key().jwk).encode(),
        b"",
    ]
    signing_input = f"{base64url(as_bytes(header(rsa_key(), alg='HS256')))}.{base64url(as_bytes(claims()))}"
    for secret in secrets:
        signature = base64url(hmac.digest(secret, signing_input.encode(), "sha256"))
        assert await it.refusal(f"{signing_input}.{signature}") == "algorithm"


@pytest.mark.parametrize(("claimed", "key"), [("ES256", rsa_key()), ("RS256", ec_key()), ("RS256", ed_key())])
async def test_an_allowed_algorithm_of_another_key_is_refused(claimed: str, key: SigningKey) -> None:
    """The key says the algorithm, the token only repeats it (RFC 8725 section 3.1)."""
    it = door(key, algorithms=ALL)
    assert await it.refusal(token(key, head=header(key, alg=claimed))) == "algorithm"


@pytest.mark.parametrize("key", [rsa_key(), ec_key(), ed_key()], ids=lambda key: key.algorithm)
async def test_a_signature_must_be_of_this_token_by_this_key(key: SigningKey) -> None:
    """Another's signature, another token's signature, half a signature, a wider one, zeros."""
    it = door(key, algorithms=ALL)
    signing_input, _, signature = token(key).rpartition(".")
    other = token(key, claims(sub="user-2"))
    impostor = {"RS256": rsa_key("rsa-x"), "ES256": ec_key("ec-x"), "EdDSA": ed_key("ed-x")}[key.algorithm]
    forged = [
        token(impostor, head=header(key)),
        f"{signing_input}.{other.rpartition('.')[2]}",
        f"{other.rpartition('.')[0]}.{signature}",
        f"{signing_input}.{signature[:40]}",
        f"{signing_input}.{signature[:84]}AAAA",
        f"{signing_input}.AAAA{signature[4:]}",
        f"{signing_input}.{base64url(bytes(64))}",
        f"{signing_input}.{base64url(bytes(256))}",
        f"{signing_input}.AA",
    ]
    for bearer in forged:
        assert await it.refusal(bearer) == "signature"


async def test_a_token_of_an_unknown_key_is_refused() -> None:
    """It names the key; no other is tried."""
    it = door(rsa_key())
    assert await it.refusal(token(rsa_key(), head=header(rsa_key(), kid="rsa-9"))) == "unknown_key"
    assert it.keys.asked == ["rsa-9"]


@pytest.mark.parametrize("name", ["jku", "x5u"])
async def test_a_token_cannot_say_where_its_key_is(name: str) -> None:
    """Well signed or not, it is refused before any key is looked for."""
    it = door()
    assert (
        await it.refusal(token(rsa_key(), head=header(rsa_key(), **{name: "https://keys.test/"}))) == "header"
    )
    assert it.keys.asked == []


async def test_a_token_cannot_bring_its_key() -> None:
    """Self-signed tokens are refused whatever their header holds."""
    it = door()
    own = rsa_key("rsa-x")
    for extra in ({"jwk": own.jwk}, {"x5c": ["MIIB"]}):
        assert await it.refusal(token(own, head=header(rsa_key(), **extra))) == "header"
    assert it.keys.asked == []


async def test_critical_extensions_are_refused_even_when_well_signed() -> None:
    """We understand none (RFC 7515 section 4.1.11), not those that the library understands either."""
    it = door()
    extras: list[dict[str, object]] = [
        {"crit": ["exp"], "exp": 1},
        {"crit": ["b64"], "b64": True},
        {"crit": []},
        {"b64": True},
    ]
    for extra in extras:
        assert await it.refusal(token(rsa_key(), head=header(rsa_key(), **extra))) == "header"


async def test_padded_and_non_canonical_encodings_are_refused() -> None:
    """One token has one spelling: the library alone would take these."""
    it = door()
    bearer = token(rsa_key(), claims(pad="x"))
    head, payload, signature = bearer.split(".")
    assert (await it.enter(bearer)).subject == "user-1"
    padded = signature + "=" * (-len(signature) % 4)
    assert padded != signature
    assert await it.refusal(f"{head}.{payload}.{padded}") == "malformed"
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = signature[:-1] + last[last.index(signature[-1]) + 1]
    assert await it.refusal(f"{head}.{payload}.{other}") == "malformed"


async def test_encrypted_tokens_are_refused() -> None:
    """JWE has five segments, whatever its header says."""
    it = door()
    bearer = token(rsa_key())
    assert await it.refusal(f"{bearer}.AAAA.AAAA") == "malformed"
    head = header(rsa_key(), alg="RSA-OAEP", enc="A256GCM")
    assert await it.refusal(token(rsa_key(), head=head)) == "algorithm"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "https://evil.test"}, "issuer"),
        ({"aud": "other"}, "audience"),
        ({"type": "refresh"}, "type"),
        ({"sub": "internal"}, "subject"),
        ({"sub": "a\r\nX-Admin: 1"}, "subject"),
        ({"exp": None}, "claims"),
        ({"scope": 1}, "scope"),
        ({"nbf": NOW + 1}, "not_yet_valid"),
        ({"iat": NOW + 1}, "not_yet_valid"),
    ],
)
async def test_well_signed_tokens_with_wrong_claims_are_refused(
    changes: dict[str, object], reason: str
) -> None:
    """A signature says who wrote it, not that it is for us."""
    assert await door().refusal(token(rsa_key(), claims(**changes))) == reason


@pytest.mark.parametrize("payload", [b"", b"null", b"{", b'{"sub":"a","sub":"b"}', b"[" * 3000 + b"]" * 3000])
async def test_well_signed_rubbish_is_refused(payload: bytes) -> None:
    """Also what would make a recursive reader fail."""
    assert await door().refusal(token(rsa_key(), payload)) in {"claims", "malformed"}


async def test_tokens_over_the_length_bound_are_refused_unread() -> None:
    """8 KiB, before anything is decoded."""
    it = door()
    assert await it.refusal(token(rsa_key(), claims(pad="x" * 6000))) == "malformed"
    assert await it.refusal("A" * 10_000_000) == "malformed"
    assert it.keys.asked == []


async def test_expiry_follows_the_injected_clock_to_the_moment() -> None:
    """Not the clock of the library, and with the leeway counted once."""
    it = door(leeway=30)
    bearer = token(rsa_key(), claims(exp=NOW + 600))
    it.clock.time = math.nextafter(NOW + 630, 0)
    assert (await it.enter(bearer)).expires_at == NOW + 630
    it.clock.time = NOW + 630
    assert await it.refusal(bearer) == "expired"


async def test_only_expiry_is_told_apart_to_the_caller() -> None:
    """All other refusals read the same, whichever check it was."""
    it = door()
    bearers = [
        "rubbish",
        token(rsa_key(), head=header(rsa_key(), kid="rsa-9")),
        token(rsa_key("rsa-x"), head=header(rsa_key())),
        token(rsa_key(), claims(aud="other")),
        token(rsa_key(), claims(sub="internal")),
    ]
    messages = set()
    for bearer in bearers:
        with pytest.raises(InvalidToken) as refused:
            await it.enter(bearer)
        messages.add(str(refused.value))
    with pytest.raises(InvalidToken, match="expired"):
        await it.enter(token(rsa_key(), claims(exp=NOW)))
    assert len(messages) == 1


async def test_what_was_presented_appears_in_no_log_and_no_error() -> None:
    """Neither the credentials nor what is in them, on any way of refusing, not in a chained error either."""
    it = door()
    secret = "planted-secret"
    bearers = [
        secret,
        token(rsa_key(), head=header(rsa_key(), kid=secret)),
        token(rsa_key(), head=header(rsa_key(), typ=secret)),
        token(rsa_key(), head=header(rsa_key(), alg=secret)),
        token(rsa_key(), head=b'{"' + secret.encode() + b'":1,"' + secret.encode() + b'":1}'),
        token(rsa_key("rsa-x"), claims(name=secret), header(rsa_key())),
        token(rsa_key(), claims(iss=secret)),
        token(rsa_key(), claims(sub=f"{secret}\n")),
        token(rsa_key(), b'{"' + secret.encode() + b'":1,"' + secret.encode() + b'":1}'),
    ]
    shown: list[str] = []
    for credentials in [
        Credentials(internal_key=secret),
        *(Credentials(bearer=bearer) for bearer in bearers),
    ]:
        with pytest.raises(NotAuthenticated) as refused:
            await it.authenticator.authenticate(credentials, socket=False)
        shown += [repr(credentials), repr(refused.value), repr(refused.value.__cause__)]
        assert refused.value.__suppress_context__ or refused.value.__context__ is None
    shown.append(repr(it.telemetry))
    assert not [text for text in shown if secret in text or base64url(secret.encode())[:16] in text]


# ------------------------------------------------------------------ whatever comes


@given(st.text(max_size=200), st.none() | st.text(max_size=50), st.booleans())
async def test_random_credentials_raise_nothing_but_refusals(
    bearer: str, key: str | None, socket: bool
) -> None:
    """The contract of ``Authenticator``."""
    with pytest.raises(NotAuthenticated):
        await door().authenticator.authenticate(Credentials(bearer=bearer, internal_key=key), socket=socket)


GOOD = {key.algorithm: token(key) for key in (rsa_key(), ec_key(), ed_key())}


@given(
    st.sampled_from(sorted(GOOD)),
    st.integers(0, 10_000),
    st.integers(0, 3),
    st.text(max_size=4) | st.sampled_from(["=", ".", "A", "-", "_", "+", "/", "\0", "\udce9"]),
)
async def test_a_good_token_with_a_change_anywhere_does_not_open(
    algorithm: str, position: int, removed: int, inserted: str
) -> None:
    """One character more, fewer or other, and it is refused; and nothing but refused."""
    good = GOOD[algorithm]
    position %= len(good)
    changed = good[:position] + inserted + good[position + removed :]
    it = door(rsa_key(), ec_key(), ed_key(), algorithms=ALL)
    if changed == good:
        assert (await it.enter(changed)).subject == "user-1"
    else:
        await it.refusal(changed)


@given(
    st.sampled_from(["alg", "typ", "kid", "crit", "jku", "x"]),
    st.sampled_from(["sub", "exp", "aud", "x"]),
    st.data(),
)
async def test_well_signed_tokens_of_random_content_are_read_or_refused(
    member: str, claim: str, data: st.DataObject
) -> None:
    """Even an issuer gone mad raises nothing but the documented error."""
    values = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(max_size=3))
    )
    head = {**header(rsa_key()), member: data.draw(values)}
    payload = {**claims(), claim: data.draw(values)}
    try:
        identity = await door().enter(token(rsa_key(), payload, head))
    except InvalidToken:
        return
    assert identity.subject == payload["sub"]
