"""What a JWT must look like to be believed: all of RFC 8725 that needs neither a key nor a clock of its own.

Two halves around the one thing that is not here, the signature:

    read_header(token)            before it: shape, encoding, header, algorithm; nothing of it is believed yet
    identity_from_claims(payload) after it: issuer, audience, type, subject, times, scopes

The payload is not even parsed before its signature has been verified.
"""

from __future__ import annotations

import base64
import enum
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from attrs import field, frozen

from gateway.core.codec import decode_json_object
from gateway.core.errors import InvalidMessage, InvalidToken
from gateway.core.identity import ANONYMOUS_SUBJECT, INTERNAL_SUBJECT, Identity

MAX_TOKEN_LENGTH = 8192
"""Characters. Servers commonly bound a whole request head to this; real tokens stay below 2 KiB."""

MAX_HEADER_SIZE = 1024
"""Bytes of decoded header. ``alg``, ``typ``, ``kid`` and a thumbprint or two fit many times over."""

LAST_NUMERIC_DATE = 253_402_300_799
"""9999-12-31T23:59:59Z: a later date is no date but an attempt at arithmetic."""

TOKEN_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
"""Accepted ``typ``, compared in lower case (RFC 7515 §4.1.9, RFC 9068 §4); absent is accepted."""

RESERVED_SUBJECTS = frozenset({ANONYMOUS_SUBJECT, INTERNAL_SUBJECT})
"""Never a token's ``sub``: it would own what anonymous callers or services own."""

_FORBIDDEN_HEADERS = frozenset({"crit", "b64", "jku", "jwk", "x5u", "x5c"})
_PRINTABLE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


@frozen
class SignatureAlgorithm:
    """One ``alg`` and the only kind of key that it is ever used with."""

    name: str
    key_type: str
    """``kty`` of RFC 7518 §6.1."""
    curve: str | None = None
    """``crv``, for key types that have one."""


ALGORITHMS: Mapping[str, SignatureAlgorithm] = MappingProxyType(
    {
        "RS256": SignatureAlgorithm("RS256", "RSA"),
        "ES256": SignatureAlgorithm("ES256", "EC", "P-256"),
        "EdDSA": SignatureAlgorithm("EdDSA", "OKP", "Ed25519"),
    }
)
"""All that can be put on an allow-list. No two share a kind of key, so a key alone says its algorithm."""


class Refusal(enum.Enum):
    """Why a token was refused: for logs. The caller is told no more than expired or invalid."""

    MALFORMED = "malformed"
    HEADER = "header"
    ALGORITHM = "algorithm"
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    CLAIMS = "claims"
    ISSUER = "issuer"
    AUDIENCE = "audience"
    TYPE = "type"
    SUBJECT = "subject"
    SCOPE = "scope"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"


class TokenRefused(InvalidToken):
    """A token that does not hold; ``reason`` is for logs, the message for the caller (RFC 6750 §3.1)."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(
            "The access token has expired; get a new one."
            if reason is Refusal.EXPIRED
            else "The access token is not valid here; get a new one from the auth service."
        )
        self.reason = reason


def _checked_algorithms(names: Iterable[str]) -> frozenset[str]:
    allowed = frozenset(names)
    if not allowed or not allowed <= ALGORITHMS.keys():
        raise ValueError(f"JWT algorithms must be some of {', '.join(ALGORITHMS)}.")
    return allowed


@frozen
class TokenRules:
    """What this gateway accepts. Raises ``ValueError`` for rules that would accept too much."""

    issuer: str
    audience: str
    algorithms: frozenset[str] = field(default=frozenset({"RS256"}), converter=_checked_algorithms)
    """Names out of ``ALGORITHMS``. Symmetric ones and ``none`` cannot be listed."""
    leeway: float = 30.0
    """Seconds by which the issuer's clock may differ from ours, either way."""

    def __attrs_post_init__(self) -> None:
        if not self.issuer or not self.audience:
            raise ValueError(
                "Issuer and audience of tokens must be set: tokens for others would be accepted."
            )
        if not 0 <= self.leeway <= 600:
            raise ValueError("The leeway must be between 0 and 600 seconds.")


@frozen
class TokenHeader:
    """What of an unverified header is needed to find the key."""

    algorithm: str
    key_id: str


def decode_base64url(text: str) -> bytes | None:
    """Decode unpadded, canonical base64url (RFC 7515 §2, RFC 4648 §3.5), or None for anything else.

    Canonical: encoding the result gives the same text, so one value has one spelling.
    """
    if not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        return None
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return decoded if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() == text else None


def is_printable_name(value: object) -> bool:
    """Whether ``value`` is 1 to 256 printable ASCII characters that neither begin nor end with a space.

    Such a string can stand in a header (RFC 9110 §5.5) and in a log line as it is.
    """
    return isinstance(value, str) and _PRINTABLE.fullmatch(value) is not None


def is_token_subject(value: object) -> bool:
    """Whether a token may have ``value`` as its ``sub``: it is sent on as ``X-User-ID`` and owns sessions."""
    return is_printable_name(value) and value not in RESERVED_SUBJECTS


def read_header(token: str, algorithms: frozenset[str]) -> TokenHeader:
    """Check everything about ``token`` that can be checked before its signature.

    Exactly three segments, canonical base64url, a small strict JSON header, an allowed ``alg``, a ``kid``.
    A header that brings its own key, says where to fetch one (``jwk``, ``jku``, ``x5c``, ``x5u``), or names
    an extension (``crit``, ``b64``) refuses the token (RFC 7515 §4.1, RFC 8725 §3.10): nothing in a token
    is obeyed. Thumbprints (``x5t``) and unknown members say nothing to us and are ignored.

    Raises ``TokenRefused`` and nothing else.
    """
    if len(token) > MAX_TOKEN_LENGTH:
        raise TokenRefused(Refusal.MALFORMED)
    segments = [decode_base64url(segment) for segment in token.split(".", 3)]
    if len(segments) != 3 or None in segments:
        raise TokenRefused(Refusal.MALFORMED)
    raw = segments[0]
    if raw is None or len(raw) > MAX_HEADER_SIZE:
        raise TokenRefused(Refusal.MALFORMED)
    header = _decode_object(raw, Refusal.HEADER)
    if not _FORBIDDEN_HEADERS.isdisjoint(header):
        raise TokenRefused(Refusal.HEADER)
    token_type = header.get("typ", "JWT")
    if not isinstance(token_type, str) or token_type.lower() not in TOKEN_TYPES:
        raise TokenRefused(Refusal.TYPE)
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in algorithms:
        raise TokenRefused(Refusal.ALGORITHM)
    key_id = header.get("kid")
    if not isinstance(key_id, str) or not is_printable_name(key_id):
        raise TokenRefused(Refusal.UNKNOWN_KEY)
    return TokenHeader(algorithm, key_id)


def identity_from_claims(payload: bytes, rules: TokenRules, now: float) -> Identity:
    """Who a token whose signature was verified speaks for, at ``now`` (seconds since the Unix epoch).

    ``exp``, ``sub``, ``iss``, ``aud`` and ``type`` are required. Not accepted from ``exp`` + leeway on,
    nor earlier than the leeway before ``nbf`` or ``iat`` (RFC 7519 §4.1).

    The identity expires at ``exp``; when only the leeway still carries the token, at the leeway's end, so
    that nothing is admitted as already expired.

    Raises ``TokenRefused`` and nothing else.
    """
    claims = _decode_object(payload, Refusal.CLAIMS)
    if claims.get("iss") != rules.issuer:
        raise TokenRefused(Refusal.ISSUER)
    if not _names_audience(claims.get("aud"), rules.audience):
        raise TokenRefused(Refusal.AUDIENCE)
    if claims.get("type") != "access":
        raise TokenRefused(Refusal.TYPE)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not is_token_subject(subject):
        raise TokenRefused(Refusal.SUBJECT)
    expires = _numeric_date(claims.get("exp"))
    if now >= expires + rules.leeway:
        raise TokenRefused(Refusal.EXPIRED)
    for name in ("nbf", "iat"):
        if name in claims and now < _numeric_date(claims[name]) - rules.leeway:
            raise TokenRefused(Refusal.NOT_YET_VALID)
    return Identity(
        subject=subject,
        scopes=_scopes(claims.get("scope", "")),
        expires_at=expires if now < expires else expires + rules.leeway,
    )


def _decode_object(raw: bytes, reason: Refusal) -> dict[str, object]:
    try:
        return decode_json_object(raw)
    except InvalidMessage:
        # Without its cause: that quotes what the caller sent.
        raise TokenRefused(reason) from None


def _names_audience(claim: object, audience: str) -> bool:
    if isinstance(claim, list):
        return audience in claim and all(isinstance(item, str) for item in claim)
    return claim == audience


def _numeric_date(value: object) -> float:
    # bool is an int to Python, not to RFC 7519; the comparison is False for NaN and infinities.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LAST_NUMERIC_DATE:
        raise TokenRefused(Refusal.CLAIMS)
    return float(value)


def _scopes(claim: object) -> frozenset[str]:
    if not isinstance(claim, str):
        raise TokenRefused(Refusal.SCOPE)
    scopes = frozenset(claim.split(" ")) - {""}
    if not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise TokenRefused(Refusal.SCOPE)
    return scopes
