"""What every answer of the REST application has in common, and the routes of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quart import Response
from trio.testing import MockClock

from gateway.adapters.rest.readiness import MAX_AGE
from gateway.core.errors import Draining, StoreUnavailable
from tests.adapters.rest.harness import ADMIN, INTERNAL, Rest, bearer

ORIGIN = "https://ide.example"

_FIELDS = [
    "host",
    "origin",
    "cookie",
    "authorization",
    "x-internal-auth",
    "content-type",
    "content-length",
    "x-request-id",
    "traceparent",
    "tracestate",
    "x-forwarded-for",
    "forwarded",
    "range",
    "if-none-match",
    "user-agent",
    "remote-addr",
]


async def _json(response: Response) -> Any:
    assert response.headers["Content-Type"] == "application/json"
    return json.loads(await response.get_data())


# --------------------------------------------------------------------------- public routes


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_is_public(path: str) -> None:
    """Anybody may ask whether the process is alive."""
    response = await Rest(settings={"version": "9.9"}).get(path, {})

    assert response.status_code == 200
    assert await _json(response) == {"status": "healthy", "service": "gateway", "version": "9.9"}


@pytest.mark.parametrize("problem", [Draining("Going away."), StoreUnavailable("No disk.")])
async def test_readiness_says_why_not(problem: Draining | StoreUnavailable) -> None:
    """While draining or without a store, ready=1 answers 503; without ready=1 the process is alive."""

    async def check() -> None:
        raise problem

    rest = Rest(check_ready=check)

    response = await rest.get("/health?ready=1", {})
    assert response.status_code == 503
    body = await _json(response)
    assert body["error"]["code"] == problem.code
    assert body["service"] == "gateway"
    assert body["status"] != "healthy"
    assert (await rest.get("/health", {})).status_code == 200


async def test_readiness_is_found_out_at_most_once_a_second(autojump_clock: MockClock) -> None:
    """Anybody may ask, so asking often costs the store nothing; a change is seen after a second."""
    checks = 0

    async def check() -> None:
        nonlocal checks
        checks += 1
        if checks > 1:
            raise Draining("Going away.")

    rest = Rest(check_ready=check)
    for _ in range(50):
        assert (await rest.get("/health?ready=1", {})).status_code == 200
    assert checks == 1

    autojump_clock.jump(MAX_AGE)
    assert (await rest.get("/health?ready=1", {})).status_code == 503


async def test_metrics_need_the_key_or_admin() -> None:
    """/metrics is for the internal key and for api:admin."""
    rest = Rest()

    assert (await rest.get("/metrics", {})).status_code == 401
    assert (await rest.get("/metrics", bearer("alice"))).status_code == 403
    assert (await rest.get("/metrics", ADMIN)).status_code == 200
    response = await rest.get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert await response.get_data() == b"# metrics\n"


async def test_metrics_can_be_public() -> None:
    """METRICS_PUBLIC=true opens them."""
    assert (await Rest(settings={"metrics_public": True}).get("/metrics", {})).status_code == 200


async def test_docs_are_one_page_without_script_or_foreign_host() -> None:
    """The page lists the routes, holds no script, and its policy allows none."""
    response = await Rest().get("/docs", {})
    page = str(await response.get_data(as_text=True))

    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "/api/v1/sessions/{session_id}/history" in page
    assert "<script" not in page
    assert "http" not in page
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/api/v1/sessions/", 404, "NOT_FOUND"),
        ("GET", "/api/v1//sessions", 404, "NOT_FOUND"),
        ("GET", "/api/v1/sessions//history", 404, "NOT_FOUND"),
        ("DELETE", "/api/v1/sessions", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/health", 405, "METHOD_NOT_ALLOWED"),
        ("OPTIONS", "/health", 405, "METHOD_NOT_ALLOWED"),
        ("BREW", "/docs", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_errors_of_routing_look_like_all_others(method: str, path: str, status: int, code: str) -> None:
    """404 and 405 have the JSON body of all errors; no path is redirected to another."""
    response = await Rest().call(method, path)

    body = await _json(response)
    assert (response.status_code, body["error"]["code"]) == (status, code)
    assert body["detail"] == body["error"]["message"]
    assert body["error"]["retryable"] is False
    assert ("Allow" in response.headers) is (status == 405)


async def test_a_bug_is_reported_once_and_not_shown() -> None:
    """An unexpected exception is a plain 500 for the caller and one line with its cause for the operator."""
    bug = RuntimeError("secret detail")

    async def check() -> None:
        raise bug

    rest = Rest(check_ready=check)
    response = await rest.get("/health?ready=1", {"X-Request-ID": "r-1"})

    body = await _json(response)
    assert (response.status_code, body["error"]["code"]) == (500, "INTERNAL_ERROR")
    assert "secret detail" not in str(body)
    errors = [line for line in rest.telemetry.lines if line[0] == "error"]
    assert errors == [("error", "rest_request_failed", {"cause": bug, "request_id": "r-1"})]


async def test_refusals_follow_rfc_6750() -> None:
    """401 and 403 have the bodies of section 7 and say in WWW-Authenticate what is missing."""
    rest = Rest()

    nothing = await rest.get("/api/v1/sessions", {})
    assert nothing.status_code == 401
    assert nothing.headers["WWW-Authenticate"] == 'Bearer realm="gateway"'
    assert await _json(nothing) == {"error": "unauthorized", "error_description": "Send a token."}

    wrong = await rest.get("/api/v1/sessions", {"Authorization": "Bearer bad"})
    assert wrong.status_code == 401
    assert 'error="invalid_token"' in wrong.headers["WWW-Authenticate"]
    assert (await _json(wrong))["error"] == "invalid_token"

    weak = await rest.post("/api/v1/sessions", {}, bearer("alice", "api:read"))
    assert weak.status_code == 403
    assert 'error="insufficient_scope"' in weak.headers["WWW-Authenticate"]
    assert 'scope="api:write"' in weak.headers["WWW-Authenticate"]
    assert (await _json(weak))["error"] == "insufficient_scope"
    assert (await rest.get("/api/v1/agents", bearer("alice", "api:write"))).status_code == 403
    assert rest.seen == []
    assert rest.telemetry.counts["gateway_auth_refusals_total", "INSUFFICIENT_SCOPE"] == 2


# --------------------------------------------------------------------------- every answer


@pytest.mark.parametrize("path", ["/health", "/nothing", "/docs", "/api/v1/agents", "/openapi.json"])
async def test_every_answer_is_marked(path: str) -> None:
    """Answers carry the request id and forbid guessing their type; nothing is cached unasked."""
    response = await Rest().get(path, {**INTERNAL, "X-Request-ID": "my.id-1"})

    assert response.headers["X-Request-ID"] == "my.id-1"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] in ("no-store", "no-cache")
    assert "Server" not in response.headers
    assert "Set-Cookie" not in response.headers


async def test_an_unsafe_request_id_is_replaced() -> None:
    """What could split a line or a header is not taken over."""
    response = await Rest().get("/health", {"X-Request-ID": "a b; c"})

    assert len(response.headers["X-Request-ID"]) == 32


async def test_requests_are_logged_and_counted_by_route() -> None:
    """One line per request with route, status and request id; metrics by route, never by session."""
    rest = Rest()
    await rest.get("/api/v1/sessions/abc/history", {**INTERNAL, "X-Request-ID": "r"})
    await rest.call("INVENTED", "/x")

    level, event, fields = rest.telemetry.lines[0]
    assert (level, event) == ("info", "rest_request")
    route = "/api/v1/sessions/<session_id>/history"
    assert (fields["route"], fields["status"], fields["request_id"]) == (route, 200, "r")
    assert rest.telemetry.counts["gateway_rest_requests_total", "GET", route, "200"] == 1
    assert rest.telemetry.counts["gateway_rest_requests_total", "other", "none", "404"] == 1


async def test_no_secret_is_logged() -> None:
    """Credentials of callers and ours are in no log line."""
    rest = Rest()
    await rest.get("/api/v1/sessions?q=planted-query", {"X-Internal-Auth": "planted-key"})
    await rest.get("/api/v1/sessions", {"Authorization": "Bearer planted", "Cookie": "planted"})
    await rest.post("/api/v1/sessions", {"title": "planted"})

    assert "planted" not in str(rest.telemetry.lines)
    assert "agent-key" not in str(rest.telemetry.lines)


# --------------------------------------------------------------------------- browsers


async def test_a_listed_origin_may_call() -> None:
    """A preflight needs no credentials; the answers name the origin, never *, and allow no cookies."""
    rest = Rest(settings={"allowed_origins": (ORIGIN,)})
    preflight = await rest.call(
        "OPTIONS", "/api/v1/sessions", {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    )
    answer = await rest.post("/api/v1/sessions", {}, {**INTERNAL, "Origin": ORIGIN})

    assert preflight.status_code == 204
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert answer.status_code == 200
    for response in (preflight, answer):
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert response.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://ide.example.evil", "http://ide.example"]
)
async def test_a_foreign_origin_may_not(origin: str) -> None:
    """Its preflight and its POST are refused, its GET gets no header that would let a page read it."""
    rest = Rest(settings={"allowed_origins": (ORIGIN,)})
    headers = {**INTERNAL, "Origin": origin}

    preflight = await rest.call("OPTIONS", "/docs", {**headers, "Access-Control-Request-Method": "GET"})
    post = await rest.post("/api/v1/sessions", {}, headers)
    assert rest.seen == []
    get = await rest.get("/api/v1/agents", headers)

    assert (preflight.status_code, post.status_code, get.status_code) == (403, 403, 200)
    for response in (preflight, post, get):
        assert not any(name.lower().startswith("access-control") for name in response.headers.keys())  # noqa: SIM118
        assert response.headers["Vary"] == "Origin"


async def test_without_origin_it_is_no_browser() -> None:
    """A POST without Origin is a program's and needs no listing."""
    assert (await Rest().post("/api/v1/sessions", {})).status_code == 200


# --------------------------------------------------------------------------- rate limits


async def test_an_address_over_its_limit_is_told_when_to_come_back(autojump_clock: MockClock) -> None:
    """The bucket is per address, counts wrong credentials too, and refills; others are not concerned."""
    rest = Rest(settings={"rate_rest_per_minute": 3})
    for _ in range(3):
        assert (await rest.get("/api/v1/agents", {})).status_code == 401

    refused = await rest.get("/api/v1/agents")
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "20"
    assert (await _json(refused))["error"]["code"] == "RATE_LIMITED"
    assert (await rest.get("/api/v1/agents", peer="192.0.2.2")).status_code == 200
    assert (await rest.get("/health", {})).status_code == 200
    assert rest.telemetry.counts["gateway_rate_limited_total", "rest"] == 1

    autojump_clock.jump(20)
    assert (await rest.get("/api/v1/agents")).status_code == 200


async def test_a_subject_has_one_limit_on_all_its_addresses() -> None:
    """Moving to another address does not refill a subject's bucket."""
    rest = Rest(settings={"rate_rest_per_minute": 2})
    statuses = [
        (await rest.get("/api/v1/agents", bearer("alice"), peer=f"192.0.2.{n}")).status_code for n in range(3)
    ]

    assert statuses == [200, 200, 429]
    assert (await rest.get("/api/v1/agents", bearer("bob"), peer="192.0.2.9")).status_code == 200


async def test_behind_a_trusted_proxy_the_client_counts() -> None:
    """Two clients behind one trusted proxy have a bucket each; without trust they share the proxy's."""
    for trusted, expected in (("10.0.0.0/8", 200), ("", 429)):
        rest = Rest(settings={"rate_rest_per_minute": 1, "trusted_proxies": trusted})
        await rest.get("/api/v1/agents", {**INTERNAL, "X-Forwarded-For": "203.0.113.1"}, peer="10.0.0.1")
        other = await rest.get(
            "/api/v1/agents", {**INTERNAL, "X-Forwarded-For": "203.0.113.2"}, peer="10.0.0.1"
        )
        assert other.status_code == expected


# --------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    "segment",
    ["..", ".", "%2e%2e", "a%2fb", "a%2F..%2Fb", "a%00", "a%0d%0aX-Evil:1", "x" * 129, "a@evil", "a;b", "%"],
)
@pytest.mark.parametrize(
    "route", ["/api/v1/sessions/{}/history", "/api/v1/agents/{}/current", "/api/v1/events/metrics/session/{}"]
)
async def test_a_bad_session_id_never_reaches_the_agent(route: str, segment: str) -> None:
    """Whatever is no session id is a 400 here, read as it stood on the wire."""
    rest = Rest()

    response = await rest.get("/", raw_path=route.format(segment))

    assert response.status_code == 400
    assert (await _json(response))["error"]["code"] == "HANDSHAKE_REFUSED"
    assert rest.seen == []


@pytest.mark.parametrize("query", ["a#b", "a b", "a\r\nX-Evil: 1", "ä", "\x00", "\x7f"])
async def test_a_query_that_is_none_is_refused(query: str) -> None:
    """A query holds visible ASCII and no fragment (RFC 3986 section 3.4)."""
    rest = Rest()

    assert (await rest.get("/", raw_path="/api/v1/agents", query=query.encode())).status_code == 400
    assert rest.seen == []


@given(
    path=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60),
    query=st.one_of(st.binary(max_size=60), st.text("!\"#%&'<>^`{|}~a/?", max_size=60).map(str.encode)),
)
@settings(max_examples=100, deadline=None)
async def test_no_target_gets_past_the_routes(path: str, query: bytes) -> None:
    """Any path and query are answered, without a bug, and only routes of the contract reach the agent."""
    rest = Rest()

    for raw_path in (f"/{path}", f"/api/v1/sessions/{path}/history", f"/api/v1/{path}", "/api/v1/agents"):
        response = await rest.get("/", raw_path=raw_path.partition("?")[0], query=query)
        assert response.status_code in (200, 400, 403, 404)
    assert all(str(request.url).startswith("http://agent:8001/base/") for request in rest.seen)
    assert all(b".." not in request.url.path.encode().split(b"/") for request in rest.seen)


async def _statuses(rest: Rest, headers: list[tuple[str, str]]) -> list[int]:
    """Of a public and of a protected route, with these header fields as a server would give them."""
    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    responses = [
        await rest.app.test_client().get(
            path, scope_base={"headers": fields, "raw_path": path.encode(), "client": ("192.0.2.1", 5)}
        )
        for path in ("/health", "/api/v1/agents")
    ]
    return [response.status_code for response in responses]


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 300, "", "[", "a b", "\xff", "a@b", "xn--\xff", ":0"])
async def test_no_host_is_too_odd(host: str) -> None:
    """Quart fails on some host names before it handles errors; here a host name decides nothing."""
    assert await _statuses(Rest(), [("host", host)]) == [200, 401]


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(_FIELDS),
            st.text(st.characters(max_codepoint=255, exclude_categories=()), max_size=30),
        ),
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
async def test_no_header_is_a_bug(headers: list[tuple[str, str]]) -> None:
    """Whatever the fields hold, the answer is the one for the route, or a refusal of ours."""
    rest = Rest()

    health, agents = await _statuses(rest, headers)

    assert health == 200
    assert agents in (200, 401)
    assert not any(level == "error" for level, _, _ in rest.telemetry.lines)
