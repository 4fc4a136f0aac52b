"""Upgrades: who is let in, on what grounds, and what a refusal is answered with."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest
from trio.testing import MockClock

from gateway.adapters.stores.memory import MemoryStore
from gateway.core.errors import (
    Forbidden,
    GatewayError,
    HandshakeRefused,
    InsufficientScope,
    NotAuthenticated,
    NotFound,
    NotYours,
    RateLimited,
)
from gateway.core.identity import INTERNAL_SUBJECT, SCOPE_WRITE, Credentials, Identity
from gateway.core.rate_limit import RateLimiter
from gateway.core.websocket_protocol import Dialect
from gateway.engine.admission import AdmissionRules, Admissions
from gateway.ports import Admission, Authenticator, ResumePoint, UpgradeRequest
from tests.engine.fakes import TrioClock

KEY = "internal-key"
ORIGIN = "https://ide.example"


class SubjectIsToken(Authenticator):
    """A token is its subject; ``write-only`` lacks a scope, ``bad`` does not hold."""

    def __init__(self) -> None:
        self.asked: list[Credentials] = []

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """See ``ports.Authenticator``."""
        assert socket
        self.asked.append(credentials)
        if credentials.internal_key == KEY:
            return Identity(INTERNAL_SUBJECT, sees_all=True)
        if credentials.bearer in (None, "", "bad"):
            raise NotAuthenticated("Send a token.")
        if credentials.bearer == "write-only":
            return Identity("writer", scopes=frozenset({SCOPE_WRITE}))
        return Identity(str(credentials.bearer))


class Door:
    """Admissions with what they need around them."""

    def __init__(self, *, per_minute: int = 0, rules: AdmissionRules | None = None) -> None:
        self.store = MemoryStore(dedupe_window=60)
        self.authenticator = SubjectIsToken()
        proxies = (ipaddress.ip_network("10.0.0.0/8"),)
        self.admissions = Admissions(
            rules=rules or AdmissionRules(allowed_origins=(ORIGIN,), trusted_proxies=proxies),
            authenticator=self.authenticator,
            store=self.store,
            upgrade_rate=RateLimiter(per_minute),
            clock=TrioClock(),
            fresh_bytes=bytes,
        )

    async def knock(
        self,
        target: str = "/api/v1/ws/s",
        *headers: tuple[str, str],
        token: str | None = "alice",
        peer: str = "192.0.2.1",
    ) -> Admission:
        """One upgrade."""
        given: Sequence[tuple[str, str]] = headers
        if token is not None:
            given = (("authorization", f"Bearer {token}"), *headers)
        return await self.admissions.decide(UpgradeRequest(target, tuple(given), peer))


@pytest.mark.parametrize("target", ["/api/v1/ws/s", "/ws/s"])
async def test_a_socket_is_for_one_session_under_either_name(target: str) -> None:
    """Without a subprotocol it speaks v1."""
    admission = await Door().knock(target)
    assert (admission.session_id, admission.dialect) == ("s", Dialect.V1)
    assert admission.subprotocol is None


@pytest.mark.parametrize("target", ["/", "/ws", "/api/v1/sessions/s", "/api/v2/ws/s"])
async def test_there_are_no_sockets_elsewhere(target: str) -> None:
    """Other paths are not found."""
    with pytest.raises(NotFound):
        await Door().knock(target)


async def test_the_multiplexed_endpoint_is_for_v2() -> None:
    """It names no session, and a client that offers no v2 subprotocol is told what it speaks."""
    admission = await Door().knock("/api/v1/ws", ("sec-websocket-protocol", "codelab.v2.json"))
    assert (admission.session_id, admission.dialect) == (None, Dialect.V2_JSON)
    with pytest.raises(HandshakeRefused, match="v2 only"):
        await Door().knock("/api/v1/ws")


@pytest.mark.parametrize(
    "segment",
    [
        "",
        ".",
        "..",
        "a/b",
        "a%2fb",
        "%2e%2e",
        "a%00",
        "a%0d%0aX",
        "@evil.example",
        "a b",
        "ü",
        "x" * 129,
        "a\\b",
    ],
)
async def test_session_ids_that_could_mean_a_path_are_refused(segment: str) -> None:
    """Before anybody is asked who is calling."""
    door = Door()
    with pytest.raises(GatewayError) as caught:
        await door.knock(f"/api/v1/ws/{segment}")
    assert caught.value.http_status in (400, 404)
    assert door.authenticator.asked == []


@pytest.mark.parametrize(
    "query",
    [
        "access_token=abc",
        "epoch=e&last_seq=1&token=abc",
        "TOKEN=abc",
        "x=eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.",
        "%61ccess_token=abc",
    ],
)
async def test_a_token_in_the_url_is_refused_with_403(query: str) -> None:
    """Also beside a good one in its place, and without being looked at."""
    door = Door()
    with pytest.raises(Forbidden) as caught:
        await door.knock(f"/api/v1/ws/s?{query}")
    assert caught.value.http_status == 403
    assert "abc" not in str(caught.value)
    assert door.authenticator.asked == []


async def test_foreign_origins_are_refused_before_the_upgrade() -> None:
    """The listed origin and requests without one get in; a token does not make another origin good."""
    door = Door()
    await door.knock()
    await door.knock("/ws/s", ("origin", ORIGIN))
    for origin in ("https://evil.example", "null", f"{ORIGIN}.evil.example", "http://ide.example", ""):
        with pytest.raises(Forbidden) as caught:
            await door.knock("/ws/s", ("origin", origin))
        assert caught.value.http_status == 403


async def test_browsers_send_the_token_as_a_subprotocol() -> None:
    """It is taken from there, and is no part of the answer."""
    door = Door()
    offered = ("sec-websocket-protocol", "codelab.v2.json, bearer.alice")
    admission = await door.knock("/ws/s", offered, token=None)
    assert admission.identity.subject == "alice"
    assert admission.subprotocol == "codelab.v2.json"


@pytest.mark.parametrize(
    ("offered", "token"),
    [
        ("codelab.v2.json, bearer.a, bearer.b", None),
        ("codelab.v2.json, bearer.a", "alice"),
        ("bearer.a", None),
        ("chat", "alice"),
    ],
)
async def test_ambiguous_subprotocols_are_refused(offered: str, token: str | None) -> None:
    """Two tokens, or none of the protocols spoken here; and a token is never quoted."""
    with pytest.raises(HandshakeRefused) as caught:
        await Door().knock("/ws/s", ("sec-websocket-protocol", offered), token=token)
    assert "bearer.a" not in str(caught.value)


async def test_an_empty_bearer_subprotocol_is_a_token_that_does_not_hold() -> None:
    """It does not fall back to anything else."""
    with pytest.raises(NotAuthenticated):
        await Door().knock("/ws/s", ("sec-websocket-protocol", "codelab.v2.json, bearer."), token=None)


async def test_a_session_is_its_first_subjects() -> None:
    """Others are refused with 403, the internal key is not."""
    door = Door()
    await door.knock(token="alice")
    await door.knock(token="alice")
    with pytest.raises(NotYours) as caught:
        await door.knock(token="bob")
    assert caught.value.http_status == 403
    admission = await door.knock("/ws/s", ("x-internal-auth", KEY), token=None)
    assert admission.identity.sees_all
    assert await door.store.owner("s") == "alice"


async def test_the_internal_key_owns_nothing() -> None:
    """A session that a service opened is nobody's until a subject comes; from then on it is theirs."""
    door = Door()
    await door.knock("/ws/s", ("x-internal-auth", KEY), token=None)
    assert await door.store.owner("s") is None
    assert await door.store.load("s") is not None
    await door.knock(token="alice")
    assert await door.store.owner("s") == "alice"
    with pytest.raises(NotYours):
        await door.knock(token="bob")


async def test_without_jwt_sessions_are_everybodys() -> None:
    """All callers are one."""
    door = Door(rules=AdmissionRules(sessions_are_owned=False))
    await door.knock(token="alice")
    await door.knock(token="bob")


async def test_a_refused_caller_claims_nothing() -> None:
    """Without the scope to read, a session is not made one's own either."""
    door = Door()
    with pytest.raises(InsufficientScope):
        await door.knock(token="write-only")
    with pytest.raises(NotAuthenticated):
        await door.knock(token="bad")
    assert await door.store.owner("s") is None


async def test_upgrades_are_limited_by_address(autojump_clock: MockClock) -> None:
    """The one over the limit is told when to come back, before it is asked who it is; others are not hit."""
    door = Door(per_minute=2)
    for subject in ("alice", "alice"):
        await door.knock(token=subject)
    asked = len(door.authenticator.asked)
    with pytest.raises(RateLimited) as caught:
        await door.knock(token="alice")
    assert caught.value.http_status == 429
    assert caught.value.retry_after == pytest.approx(30)
    assert len(door.authenticator.asked) == asked
    await door.knock(token="bob", peer="192.0.2.2", target="/ws/t")


async def test_upgrades_are_limited_by_subject(autojump_clock: MockClock) -> None:
    """A subject has one limit for all its addresses; the internal key has none of its own."""
    door = Door(per_minute=2)
    for number in range(2):
        await door.knock(peer=f"192.0.2.{number}")
    with pytest.raises(RateLimited):
        await door.knock(peer="192.0.2.9")
    for number in range(9):
        await door.knock("/ws/s", ("x-internal-auth", KEY), token=None, peer=f"198.51.100.{number}")


async def test_the_address_behind_a_trusted_proxy_is_the_callers(autojump_clock: MockClock) -> None:
    """What a stranger claims about itself counts for nothing."""
    door = Door(per_minute=1)

    async def knock(number: int, peer: str) -> str:
        forwarded = ("x-forwarded-for", f"203.0.113.{number}")
        return (await door.knock(f"/ws/{number}", forwarded, token=f"u{number}", peer=peer)).client_address

    assert await knock(1, "10.0.0.1") == "203.0.113.1"
    assert await knock(2, "10.0.0.1") == "203.0.113.2"
    assert await knock(3, "192.0.2.7") == "192.0.2.7"
    with pytest.raises(RateLimited):
        await knock(4, "192.0.2.7")


async def test_resuming_needs_both_fields_once() -> None:
    """And only v2 sockets resume."""
    v2 = ("sec-websocket-protocol", "codelab.v2.json")
    door = Door()
    admission = await door.knock("/ws/s?epoch=e&last_seq=7", v2)
    assert admission.resume == ResumePoint("e", 7)
    assert (await door.knock("/ws/s?epoch=e&last_seq=7")).resume is None
    for query in (
        "epoch=e",
        "last_seq=1",
        "epoch=e&last_seq=-1",
        "epoch=e&last_seq=1&last_seq=2",
        "epoch=&last_seq=1",
    ):
        with pytest.raises(HandshakeRefused):
            await door.knock(f"/ws/s?{query}", v2)


async def test_ids_of_sessions_that_nobody_can_own_are_not_kept_in_memory() -> None:
    """Anonymous clients make a new one for every conversation; the process must not grow with them."""
    door = Door(rules=AdmissionRules(sessions_are_owned=False))
    await door.knock()
    assert await door.store.load("s") is None
    owned = Door()
    await owned.knock()
    assert await owned.store.owner("s") == "alice"
