"""Keys, tokens and key sets for tests: made the plain way, so that every rule can be broken one at a time."""

from __future__ import annotations

import base64
import functools
import json

import jwt
from attrs import define, field, frozen
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from gateway.ports import Clock, Telemetry

ISSUER = "https://auth.test"
AUDIENCE = "gateway-test"
NOW = 1_750_000_000.0

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@frozen
class SigningKey:
    """A key pair of an auth service."""

    key_id: str
    algorithm: str
    private: PrivateKey = field(repr=False)

    @property
    def jwk(self) -> dict[str, object]:
        """The public half, as it is published."""
        implementation = get_default_algorithms()[self.algorithm]
        public = implementation.to_jwk(self.private.public_key(), as_dict=True)
        public.pop("key_ops", None)
        return {**public, "kid": self.key_id, "use": "sig", "alg": self.algorithm}

    @property
    def verifier(self) -> jwt.PyJWK:
        """The public half, ready to verify."""
        return jwt.PyJWK(self.jwk, algorithm=self.algorithm)


@functools.cache
def rsa_key(key_id: str = "rsa-1", bits: int = 2048) -> SigningKey:
    """One RSA key pair per id and test session."""
    return SigningKey(key_id, "RS256", rsa.generate_private_key(65537, bits))


@functools.cache
def ec_key(key_id: str = "ec-1") -> SigningKey:
    """One P-256 key pair per id and test session."""
    return SigningKey(key_id, "ES256", ec.generate_private_key(ec.SECP256R1()))


@functools.cache
def ed_key(key_id: str = "ed-1") -> SigningKey:
    """One Ed25519 key pair per id and test session."""
    return SigningKey(key_id, "EdDSA", ed25519.Ed25519PrivateKey.generate())


def base64url(data: bytes) -> str:
    """Unpadded base64url."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(**changes: object) -> dict[str, object]:
    """The claims of a token that holds at ``NOW``, with changes; ``None`` takes a claim out."""
    base: dict[str, object] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "type": "access",
        "sub": "user-1",
        "exp": NOW + 600,
        "scope": "api:read api:write",
    }
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def header(key: SigningKey, **changes: object) -> dict[str, object]:
    """The header of a token signed with ``key``, with changes; ``None`` takes a member out."""
    base: dict[str, object] = {"alg": key.algorithm, "typ": "JWT", "kid": key.key_id}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def as_bytes(value: dict[str, object] | bytes) -> bytes:
    """JSON of an object; bytes as they are."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def token(
    key: SigningKey,
    payload: dict[str, object] | bytes | None = None,
    head: dict[str, object] | bytes | None = None,
) -> str:
    """A token signed with ``key``: a good one, or with this payload and header whatever they are."""
    segments = [header(key) if head is None else head, claims() if payload is None else payload]
    signing_input = ".".join(base64url(as_bytes(segment)) for segment in segments)
    signature = get_default_algorithms()[key.algorithm].sign(signing_input.encode(), key.private)
    return f"{signing_input}.{base64url(signature)}"


def jwk_set(*keys: SigningKey) -> bytes:
    """The document that an auth service publishes."""
    return json.dumps({"keys": [key.jwk for key in keys]}).encode()


@define
class SettableClock(Clock):
    """A wall clock that stands where it was put."""

    time: float = NOW

    def now(self) -> float:
        """The time that was set."""
        return self.time


@define
class RecordingTelemetry(Telemetry):
    """Keeps what it is told."""

    logged: list[tuple[str, str, dict[str, object]]] = field(factory=list)
    """Level, event, fields."""
    counted: list[tuple[str, dict[str, str]]] = field(factory=list)

    def debug(self, event: str, **fields: object) -> None:
        """Keep."""
        self.logged.append(("debug", event, fields))

    def info(self, event: str, **fields: object) -> None:
        """Keep."""
        self.logged.append(("info", event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Keep."""
        self.logged.append(("warning", event, fields))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Keep."""
        self.logged.append(("error", event, {**fields, "cause": cause}))

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Keep."""
        self.counted.append((metric, labels))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Nothing of identity is observed."""

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """Nothing of identity is a gauge."""
