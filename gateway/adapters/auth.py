"""Who is calling: the internal key, anonymous sockets, and JWTs (protocol.md section 7).

Everything that is presented must hold. A wrong key is a refusal even beside a good token, and the other
way round: falling back would let a caller try one proof under the cover of another. When both hold, the
token says who is calling: a proxy or a service that adds its key to a user's request must not turn that
user into one who sees all.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Protocol

import jwt

from gateway.core.errors import NotAuthenticated
from gateway.core.identity import ANONYMOUS_SUBJECT, INTERNAL_SUBJECT, Credentials, Identity
from gateway.core.jwt_rules import Refusal, TokenRefused, TokenRules, identity_from_claims, read_header
from gateway.ports import Authenticator, Clock, Telemetry

# Internal identities carry the default scopes, read and write; administration needs a token that says so.
_INTERNAL = Identity(subject=INTERNAL_SUBJECT, sees_all=True)
_ANONYMOUS = Identity(subject=ANONYMOUS_SUBJECT)


class KeySource(Protocol):
    """Where signing keys come from."""

    async def key_for(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id, or None. Never raises; a known key never waits."""
        ...


class InternalKeyAuthenticator(Authenticator):
    """``USE_JWT_AUTH=false``: the internal key, and anonymous sockets where they are allowed.

    A bearer token is not looked at: nothing here could verify it, and clients may send theirs anywhere.
    """

    def __init__(self, internal_key: str, telemetry: Telemetry, *, anonymous_sockets: bool) -> None:
        self._internal_key = _InternalKey(internal_key)
        self._telemetry = telemetry
        self._anonymous_sockets = anonymous_sockets

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """Verify; see ``Authenticator``. No checkpoint. Raises ``NotAuthenticated``."""
        if credentials.internal_key is not None:
            if not self._internal_key.is_equal(credentials.internal_key):
                raise _wrong_internal_key(self._telemetry, socket)
            return _INTERNAL
        if socket and self._anonymous_sockets:
            return _ANONYMOUS
        raise NotAuthenticated("Authentication is needed here: send the internal key in X-Internal-Auth.")


class TokenAuthenticator(Authenticator):
    """``USE_JWT_AUTH=true``: a JWT, or the internal key; nobody is anonymous.

    ``clock`` decides about expiry. PyJWT verifies the signature and nothing else: its time checks read the
    wall clock, and it takes encodings, headers and keys that ``core/jwt_rules.py`` refuses before it.
    """

    def __init__(
        self, internal_key: str, keys: KeySource, rules: TokenRules, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._internal_key = _InternalKey(internal_key)
        self._keys = keys
        self._rules = rules
        self._clock = clock
        self._telemetry = telemetry
        self._signatures = jwt.PyJWS(algorithms=sorted(rules.algorithms))

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """Verify; see ``Authenticator``. A checkpoint only where an unknown signing key is waited for.

        Raises ``NotAuthenticated``, or ``InvalidToken`` for a token that does not hold.
        """
        if credentials.internal_key is not None and not self._internal_key.is_equal(credentials.internal_key):
            raise _wrong_internal_key(self._telemetry, socket)
        if credentials.bearer is not None:
            try:
                return await self._verify(credentials.bearer)
            except TokenRefused as refused:
                self._telemetry.info("credentials_refused", reason=refused.reason.value, socket=socket)
                raise
        if credentials.internal_key is not None:
            return _INTERNAL
        raise NotAuthenticated("Authentication is needed here: send a token in Authorization: Bearer.")

    async def _verify(self, token: str) -> Identity:
        header = read_header(token, self._rules.algorithms)
        key = await self._keys.key_for(header.key_id)
        if key is None:
            raise TokenRefused(Refusal.UNKNOWN_KEY)
        if key.algorithm_name != header.algorithm:
            raise TokenRefused(Refusal.ALGORITHM)
        try:
            payload: bytes = self._signatures.decode(token, key, algorithms=[key.algorithm_name])
        except jwt.PyJWTError:
            raise TokenRefused(Refusal.SIGNATURE) from None
        return identity_from_claims(payload, self._rules, self._clock.now())


class _InternalKey:
    """Compares in time that depends neither on where two keys differ nor on the length of the right one.

    Digests under a key of this process are compared: equal in length, and unknown to the caller.
    """

    def __init__(self, key: str) -> None:
        if not key:
            raise ValueError("The internal key must not be empty: everybody would have it.")
        self._salt = os.urandom(32)
        self._digest = self._digest_of(key)

    def is_equal(self, presented: str) -> bool:
        return hmac.compare_digest(self._digest, self._digest_of(presented))

    def _digest_of(self, key: str) -> bytes:
        # surrogatepass: header bytes decoded by whatever rule must not make this raise.
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), key=self._salt).digest()


def _wrong_internal_key(telemetry: Telemetry, socket: bool) -> NotAuthenticated:
    telemetry.info("credentials_refused", reason="internal_key", socket=socket)
    return NotAuthenticated("X-Internal-Auth does not hold the internal key; correct it or leave it out.")
