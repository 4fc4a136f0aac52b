"""The two authenticators, put together for tests with all that they depend on."""

from __future__ import annotations

import jwt
import pytest
from attrs import define, field

from gateway.adapters.auth import InternalKeyAuthenticator, KeySource, TokenAuthenticator
from gateway.core.errors import InvalidToken
from gateway.core.identity import Credentials, Identity
from gateway.core.jwt_rules import ALGORITHMS, TokenRules
from gateway.ports import Authenticator
from tests.jwt_material import (
    AUDIENCE,
    ISSUER,
    RecordingTelemetry,
    SettableClock,
    SigningKey,
    rsa_key,
)

INTERNAL_KEY = "correct-horse-battery-staple"
ALL = frozenset(ALGORITHMS)


@define
class PublishedKeys(KeySource):
    """A key source that holds some keys and remembers what it was asked for."""

    keys: tuple[SigningKey, ...]
    asked: list[str] = field(factory=list)

    async def key_for(self, key_id: str) -> jwt.PyJWK | None:
        """The key, if it is one of them."""
        self.asked.append(key_id)
        return next((key.verifier for key in self.keys if key.key_id == key_id), None)


@define
class Door:
    """A token authenticator with all that it depends on."""

    authenticator: Authenticator
    keys: PublishedKeys
    clock: SettableClock
    telemetry: RecordingTelemetry

    async def enter(self, bearer: str, *, socket: bool = False) -> Identity:
        """Come with a token."""
        return await self.authenticator.authenticate(Credentials(bearer=bearer), socket=socket)

    async def refusal(self, bearer: str) -> str:
        """Come with a token that must not open; returns why not, as logged."""
        with pytest.raises(InvalidToken):
            await self.enter(bearer)
        _, event, fields = self.telemetry.logged[-1]
        assert event == "credentials_refused"
        return str(fields["reason"])


def door(*keys: SigningKey, algorithms: frozenset[str] = frozenset({"RS256"}), leeway: float = 0.0) -> Door:
    """A door that opens to tokens signed with one of these keys."""
    published = PublishedKeys(keys or (rsa_key(),))
    clock, telemetry = SettableClock(), RecordingTelemetry()
    rules = TokenRules(issuer=ISSUER, audience=AUDIENCE, algorithms=algorithms, leeway=leeway)
    return Door(
        TokenAuthenticator(INTERNAL_KEY, published, rules, clock, telemetry), published, clock, telemetry
    )


def key_door(*, anonymous_sockets: bool = False) -> Authenticator:
    """The authenticator of ``USE_JWT_AUTH=false``."""
    return InternalKeyAuthenticator(INTERNAL_KEY, RecordingTelemetry(), anonymous_sockets=anonymous_sockets)
