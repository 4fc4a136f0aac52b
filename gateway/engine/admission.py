"""Admission: everything that is decided about a WebSocket upgrade before it is answered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from urllib.parse import parse_qs

import trio
from attrs import field, frozen

from gateway.core.client_address import Network, client_address
from gateway.core.errors import Forbidden, HandshakeRefused, InsufficientScope, NotFound, NotYours
from gateway.core.identity import ANONYMOUS_SUBJECT, SCOPE_READ, Credentials, Identity
from gateway.core.rate_limit import RateLimiter, address_caller, subject_caller
from gateway.core.request_context import refuse_token_in_query, request_id
from gateway.core.session_id import parse_session_id
from gateway.core.storage import NOBODY
from gateway.core.trace_context import presented_trace
from gateway.core.websocket_protocol import Dialect
from gateway.ports import Admission, Authenticator, Clock, ResumePoint, SessionStore, UpgradeRequest

_PREFIXES = ("/api/v1/ws/", "/ws/")
_MULTIPLEXED = "/api/v1/ws"
_BEARER_SUBPROTOCOL = "bearer."
_MAX_EPOCH = 64


@frozen
class AdmissionRules:
    """What the settings say about who may connect."""

    allowed_origins: Collection[str] = ()
    """Browser origins; a request without ``Origin`` is not a browser's."""
    trusted_proxies: Sequence[Network] = ()
    sessions_are_owned: bool = True
    """False without JWT: all callers are one, and every session is everybody's."""


@frozen
class _Path:
    session_id: str | None
    """None: the multiplexed endpoint."""
    resume: ResumePoint | None


@frozen
class _Subprotocols:
    dialect: Dialect
    bearer: str | None = field(default=None, repr=False)


class Admissions:
    """Decides about upgrades."""

    def __init__(
        self,
        *,
        rules: AdmissionRules,
        authenticator: Authenticator,
        store: SessionStore,
        upgrade_rate: RateLimiter,
        clock: Clock,
        fresh_bytes: Callable[[int], bytes],
    ) -> None:
        self._rules = rules
        self._authenticator = authenticator
        self._store = store
        self._upgrade_rate = upgrade_rate
        self._clock = clock
        self._fresh_bytes = fresh_bytes

    async def decide(
        self, request: UpgradeRequest, *, check_room_of: Callable[[Identity], None] = lambda _: None
    ) -> Admission:
        """Allow the upgrade, or raise the ``GatewayError`` that says why not.

        From cheap to dear, so that a flood costs little: form, origin, rate, identity, ownership. A check
        of the caller's own, ``check_room_of``, comes before the last: who is refused has claimed nothing.
        """
        path = _parse_target(request.target)
        origin = request.header("origin")
        if origin is not None and origin.lower() not in self._rules.allowed_origins:
            raise Forbidden("This origin may not connect; its operator has to add it to ALLOWED_ORIGINS.")
        subprotocols = _parse_subprotocols(request)
        in_header = _bearer(request.header("authorization"))
        if subprotocols.bearer is not None and in_header is not None:
            raise HandshakeRefused("Two tokens were sent, in Authorization and as a subprotocol; send one.")
        address = client_address(request.peer, request.headers, self._rules.trusted_proxies)
        self._upgrade_rate.check(address_caller(address), trio.current_time())
        identity = await self._authenticator.authenticate(
            Credentials(
                bearer=in_header if subprotocols.bearer is None else subprotocols.bearer,
                internal_key=request.header("x-internal-auth"),
            ),
            socket=True,
        )
        if identity.subject != ANONYMOUS_SUBJECT and not identity.sees_all:
            self._upgrade_rate.check(subject_caller(identity.subject), trio.current_time())
        if SCOPE_READ not in identity.scopes:
            raise InsufficientScope(SCOPE_READ)
        check_room_of(identity)
        if path.session_id is not None:
            await self.check_owner(path.session_id, identity)
        elif not subprotocols.dialect.is_v2:
            raise HandshakeRefused("This path speaks v2 only: offer codelab.v2.json or codelab.v2.msgpack.")
        return Admission(
            session_id=path.session_id,
            identity=identity,
            dialect=subprotocols.dialect,
            resume=path.resume if subprotocols.dialect.is_v2 else None,
            client_address=address,
            request_id=request_id(request.header("x-request-id"), self._fresh_bytes(16)),
            trace=presented_trace(request.headers),
        )

    async def check_owner(self, session_id: str, identity: Identity) -> None:
        """Make the caller the session's owner if it has none. Raises ``NotYours``, ``StoreUnavailable``."""
        if not self._rules.sessions_are_owned and not self._store.is_durable:
            # Nobody will ask for it, and memory would hold 0.6 KB for every session there ever was.
            return
        # The internal key owns nothing: services open sessions for users, who are to find them theirs.
        claims = NOBODY if identity.sees_all else identity.subject
        owner = await self._store.claim(session_id, claims, self._clock.now())
        if owner != claims and self._rules.sessions_are_owned and not identity.sees_all:
            raise NotYours("This session belongs to somebody else; use another session id.")


def _parse_target(target: str) -> _Path:
    path, _, query = target.partition("?")
    refuse_token_in_query(query)
    if path == _MULTIPLEXED:
        return _Path(None, None)
    prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None)
    if prefix is None:
        raise NotFound("There is no WebSocket at this path; connect to /api/v1/ws/{session_id}.")
    session_id = parse_session_id(path[len(prefix) :])
    fields = parse_qs(query, keep_blank_values=True)
    epoch, last_seq = fields.get("epoch"), fields.get("last_seq")
    if epoch is None and last_seq is None:
        return _Path(session_id, None)
    if (
        epoch is None
        or last_seq is None
        or len(epoch) != 1
        or len(last_seq) != 1
        or not 0 < len(epoch[0]) <= _MAX_EPOCH
        or not (last_seq[0].isascii() and last_seq[0].isdigit())
        or len(last_seq[0]) > 18
    ):
        raise HandshakeRefused("To resume, give epoch and last_seq, once each; last_seq is a whole number.")
    return _Path(session_id, ResumePoint(epoch[0], int(last_seq[0])))


def _parse_subprotocols(request: UpgradeRequest) -> _Subprotocols:
    """The dialect, and the token of a browser. A token is never part of an error, and never echoed."""
    offered = [
        name.strip()
        for key, value in request.headers
        if key == "sec-websocket-protocol"
        for name in value.split(",")
        if name.strip()
    ]
    if not offered:
        return _Subprotocols(Dialect.V1)
    known = {dialect.value: dialect for dialect in Dialect if dialect.is_v2}
    dialect = next((known[name] for name in offered if name in known), None)
    if dialect is None:
        names = " or ".join(known)
        raise HandshakeRefused(f"None of the subprotocols offered is known; offer {names}, or none for v1.")
    tokens = [name[len(_BEARER_SUBPROTOCOL) :] for name in offered if name.startswith(_BEARER_SUBPROTOCOL)]
    if len(tokens) > 1:
        raise HandshakeRefused("More than one bearer subprotocol was offered; offer one.")
    return _Subprotocols(dialect, tokens[0] if tokens else None)


def _bearer(authorization: str | None) -> str | None:
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
