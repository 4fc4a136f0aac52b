"""Which keys of a JWK Set (RFC 7517) may verify tokens. Pure: it reads members, it builds no key."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from gateway.core.jwt_rules import ALGORITHMS, decode_base64url, is_printable_name

MIN_RSA_BITS = 2048
"""RFC 7518 §3.3."""

MAX_RSA_BITS = 8192
"""A larger modulus costs milliseconds per token and buys nothing."""

MAX_RSA_EXPONENT_BYTES = 8
"""65537 takes three; a huge exponent makes each verification slow."""

_SECRET_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_COORDINATE_SIZE = 32
_PUBLIC_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}


class JwkSetInvalid(Exception):
    """The document is not a JWK Set: nothing in it can be used, and it replaces nothing."""


@frozen
class VerificationKey:
    """A public key that may verify tokens, with the one algorithm that it may be used for."""

    key_id: str
    algorithm: str
    members: Mapping[str, str]
    """``kty`` and the public members of RFC 7518 §6, nothing else of what was published."""


@frozen
class JwkSet:
    """What is left of a published set."""

    keys: Mapping[str, VerificationKey]
    """By ``kid``."""
    refused: tuple[str, ...] = field(default=())
    """Why each of the others is not used, in the order published; holds nothing that was published."""


def read_jwk_set(document: Mapping[str, object], algorithms: frozenset[str]) -> JwkSet:
    """Choose the keys of a published set that may verify tokens with one of ``algorithms``.

    A key is left out, and the others stand, when it has no ``kid``, is not meant for signatures (``use``,
    ``key_ops``), is for another algorithm (``alg``, ``kty``, ``crv``), is weak, or holds a secret: symmetric
    keys, and private ones, which the whole world can now sign with. Of several with one ``kid`` none is used.

    Raises ``JwkSetInvalid`` when the document is not a JWK Set.
    """
    published = document.get("keys")
    if not isinstance(published, list):
        raise JwkSetInvalid("it has no list of keys")
    keys: dict[str, VerificationKey] = {}
    repeated: set[str] = set()
    refused: list[str] = []
    for jwk in published:
        key = _read_jwk(jwk, algorithms)
        if isinstance(key, str):
            refused.append(key)
        elif key.key_id in keys:
            repeated.add(key.key_id)
        else:
            keys[key.key_id] = key
    for key_id in repeated:
        del keys[key_id]
        refused.append("several keys have one kid")
    return JwkSet(keys, tuple(refused))


def _read_jwk(jwk: object, algorithms: frozenset[str]) -> VerificationKey | str:
    """The key, or why it is refused."""
    if not isinstance(jwk, dict):
        return "not an object"
    if not _SECRET_MEMBERS.isdisjoint(jwk):
        return "it holds a secret"
    key_id = jwk.get("kid")
    if not is_printable_name(key_id):
        return "no usable kid"
    if jwk.get("use", "sig") != "sig":
        return "not for signatures"
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return "not for verifying"
    key_type = jwk.get("kty")
    algorithm = next(
        (
            candidate
            for candidate in ALGORITHMS.values()
            if candidate.key_type == key_type and candidate.curve in (None, jwk.get("crv"))
        ),
        None,
    )
    if (
        algorithm is None
        or algorithm.name not in algorithms
        or jwk.get("alg", algorithm.name) != algorithm.name
    ):
        return "not for an allowed algorithm"
    members = {name: jwk.get(name) for name in ("kty", *_PUBLIC_MEMBERS[algorithm.key_type])}
    if not _has_sound_numbers(algorithm.key_type, members):
        return "malformed or weak"
    return VerificationKey(str(key_id), algorithm.name, {name: str(value) for name, value in members.items()})


def _has_sound_numbers(key_type: str, members: Mapping[str, object]) -> bool:
    if key_type == "RSA":
        modulus = _number(members["n"]).lstrip(b"\0")
        exponent = _number(members["e"]).lstrip(b"\0")
        bits = int.from_bytes(modulus[:1]).bit_length() + 8 * (len(modulus) - 1)
        return MIN_RSA_BITS <= bits <= MAX_RSA_BITS and 0 < len(exponent) <= MAX_RSA_EXPONENT_BYTES
    return all(
        len(_number(value)) == _COORDINATE_SIZE for name, value in members.items() if name in ("x", "y")
    )


def _number(value: object) -> bytes:
    return (decode_base64url(value) if isinstance(value, str) else None) or b""
