"""The Quart-Trio application: routes, error answers, and what every answer carries."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import httpx
import trio
from quart import Response, g, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from gateway.adapters.rest.access import Access, RequestHead
from gateway.adapters.rest.call_traces import trace_calls
from gateway.adapters.rest.cors import Cors
from gateway.adapters.rest.dashboard import Dashboard
from gateway.adapters.rest.openapi import DOCS_POLICY, docs_page, openapi_document
from gateway.adapters.rest.pages import PAGE_HEADERS, WebFile, WebPages, load_pages
from gateway.adapters.rest.readiness import Readiness
from gateway.adapters.rest.routes import PROXY_ROUTES, ProxyRoute
from gateway.adapters.rest.service import RestRequest, RestService
from gateway.adapters.rest.upstream import AgentApi
from gateway.core.codec import encode_json
from gateway.core.errors import GatewayError, HandshakeRefused, MessageTooLarge
from gateway.core.http_refusal import refusal_of
from gateway.core.request_context import request_id
from gateway.core.trace_context import new_trace, presented_trace
from gateway.node_ports import Siblings
from gateway.operator_ports import Journal, Overview
from gateway.ports import Authenticator, Clock, SessionStore, Telemetry
from gateway.settings import Settings
from gateway.trace_ports import Tracing

BODY_TIMEOUT = 7
"""Seconds that a request's body may take; a slow sender is to be gone within 10 (Quart's default is 60)."""

RESPONSE_TIMEOUT = 7
"""Seconds that an answer may take to be taken; more for a large one, see below (Quart's default is 60)."""

SLOWEST_READER = 256 * 1024
"""Bytes per second that the reader of a large answer must manage."""

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HEALTH_PATHS = ("/health", "/api/v1/health")
_DASHBOARD = "/dashboard/"


_MALFORMED = "gateway.malformed"
_LINE_END = re.compile(rb"[\r\n\x00]")
_VISIBLE = re.compile(rb"[\x21\x22\x24-\x7e]*")
"""Visible ASCII without the fragment's #, which is no part of a request target (RFC 9112 section 3.2)."""


def _is_harmless(name: bytes, value: bytes) -> bool:
    return name.lower() != b"host" and not _LINE_END.search(value)


class _RawPathQuart(QuartTrio):
    """Finds routes by the path as it was sent: ``%2F`` never becomes a slash and ``%2e%2e`` no parent.

    Quart decodes the query and looks at Host before any of its error handling is in place: a byte that is
    not UTF-8, a host name with an empty or overlong label, or a line end that HTTP/2 let through leaves the
    application as an exception. So Quart sees no Host, which nothing here needs, no field with a line end,
    and no query but one of visible ASCII.
    """

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": [pair for pair in scope["headers"] if _is_harmless(*pair)]}
            if not _VISIBLE.fullmatch(scope["query_string"]):
                scope |= {"query_string": b"", _MALFORMED: True}
        if scope["type"] == "http" and scope.get("raw_path") is not None:
            scope["path"] = scope["raw_path"].decode("latin-1") or "/"
        await super().asgi_app(scope, receive, send)


def create_app(
    settings: Settings,
    *,
    authenticator: Authenticator,
    store: SessionStore,
    telemetry: Telemetry,
    clock: Clock,
    agent: httpx.AsyncClient,
    render_metrics: Callable[[], Awaitable[bytes]],
    check_ready: Callable[[], Awaitable[None]],
    overview: Overview | None = None,
    tracing: Tracing | None = None,
    journal: Journal | None = None,
    siblings: Siblings | None = None,
) -> QuartTrio:
    """The REST application; it starts no task and closes nothing of what it is given.

    ``agent`` is ``agent_client(...)`` or one like it. ``check_ready`` raises ``GatewayError`` (``Draining``,
    ``StoreUnavailable``) while this node should not be sent work. The dashboard is there with an ``overview``
    and a ``journal``; what it says of one session it asks ``siblings`` for, too.
    """
    access = Access(
        authenticator,
        store,
        telemetry,
        clock,
        rate_per_minute=settings.rate_rest_per_minute,
        trusted_proxies=settings.trusted_proxies,
    )
    api = AgentApi(
        agent,
        internal_key=settings.internal_api_key,
        max_concurrent=settings.max_concurrent_requests,
        connect_timeout=settings.agent_connect_timeout,
        timeout=settings.request_timeout,
    )
    service = RestService(access, api, Readiness(check_ready), telemetry)
    app = _RawPathQuart("gateway", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_message_bytes
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT
    app.config["RESPONSE_TIMEOUT"] = RESPONSE_TIMEOUT
    # A path is what it is: no redirect to a "nicer" one.
    app.url_map.merge_slashes = False
    _add_hooks(app, access, Cors(settings.allowed_origins), telemetry)
    if tracing is not None:
        trace_calls(app, tracing, untraced=(*_HEALTH_PATHS, "/metrics"))
    _add_error_answers(app, telemetry)
    pages = load_pages(dashboard=overview is not None and journal is not None, playground=settings.playground)
    _add_own_routes(app, service, settings, render_metrics, openapi_document(settings.version, pages))
    _add_pages(app, pages)
    if overview is not None and journal is not None:
        _add_dashboard(app, Dashboard(access, overview, journal, clock, telemetry, siblings))
    for route in PROXY_ROUTES:
        _add_proxy_route(app, service, route)
    return app


def _add_hooks(app: QuartTrio, access: Access, cors: Cors, telemetry: Telemetry) -> None:
    async def open_request() -> Response | None:
        g.started_at = trio.current_time()
        g.head = RequestHead(
            tuple(
                (name.decode("latin-1").lower(), value.decode("latin-1"))
                for name, value in request.scope["headers"]
            ),
            (request.scope.get("client") or ("",))[0],
        )
        g.request_id = request_id(g.head.header("x-request-id"), os.urandom(16))
        if _MALFORMED in request.scope:
            raise HandshakeRefused("The query holds characters that must be percent-encoded; encode them.")
        origin = g.head.header("origin")
        if request.path not in _HEALTH_PATHS:
            access.check_address(g.head)
        if request.method == "OPTIONS" and g.head.header("access-control-request-method") is not None:
            methods = ("GET", "POST")
            return _answer(204, b"", dict(cors.preflight_headers(origin, methods)))
        if not request.path.startswith(_DASHBOARD):
            # There the key is in a header that only a page which may read the answers can set.
            cors.check(request.method, origin)
        return None

    async def close_request(response: Response) -> Response:
        response.headers.update(cors.response_headers(g.head.header("origin")))
        response.headers["X-Request-ID"] = g.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-store")
        size = response.content_length or 0
        is_stream = response.mimetype == "text/event-stream"
        response.timeout = None if is_stream else RESPONSE_TIMEOUT + size / SLOWEST_READER
        route = request.url_rule.rule if request.url_rule is not None else "none"
        method = request.method if request.method in _METHODS else "other"
        seconds = trio.current_time() - g.started_at
        telemetry.count(
            "gateway_rest_requests_total", method=method, route=route, status=str(response.status_code)
        )
        telemetry.observe("gateway_rest_seconds", seconds, route=route)
        # Probes come every few seconds, all day long.
        log = telemetry.debug if route in _HEALTH_PATHS else telemetry.info
        log(
            "rest_request",
            request_id=g.request_id,
            method=method,
            route=route,
            status=response.status_code,
            seconds=round(seconds, 4),
            **g.get("trace_log_fields", {}),
        )
        return response

    app.before_request(open_request)
    app.after_request(close_request)


def _add_error_answers(app: QuartTrio, telemetry: Telemetry) -> None:
    async def refuse(error: GatewayError) -> Response:
        refusal = refusal_of(error)
        telemetry.count("gateway_errors_total", code=error.code)
        if refusal.status >= 500:
            reason = type(error.__cause__).__name__ if error.__cause__ is not None else ""
            telemetry.warning("rest_request_refused", request_id=g.request_id, code=error.code, reason=reason)
        if refusal.status in (401, 403):
            telemetry.count("gateway_auth_refusals_total", code=error.code)
        return _answer(refusal.status, refusal.body, dict(refusal.headers))

    async def refuse_http(error: HTTPException) -> Response:
        if isinstance(error, RequestEntityTooLarge):
            return await refuse(
                MessageTooLarge(
                    f"The body is larger than {app.config['MAX_CONTENT_LENGTH']} bytes; send less."
                )
            )
        status = error.code or 500
        code = error.name.upper().replace(" ", "_")
        telemetry.count("gateway_errors_total", code=code)
        headers = {name: value for name, value in error.get_headers() if name.lower() == "allow"}
        return _error(status, code, f"{error.name}: see /openapi.json.", headers, retryable=status == 408)

    async def report(error: Exception) -> Response:
        telemetry.error("rest_request_failed", cause=error, request_id=g.get("request_id", ""))
        telemetry.count("gateway_errors_total", code="INTERNAL_ERROR")
        message = "The gateway failed; it is logged under this X-Request-ID. Try again later."
        return _error(500, "INTERNAL_ERROR", message, {}, retryable=True)

    app.register_error_handler(GatewayError, refuse)
    app.register_error_handler(HTTPException, refuse_http)
    app.register_error_handler(Exception, report)


def _add_own_routes(
    app: QuartTrio,
    service: RestService,
    settings: Settings,
    render_metrics: Callable[[], Awaitable[bytes]],
    contract: Mapping[str, Any],
) -> None:
    document = encode_json(contract)
    page = docs_page(contract).encode()

    async def health() -> Response:
        ready = request.args.get("ready", "0") not in ("", "0", "false")
        status, headers, body = await service.health(settings.version, ready=ready)
        return _answer(status, body, dict(headers))

    async def metrics() -> Response:
        if not settings.metrics_public:
            await service.allow_metrics(g.head)
        return _answer(200, await render_metrics(), {"Content-Type": _METRICS_TYPE})

    async def openapi() -> Response:
        return _answer(200, document, {"Cache-Control": "no-cache"})

    async def docs() -> Response:
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": DOCS_POLICY,
            "Cache-Control": "no-cache",
        }
        return _answer(200, page, headers)

    for path, view in (
        ("/health", health),
        ("/api/v1/health", health),
        ("/metrics", metrics),
        ("/openapi.json", openapi),
        ("/docs", docs),
    ):
        app.add_url_rule(path, path, view, methods=["GET"], provide_automatic_options=False)


def _add_pages(app: QuartTrio, pages: WebPages) -> None:
    def add(path: str, file: WebFile) -> None:
        async def serve() -> Response:
            return _answer(200, file.content, {"Content-Type": file.media_type, **PAGE_HEADERS})

        app.add_url_rule(path, path, serve, methods=["GET"], provide_automatic_options=False)

    if pages.dashboard is not None:
        add("/dashboard", pages.dashboard)
    if pages.playground is not None:
        add("/playground", pages.playground)
    for name, part in pages.parts.items():
        add(f"/web/{name}", part)


def _add_dashboard(app: QuartTrio, dashboard: Dashboard) -> None:
    async def events() -> Response:
        stream = await dashboard.events(g.head, request.args.get("filter", ""))
        return Response(stream, headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})

    async def session(session_id: str) -> Response:
        return _answer(200, await dashboard.session(g.head, session_id), {})

    async def close_session(session_id: str) -> Response:
        return _answer(200, await dashboard.close_session(g.head, session_id), {})

    for path, view, method in (
        ("/dashboard/events", events, "GET"),
        ("/dashboard/sessions/<session_id>", session, "GET"),
        ("/dashboard/sessions/<session_id>/close", close_session, "POST"),
    ):
        app.add_url_rule(path, path, view, methods=[method], provide_automatic_options=False)


def _add_proxy_route(app: QuartTrio, service: RestService, route: ProxyRoute) -> None:
    async def serve(session_id: str | None = None) -> Response:
        head: RequestHead = g.head
        answer = await service.proxy(
            route,
            RestRequest(
                head=head,
                query=request.query_string,
                request_id=g.request_id,
                trace=g.get("trace") or presented_trace(head.headers) or new_trace(os.urandom(24)),
                read_body=partial(request.get_data, as_text=False),
            ),
            session_id,
        )
        return _answer(answer.status, answer.body, dict(answer.headers))

    app.add_url_rule(
        route.public_path.replace("{session_id}", "<session_id>"),
        f"{route.method} {route.path}",
        serve,
        methods=[route.method],
        provide_automatic_options=False,
    )


def _answer(status: int, body: bytes, headers: dict[str, str]) -> Response:
    lower = {name.lower() for name in headers}
    response = Response(body, status=status, headers=headers)
    if "content-type" not in lower:
        response.headers["Content-Type"] = "application/json"
    return response


def _error(status: int, code: str, message: str, headers: dict[str, str], *, retryable: bool) -> Response:
    body = {"error": {"code": code, "message": message, "retryable": retryable}, "detail": message}
    return _answer(status, encode_json(body), headers)
