"""Who gets in with the internal key, without anything, and with a key and a token together."""

from __future__ import annotations

import hmac

import pytest

from gateway.adapters.auth import InternalKeyAuthenticator
from gateway.core.errors import InvalidToken, NotAuthenticated
from gateway.core.identity import Credentials
from tests.adapters.token_door import INTERNAL_KEY, door, key_door
from tests.jwt_material import (
    NOW,
    RecordingTelemetry,
    claims,
    rsa_key,
    token,
)

WRONG_KEYS = [
    "",
    "x",
    INTERNAL_KEY[:-1],
    INTERNAL_KEY + "x",
    INTERNAL_KEY.upper(),
    "é",
    "\udce9",
    "k" * 100_000,
]


# ------------------------------------------------------------------ the internal key, anonymous sockets


@pytest.mark.parametrize("socket", [False, True])
async def test_the_internal_key_opens_and_sees_all(socket: bool) -> None:
    """In both modes, on REST and on sockets."""
    for authenticator in (key_door(), key_door(anonymous_sockets=True), door().authenticator):
        identity = await authenticator.authenticate(Credentials(internal_key=INTERNAL_KEY), socket=socket)
        assert (identity.subject, identity.sees_all, identity.expires_at) == ("internal", True, None)


@pytest.mark.parametrize("socket", [False, True])
@pytest.mark.parametrize("presented", WRONG_KEYS, ids=lambda key: ascii(key)[:20])
async def test_a_wrong_internal_key_opens_nothing(presented: str, socket: bool) -> None:
    """Of any length and any characters; not even where nothing at all would have opened."""
    for authenticator in (key_door(), key_door(anonymous_sockets=True), door().authenticator):
        with pytest.raises(NotAuthenticated) as refused:
            await authenticator.authenticate(Credentials(internal_key=presented), socket=socket)
        assert not isinstance(refused.value, InvalidToken)


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``hmac.compare_digest``, on values of equal length that the caller cannot know."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return first == second

    authenticator = key_door()
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for presented in (INTERNAL_KEY, "short"):
        if presented == INTERNAL_KEY:
            await authenticator.authenticate(Credentials(internal_key=presented), socket=False)
        else:
            with pytest.raises(NotAuthenticated):
                await authenticator.authenticate(Credentials(internal_key=presented), socket=False)
    assert [(len(first), len(second)) for first, second in compared] == [(64, 64), (64, 64)]
    assert INTERNAL_KEY.encode() not in compared[0]


async def test_sockets_are_anonymous_only_where_that_is_allowed() -> None:
    """And an anonymous caller neither expires nor sees all."""
    identity = await key_door(anonymous_sockets=True).authenticate(Credentials(), socket=True)
    assert (identity.subject, identity.sees_all, identity.expires_at) == ("anonymous", False, None)
    with pytest.raises(NotAuthenticated):
        await key_door(anonymous_sockets=False).authenticate(Credentials(), socket=True)


async def test_rest_is_never_anonymous() -> None:
    """Also where sockets may be."""
    with pytest.raises(NotAuthenticated):
        await key_door(anonymous_sockets=True).authenticate(Credentials(), socket=False)


async def test_without_jwt_mode_a_token_proves_nothing() -> None:
    """It is not looked at: neither a proof nor a reason to refuse."""
    credentials = Credentials(bearer=token(rsa_key()))
    with pytest.raises(NotAuthenticated):
        await key_door().authenticate(credentials, socket=False)
    identity = await key_door(anonymous_sockets=True).authenticate(credentials, socket=True)
    assert identity.subject == "anonymous"


@pytest.mark.parametrize("socket", [False, True])
async def test_in_jwt_mode_nobody_is_anonymous(socket: bool) -> None:
    """No credentials, no entry: and that is not called an invalid token (RFC 6750 section 3.1)."""
    with pytest.raises(NotAuthenticated) as refused:
        await door().authenticator.authenticate(Credentials(), socket=socket)
    assert not isinstance(refused.value, InvalidToken)


def test_an_empty_internal_key_cannot_be_configured() -> None:
    """Everybody would have it."""
    with pytest.raises(ValueError, match="empty"):
        InternalKeyAuthenticator("", RecordingTelemetry(), anonymous_sockets=False)


# ------------------------------------------------------------------ key and token together


async def test_with_key_and_token_the_token_says_who_is_calling() -> None:
    """A proxy that adds its key does not make its users see all."""
    credentials = Credentials(bearer=token(rsa_key()), internal_key=INTERNAL_KEY)
    identity = await door().authenticator.authenticate(credentials, socket=False)
    assert (identity.subject, identity.sees_all) == ("user-1", False)


async def test_a_wrong_key_beside_a_good_token_is_refused() -> None:
    """No falling back; the token is not even looked at."""
    it = door()
    with pytest.raises(NotAuthenticated):
        await it.authenticator.authenticate(
            Credentials(bearer=token(rsa_key()), internal_key="wrong"), socket=False
        )
    assert it.keys.asked == []


async def test_a_bad_token_beside_the_right_key_is_refused() -> None:
    """No falling back in this direction either."""
    credentials = Credentials(bearer=token(rsa_key(), claims(exp=NOW - 1)), internal_key=INTERNAL_KEY)
    with pytest.raises(InvalidToken):
        await door().authenticator.authenticate(credentials, socket=False)
