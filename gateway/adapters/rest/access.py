"""Who may do what: credentials, scopes, rate limits and ownership of one REST request."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from attrs import frozen

from gateway.core.client_address import Network, client_address
from gateway.core.errors import InsufficientScope, NotYours, RateLimited
from gateway.core.identity import SCOPE_ADMIN, Credentials, Identity
from gateway.core.rate_limit import RateLimiter, address_caller, subject_caller
from gateway.ports import Authenticator, Clock, SessionStore, Telemetry


@frozen
class RequestHead:
    """What of a request decides about access."""

    headers: Sequence[tuple[str, str]]
    """Names in lower case, in the order received."""
    peer: str

    def header(self, name: str) -> str | None:
        """The first value of the field ``name`` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


class Access:
    """Decides; every refusal is a ``GatewayError``."""

    def __init__(
        self,
        authenticator: Authenticator,
        store: SessionStore,
        telemetry: Telemetry,
        clock: Clock,
        *,
        rate_per_minute: int,
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._authenticator = authenticator
        self._store = store
        self._telemetry = telemetry
        self._clock = clock
        self._limiter = RateLimiter(rate_per_minute)
        self._trusted_proxies = trusted_proxies

    def check_address(self, head: RequestHead) -> None:
        """Count the call against its address, before anything costs. Raises ``RateLimited``."""
        self._check_rate(address_caller(client_address(head.peer, head.headers, self._trusted_proxies)))

    async def identify(self, head: RequestHead, scope: str) -> Identity:
        """The caller, who holds ``scope``.

        Raises ``NotAuthenticated``, ``InvalidToken``, ``InsufficientScope``, ``RateLimited``.
        """
        scheme, _, token = (head.header("authorization") or "").partition(" ")
        credentials = Credentials(
            bearer=token.strip() if scheme.lower() == "bearer" else None,
            internal_key=head.header("x-internal-auth"),
        )
        identity = await self._authenticator.authenticate(credentials, socket=False)
        if not identity.sees_all:
            self._check_rate(subject_caller(identity.subject))
            if scope not in identity.scopes:
                raise InsufficientScope(scope)
        return identity

    def require_admin(self, identity: Identity) -> None:
        """Raises ``InsufficientScope`` unless the caller holds the internal key or ``api:admin``."""
        if not identity.sees_all and SCOPE_ADMIN not in identity.scopes:
            raise InsufficientScope(SCOPE_ADMIN)

    async def check_owner(self, identity: Identity, session_id: str) -> bool:
        """Whether the session belongs to anybody yet. Raises ``NotYours``, ``StoreUnavailable``."""
        if identity.sees_all:
            return True
        owner = await self._store.owner(session_id)
        if owner is not None and owner != identity.subject:
            raise _not_yours()
        return owner is not None

    async def claim(self, identity: Identity, session_id: str) -> None:
        """Make the caller the session's owner. Raises ``NotYours`` when somebody was faster.

        The internal key owns nothing: services create sessions for users, who are to find them theirs.
        """
        if identity.sees_all:
            return
        owner = await self._store.claim(session_id, identity.subject, self._clock.now())
        if owner != identity.subject:
            raise _not_yours()

    async def sessions_of(self, identity: Identity) -> frozenset[str]:
        """The caller's own sessions. Raises ``StoreUnavailable``."""
        return await self._store.sessions_of(identity.subject)

    def _check_rate(self, caller: str) -> None:
        try:
            self._limiter.check(caller, trio.current_time())
        except RateLimited:
            self._telemetry.count("gateway_rate_limited_total", what="rest")
            raise


def _not_yours() -> NotYours:
    return NotYours("This session belongs to another subject; use one of your own.")
