"""Which published keys may verify tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.jwk_rules import JwkSetInvalid, read_jwk_set
from gateway.core.jwt_rules import ALGORITHMS
from tests.jwt_material import SigningKey, base64url, ec_key, ed_key, rsa_key

ALL = frozenset(ALGORITHMS)


def jwk(**changes: object) -> dict[str, object]:
    """A sound RSA key as it is published, with changes; ``None`` takes a member out."""
    return {name: value for name, value in {**rsa_key().jwk, **changes}.items() if value is not None}


def refusals(*keys: object, algorithms: frozenset[str] = ALL) -> tuple[str, ...]:
    """Why keys are refused; fails when one is not."""
    chosen = read_jwk_set({"keys": list(keys)}, algorithms)
    assert chosen.keys == {}
    return chosen.refused


@pytest.mark.parametrize("key", [rsa_key(), ec_key(), ed_key()], ids=lambda key: key.algorithm)
def test_a_sound_key_is_taken_with_its_one_algorithm(key: SigningKey) -> None:
    """Only the members that make the key are kept."""
    chosen = read_jwk_set({"keys": [{**key.jwk, "x5u": "https://elsewhere.test"}]}, ALL)
    taken = chosen.keys[key.key_id]
    assert (taken.key_id, taken.algorithm, chosen.refused) == (key.key_id, key.algorithm, ())
    assert taken.members.keys() <= {"kty", "n", "e", "crv", "x", "y"}


def test_what_a_key_is_for_may_be_left_out() -> None:
    """``use``, ``key_ops`` and ``alg`` are optional (RFC 7517 section 4)."""
    assert read_jwk_set({"keys": [jwk(use=None, alg=None)]}, ALL).keys.keys() == {"rsa-1"}
    assert read_jwk_set({"keys": [jwk(key_ops=["verify"])]}, ALL).keys.keys() == {"rsa-1"}


@pytest.mark.parametrize("key", [ec_key(), ed_key()], ids=lambda key: key.algorithm)
def test_keys_for_algorithms_off_the_list_are_refused(key: SigningKey) -> None:
    """The issuer does not extend our allow-list."""
    assert refusals(key.jwk, algorithms=frozenset({"RS256"})) == ("not for an allowed algorithm",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use": "enc"}, "not for signatures"),
        ({"use": ""}, "not for signatures"),
        ({"use": ["sig"]}, "not for signatures"),
        ({"key_ops": ["sign"]}, "not for verifying"),
        ({"key_ops": []}, "not for verifying"),
        ({"key_ops": "verify"}, "not for verifying"),
        ({"key_ops": ["encrypt", "wrapKey"]}, "not for verifying"),
        ({"alg": "RS512"}, "not for an allowed algorithm"),
        ({"alg": "HS256"}, "not for an allowed algorithm"),
        ({"alg": "ES256"}, "not for an allowed algorithm"),
        ({"alg": ["RS256"]}, "not for an allowed algorithm"),
        ({"kty": "EC"}, "not for an allowed algorithm"),
        ({"kty": "oct"}, "not for an allowed algorithm"),
        ({"kty": ["RSA"]}, "not for an allowed algorithm"),
        ({"kid": None}, "no usable kid"),
        ({"kid": ""}, "no usable kid"),
        ({"kid": 1}, "no usable kid"),
        ({"kid": "a\nb"}, "no usable kid"),
        ({"d": "AQAB"}, "it holds a secret"),
        ({"p": ""}, "it holds a secret"),
        ({"n": "AQAB"}, "malformed or weak"),
        ({"n": 5}, "malformed or weak"),
        ({"n": "!"}, "malformed or weak"),
        ({"n": base64url(b"\xff" * 1025)}, "malformed or weak"),
        ({"n": base64url(b"\x7f" + b"\xff" * 255)}, "malformed or weak"),
        ({"n": base64url(b"\0" * 256 + b"\xff" * 128)}, "malformed or weak"),
        ({"e": ""}, "malformed or weak"),
        ({"e": "AA"}, "malformed or weak"),
        ({"e": base64url(b"\x01" * 9)}, "malformed or weak"),
    ],
    ids=repr,
)
def test_unfit_keys_are_refused(changes: dict[str, object], reason: str) -> None:
    """Each for one reason, which holds nothing of the key."""
    base = {name: value for name, value in jwk().items() if name not in changes}
    changed = {name: value for name, value in changes.items() if value is not None}
    assert refusals({**base, **changed}) == (reason,)


def test_symmetric_keys_are_refused() -> None:
    """Whoever can read the set could sign with them."""
    assert refusals({"kty": "oct", "kid": "s", "k": "c2VjcmV0", "alg": "HS256"}) == ("it holds a secret",)


@pytest.mark.parametrize("curve", ["P-384", "P-521", "secp256k1", "Ed25519", None, ["P-256"]])
def test_other_curves_are_refused(curve: object) -> None:
    """ES256 is P-256 and nothing else (RFC 7518 section 3.4)."""
    assert refusals({**ec_key().jwk, "crv": curve}) == ("not for an allowed algorithm",)


@pytest.mark.parametrize("x", ["", "AAAA", base64url(b"\1" * 31), base64url(b"\1" * 33), None, 7])
@pytest.mark.parametrize("key", [ec_key(), ed_key()], ids=lambda key: key.algorithm)
def test_coordinates_of_the_wrong_size_are_refused(key: SigningKey, x: object) -> None:
    """32 bytes on both curves."""
    assert refusals({**key.jwk, "x": x}) == ("malformed or weak",)


def test_of_several_keys_with_one_id_none_is_used() -> None:
    """An id that means two keys means none; the others stand."""
    twice = {**rsa_key("rsa-2").jwk, "kid": "rsa-1"}
    chosen = read_jwk_set({"keys": [jwk(), twice, jwk(), ec_key().jwk]}, ALL)
    assert chosen.keys.keys() == {"ec-1"}
    assert chosen.refused == ("several keys have one kid",)


def test_an_unfit_key_does_not_hide_a_fit_one_of_the_same_id() -> None:
    """An encryption key may share the id of a signing key (RFC 7517 section 4.5)."""
    assert read_jwk_set({"keys": [jwk(use="enc"), jwk()]}, ALL).keys.keys() == {"rsa-1"}


@pytest.mark.parametrize(
    "document", [{}, {"keys": None}, {"keys": {}}, {"keys": "x"}, {"Keys": []}], ids=repr
)
def test_what_is_no_key_set_is_refused_as_a_whole(document: dict[str, object]) -> None:
    """It must not pass for an empty set, which takes all keys back."""
    with pytest.raises(JwkSetInvalid):
        read_jwk_set(document, ALL)


def test_an_empty_set_is_a_set() -> None:
    """An issuer may take all its keys back."""
    assert read_jwk_set({"keys": []}, ALL).keys == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
names = st.sampled_from(["kty", "kid", "use", "key_ops", "alg", "n", "e", "crv", "x", "y"])


@given(st.lists(json_values | st.dictionaries(names, json_values).map(lambda changes: {**jwk(), **changes})))
def test_random_sets_are_read_or_refused(keys: list[object]) -> None:
    """Whatever is published, nothing but the documented error is raised."""
    chosen = read_jwk_set({"keys": keys}, ALL)
    assert len(chosen.keys) + len(chosen.refused) <= len(keys)
