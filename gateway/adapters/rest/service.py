"""What each REST route does, once Quart has found it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from attrs import evolve, field, frozen

from gateway.adapters.rest.access import Access, RequestHead
from gateway.adapters.rest.readiness import Readiness
from gateway.adapters.rest.routes import ProxyRoute, Visibility
from gateway.adapters.rest.upstream import FORWARDED_REQUEST_HEADERS, AgentAnswer, AgentApi, is_json
from gateway.core.codec import decode_json, encode_json
from gateway.core.errors import AgentProtocolError, InvalidMessage
from gateway.core.http_refusal import refusal_of
from gateway.core.identity import SCOPE_ADMIN, SCOPE_READ, Identity
from gateway.core.request_context import refuse_token_in_query, user_id_header
from gateway.core.session_id import is_session_id, parse_session_id
from gateway.core.session_visibility import SESSION_FIELDS, only_sessions, session_of
from gateway.core.trace_context import TraceContext
from gateway.ports import Telemetry


class NotJson(InvalidMessage):
    """A request body that is sent as something else than JSON."""

    http_status = 415


@frozen
class RestRequest:
    """One request to a route that is passed on."""

    head: RequestHead
    query: bytes
    """Visible ASCII."""
    request_id: str
    trace: TraceContext
    read_body: Callable[[], Awaitable[bytes]] = field(repr=False)


class RestService:
    """Serves the routes. Raises ``GatewayError`` for everything that is refused."""

    def __init__(self, access: Access, agent: AgentApi, readiness: Readiness, telemetry: Telemetry) -> None:
        self._access = access
        self._agent = agent
        self._readiness = readiness
        self._telemetry = telemetry

    async def proxy(self, route: ProxyRoute, request: RestRequest, segment: str | None) -> AgentAnswer:
        """Pass a request on and give the answer, or the part of it that the caller may see.

        ``segment`` is the session's path segment, still percent-encoded.
        """
        session_id = None if segment is None else parse_session_id(segment)
        identity = await self._access.identify(request.head, route.scope)
        refuse_token_in_query(request.query.decode("ascii"))
        has_owner = session_id is None or await self._access.check_owner(identity, session_id)
        body, wanted = b"", None
        if route.visibility is Visibility.CREATES:
            body = await request.read_body()
            wanted = _wanted_session(request.head, body)
            if wanted is not None:
                await self._access.check_owner(identity, wanted)
        path = route.path if session_id is None else route.path.replace("{session_id}", session_id)
        headers = _upstream_headers(request, identity, has_body=bool(body))
        answer = await self._agent.call(route.method, path, request.query, headers, body)
        if answer.status >= 300 or identity.sees_all:
            return answer
        if route.visibility is Visibility.CREATES:
            await self._claim_created(identity, answer, wanted)
        elif session_id is not None and not has_owner:
            # It exists and was nobody's: like attaching a socket, reading it first makes it the caller's.
            await self._access.claim(identity, session_id)
        elif route.visibility is Visibility.OWN_SESSIONS:
            return _shown(answer, await self._access.sessions_of(identity), SESSION_FIELDS)
        elif route.visibility is Visibility.OWN_ENTRIES and SCOPE_ADMIN not in identity.scopes:
            return _shown(answer, await self._access.sessions_of(identity), ("session_id",))
        return answer

    async def allow_metrics(self, head: RequestHead) -> None:
        """Raises ``GatewayError`` unless the caller may read metrics: internal key or ``api:admin``."""
        self._access.require_admin(await self._access.identify(head, SCOPE_READ))

    async def health(self, version: str, *, ready: bool) -> tuple[int, Mapping[str, str], bytes]:
        """Status, header fields and body of a health answer; with ``ready``, of a readiness answer."""
        status: dict[str, object] = {"status": "healthy", "service": "gateway", "version": version}
        problem = await self._readiness.problem() if ready else None
        if problem is None:
            return 200, {}, encode_json(status)
        refusal = refusal_of(problem)
        body = {**status, "status": problem.code.lower()}
        body["error"] = {"code": problem.code, "message": problem.message, "retryable": problem.retryable}
        body["detail"] = problem.message
        return 503, dict(refusal.headers), encode_json(body)

    async def _claim_created(self, identity: Identity, answer: AgentAnswer, wanted: str | None) -> None:
        created = session_of(_decoded(answer)) if answer.body else None
        session_id = created if is_session_id(created) else wanted
        if session_id is None:
            self._telemetry.warning("rest_created_session_unnamed", status=answer.status)
            return
        await self._access.claim(identity, session_id)


def _wanted_session(head: RequestHead, body: bytes) -> str | None:
    """The session that a POST names, if any, after checking that the body is JSON at all."""
    if not body:
        return None
    if not is_json(head.header("content-type") or "application/json"):
        raise NotJson("The body must be JSON: send it with Content-Type: application/json.")
    value = decode_json(body)
    session_id = value.get("session_id") if isinstance(value, dict) else None
    if session_id is None:
        return None
    if not is_session_id(session_id):
        raise InvalidMessage(
            "session_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : - and neither . nor .. ; correct it."
        )
    return str(session_id)


def _upstream_headers(request: RestRequest, identity: Identity, *, has_body: bool) -> dict[str, str]:
    head = request.head
    headers = {name: value for name in FORWARDED_REQUEST_HEADERS if (value := head.header(name)) is not None}
    if has_body:
        headers["content-type"] = head.header("content-type") or "application/json"
    headers["x-request-id"] = request.request_id
    headers["x-user-id"] = user_id_header(identity.subject)
    headers["traceparent"] = request.trace.traceparent
    if request.trace.tracestate:
        headers["tracestate"] = request.trace.tracestate
    return headers


def _shown(answer: AgentAnswer, own: frozenset[str], fields: tuple[str, ...]) -> AgentAnswer:
    whole = _decoded(answer)
    shown = only_sessions(whole, own, fields)
    if shown is whole:
        return answer
    assert isinstance(shown, dict | list)
    # Validators and links are about the whole answer.
    headers = {
        name: value for name, value in answer.headers.items() if name not in ("etag", "last-modified", "link")
    }
    return evolve(answer, headers=headers, body=encode_json(shown))


def _decoded(answer: AgentAnswer) -> object:
    try:
        return decode_json(answer.body)
    except InvalidMessage:
        raise AgentProtocolError("The Agent Runtime's answer is not valid JSON; tell its operator.") from None
