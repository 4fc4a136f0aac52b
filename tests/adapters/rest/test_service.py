"""What goes to the Agent Runtime, what comes back, and whose sessions it may be about."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from gateway.adapters.rest.routes import PROXY_ROUTES, Visibility
from gateway.adapters.stores.memory import MemoryStore
from gateway.core.errors import StoreUnavailable
from gateway.core.identity import SCOPE_READ
from tests.adapters.rest.harness import ADMIN, INTERNAL, Rest, bearer

ALICE, BOB = bearer("alice"), bearer("bob")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def _json_answer(value: object, status: int = 200) -> Any:
    return lambda _request: httpx.Response(status, json=value)


# --------------------------------------------------------------------------- passing on


@pytest.mark.parametrize("route", PROXY_ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_is_passed_on(route: Any) -> None:
    """Method, path without the prefix, query and status arrive unchanged, the body byte for byte."""
    body = b'{"sessions" : [ ],\n "x": 1.0, "big": 123456789012345678901234567890}'
    rest = Rest(lambda _: httpx.Response(203, content=body, headers={"Content-Type": "application/json"}))

    response = await rest.call(route.method, route.public_path.replace("{session_id}", "s.1:a") + "?a=1")

    (request,) = rest.seen
    assert request.method == route.method
    assert request.url.raw_path.decode() == "/base" + route.path.replace("{session_id}", "s.1:a") + "?a=1"
    assert response.status_code == 203
    assert await response.get_data() == body


@pytest.mark.parametrize("query", ["a=%41&b=a+b&&c", "q='x'|{}[]^\"`\\", "%zz", "a=?b=/../", "x=%E2%80%A8"])
async def test_the_query_arrives_byte_for_byte(query: str) -> None:
    """Nothing is decoded, encoded or normalized on the way."""
    rest = Rest()

    await rest.app.test_client().get(
        "/api/v1/agents", headers=INTERNAL, scope_base={"query_string": query.encode()}
    )

    assert rest.seen[0].extensions["target"] == b"/base/agents?" + query.encode()


@pytest.mark.parametrize("status", [200, 201, 400, 401, 404, 409, 422, 500, 503])
async def test_the_agents_status_and_body_arrive(status: int) -> None:
    """A 404 with a detail arrives as that 404, and so does any other."""
    rest = Rest(_json_answer({"detail": "no such session"}, status))

    response = await rest.get("/api/v1/sessions/x/history")

    assert response.status_code == status
    assert await response.get_json() == {"detail": "no such session"}


async def test_head_asks_as_get_does() -> None:
    """A HEAD is answered from the Agent Runtime's answer to GET: runtimes seldom know HEAD."""
    rest = Rest()

    assert (await rest.call("HEAD", "/api/v1/agents")).status_code == 200
    assert rest.seen[0].method == "GET"


async def test_headers_are_added_and_taken_away() -> None:
    """The gateway's own headers are added; hop-by-hop, cookies, credentials and unknown ones stay behind."""
    rest = Rest()
    await rest.get(
        "/api/v1/agents",
        {
            **ALICE,
            "X-Request-ID": "req-1",
            "Traceparent": TRACE,
            "Tracestate": "vendor=1",
            "Accept-Language": "de",
            "Cookie": "sid=1",
            "Connection": "X-Mine",
            "X-Mine": "1",
            "Te": "trailers",
            "Upgrade": "h2c",
            "Proxy-Authorization": "Basic x",
            "X-User-Id": "bob",
            "X-Forwarded-For": "6.6.6.6",
            "Host": "evil.example",
        },
    )

    headers = rest.seen[0].headers
    assert headers["x-internal-auth"] == "agent-key"
    assert headers["x-request-id"] == "req-1"
    assert headers["x-user-id"] == "alice"
    assert headers["traceparent"] == TRACE
    assert headers["tracestate"] == "vendor=1"
    assert headers["accept-language"] == "de"
    assert headers["host"] == "agent:8001"
    assert {
        "authorization",
        "cookie",
        "te",
        "upgrade",
        "proxy-authorization",
        "x-mine",
        "x-forwarded-for",
    }.isdisjoint(headers)


async def test_the_callers_key_is_replaced() -> None:
    """The key that a caller came with is not what the Agent Runtime is sent, nor is anything twice."""
    rest = Rest()
    await rest.get("/api/v1/agents")

    assert rest.seen[0].headers.get_list("x-internal-auth") == ["agent-key"]
    assert rest.seen[0].headers["x-user-id"] == "internal"


async def test_only_harmless_response_headers_come_back() -> None:
    """Cookies, the server's name and framing of the Agent Runtime stay behind."""
    rest = Rest(
        lambda _: httpx.Response(
            200,
            json={},
            headers={
                "Set-Cookie": "a=b",
                "Server": "uvicorn",
                "ETag": '"1"',
                "Connection": "x",
                "X-Internal": "1",
            },
        )
    )

    response = await rest.get("/api/v1/agents")

    assert response.headers["ETag"] == '"1"'
    assert {"Set-Cookie", "Server", "Connection", "X-Internal"}.isdisjoint(response.headers)


# --------------------------------------------------------------------------- bodies


async def test_a_body_arrives_byte_for_byte() -> None:
    """JSON is checked and passed on as it was."""
    rest = Rest()
    body = b' {"title" : "\\u00e4", "n": 1.10}'

    assert (await rest.call("POST", "/api/v1/sessions", body=body)).status_code == 200
    assert rest.seen[0].content == body
    assert rest.seen[0].headers["content-type"] == "application/json"


async def test_a_body_is_not_needed() -> None:
    """POST without a body is passed on without one."""
    rest = Rest()

    assert (await rest.post("/api/v1/sessions")).status_code == 200
    assert rest.seen[0].content == b""
    assert "content-type" not in rest.seen[0].headers


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"a": NaN}', "application/json", 400),
        (b'{"a": 1, "a": 2}', "application/json", 400),
        (b"[" * 100 + b"]" * 100, "application/json", 400),
        (b'{"a": "\xff"}', "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b'{"session_id": "../x"}', "application/json", 400),
        (b'{"session_id": 7}', "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"{}", "text/plain", 415),
        (b'"' + b"x" * 2_000 + b'"', "application/json", 413),
    ],
)
async def test_a_bad_body_never_reaches_the_agent(body: bytes, content_type: str, status: int) -> None:
    """What is not strict JSON, not sent as JSON, or too large is refused with the error body of all."""
    rest = Rest(settings={"max_message_bytes": 1_024 if status == 413 else 100_000})

    response = await rest.call("POST", "/api/v1/sessions", {**INTERNAL, "Content-Type": content_type}, body)

    assert response.status_code == status
    assert (await response.get_json())["error"]["retryable"] is False
    assert rest.seen == []


@pytest.mark.parametrize("query", ["access_token=abc", "q=eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."])
async def test_a_token_in_the_url_is_refused(query: str) -> None:
    """A credential in the query goes no further."""
    rest = Rest()

    assert (await rest.get(f"/api/v1/agents?{query}")).status_code == 403
    assert rest.seen == []


# --------------------------------------------------------------------------- ownership

ONE_SESSION = [route for route in PROXY_ROUTES if route.visibility is Visibility.ONE_SESSION]


@pytest.mark.parametrize("route", ONE_SESSION, ids=lambda route: route.path)
async def test_a_session_is_its_owners(route: Any) -> None:
    """Another subject gets 403 and the Agent Runtime is not asked; the owner and the internal key get it."""
    rest = Rest()
    await rest.store.claim("s", "alice", 0)
    path = route.public_path.replace("{session_id}", "s")

    refused = await rest.get(path, BOB)
    assert refused.status_code == 403
    assert (await refused.get_json())["error"]["code"] == "NOT_YOURS"
    assert (await rest.get(path, ADMIN)).status_code == 403
    assert rest.seen == []
    assert (await rest.get(path, ALICE)).status_code == 200
    assert (await rest.get(path, INTERNAL)).status_code == 200


async def test_reading_a_session_of_nobody_makes_it_ones_own() -> None:
    """The first subject that a session is shown to owns it from then on."""
    rest = Rest()

    assert (await rest.get("/api/v1/sessions/s/history", ALICE)).status_code == 200
    assert (await rest.get("/api/v1/sessions/s/history", BOB)).status_code == 403


async def test_asking_for_a_session_that_is_not_there_claims_nothing() -> None:
    """A 404 arrives as it is, and leaves the id free."""
    rest = Rest(_json_answer({"detail": "no"}, 404))

    assert (await rest.get("/api/v1/sessions/s/history", ALICE)).status_code == 404
    assert await rest.store.owner("s") is None


async def test_two_that_read_at_once_do_not_both_see_it() -> None:
    """When somebody else became the owner meanwhile, the answer is withheld."""

    async def answer(_request: httpx.Request) -> httpx.Response:
        await rest.store.claim("s", "bob", 0)
        return httpx.Response(200, json={"secret": "of bob"})

    rest = Rest(answer)

    response = await rest.get("/api/v1/sessions/s/history", ALICE)
    assert response.status_code == 403
    assert b"of bob" not in await response.get_data(as_text=False)


async def test_the_internal_key_owns_nothing() -> None:
    """A service that creates or reads a session leaves it to the user."""
    rest = Rest(_json_answer({"session_id": "s"}, 201))

    assert (await rest.post("/api/v1/sessions", {"session_id": "s"})).status_code == 201
    assert (await rest.get("/api/v1/sessions/s/history")).status_code == 201
    assert await rest.store.owner("s") is None


@pytest.mark.parametrize("created", [{"session_id": "s"}, {"id": "s"}, {"ok": True}])
async def test_a_created_session_belongs_to_its_creator(created: dict[str, object]) -> None:
    """The session that the Agent Runtime names, or else the one that was asked for, is the caller's."""
    rest = Rest(_json_answer(created, 201))

    assert (await rest.post("/api/v1/sessions", {"session_id": "s"}, ALICE)).status_code == 201
    assert await rest.store.owner("s") == "alice"


async def test_a_session_of_another_cannot_be_created_again() -> None:
    """Asking for another subject's id is 403 before the Agent Runtime hears of it."""
    rest = Rest(_json_answer({"session_id": "s"}, 201))
    await rest.store.claim("s", "alice", 0)

    assert (await rest.post("/api/v1/sessions", {"session_id": "s"}, BOB)).status_code == 403
    assert rest.seen == []


async def test_an_answer_about_anothers_session_is_withheld() -> None:
    """When the Agent Runtime answers a creation with somebody else's session, the caller does not see it."""
    rest = Rest(_json_answer({"session_id": "s", "title": "private"}, 201))
    await rest.store.claim("s", "alice", 0)

    response = await rest.post("/api/v1/sessions", {}, BOB)

    assert response.status_code == 403
    assert b"private" not in await response.get_data(as_text=False)


async def test_a_failed_creation_claims_nothing() -> None:
    """Only success makes an owner."""
    rest = Rest(_json_answer({"detail": "no"}, 422))

    assert (await rest.post("/api/v1/sessions", {"session_id": "s"}, ALICE)).status_code == 422
    assert await rest.store.owner("s") is None


LISTED = {"sessions": [{"session_id": "a"}, {"session_id": "b"}], "total": 2}


@pytest.mark.parametrize("path", ["/api/v1/sessions", "/api/v1/events/metrics/sessions"])
async def test_a_subject_sees_its_own_sessions_in_lists(path: str) -> None:
    """Others' are left out for everybody but the internal key, for api:admin too."""
    rest = Rest(_json_answer(LISTED))
    await rest.store.claim("a", "alice", 0)
    await rest.store.claim("b", "bob", 0)

    assert await (await rest.get(path, ALICE)).get_json() == {"sessions": [{"session_id": "a"}], "total": 1}
    assert await (await rest.get(path, bearer("carol"))).get_json() == {"sessions": [], "total": 0}
    assert await (await rest.get(path, ADMIN)).get_json() == {"sessions": [], "total": 0}
    assert await (await rest.get(path, INTERNAL)).get_json() == LISTED


async def test_a_list_that_is_all_own_keeps_its_bytes() -> None:
    """Nothing to leave out, nothing changed."""
    body = b'{"sessions":[ {"id":"a"} ]}'
    rest = Rest(lambda _: httpx.Response(200, content=body, headers={"Content-Type": "application/json"}))
    await rest.store.claim("a", "alice", 0)

    assert await (await rest.get("/api/v1/sessions", ALICE)).get_data() == body


async def test_a_shortened_list_has_no_validator_of_the_whole() -> None:
    """ETag and the like are about what was not shown."""
    rest = Rest(lambda _: httpx.Response(200, json=LISTED, headers={"ETag": '"1"', "Link": "<x>"}))

    assert {"ETag", "Link"}.isdisjoint((await rest.get("/api/v1/sessions", ALICE)).headers)


@pytest.mark.parametrize("answer", [{"a": {}}, "text", 7, None])
async def test_a_list_of_unknown_shape_is_withheld(answer: object) -> None:
    """What cannot be filtered is a 502 for a subject, and passes for the internal key."""
    rest = Rest(_json_answer(answer))

    response = await rest.get("/api/v1/sessions", ALICE)
    assert response.status_code == 502
    assert (await response.get_json())["error"]["code"] == "AGENT_PROTOCOL_ERROR"
    assert (await rest.get("/api/v1/sessions", INTERNAL)).status_code == 200


async def test_the_audit_log_is_cut_to_own_sessions() -> None:
    """A subject sees entries of its sessions; api:admin and the internal key see all."""
    log = {"entries": [{"id": "b", "session_id": "a"}, {"id": "a", "session_id": "b"}, {"id": "a"}]}
    rest = Rest(_json_answer(log))
    await rest.store.claim("a", "alice", 0)
    path = "/api/v1/events/audit-log"

    assert await (await rest.get(path, ALICE)).get_json() == {"entries": [{"id": "b", "session_id": "a"}]}
    assert await (await rest.get(path, ADMIN)).get_json() == log
    assert await (await rest.get(path, INTERNAL)).get_json() == log


@pytest.mark.parametrize("path", ["/api/v1/agents", "/api/v1/events/metrics", "/api/v1/events/stats"])
async def test_totals_are_for_every_reader(path: str) -> None:
    """What says nothing about single sessions needs api:read."""
    assert (await Rest().get(path, bearer("alice", SCOPE_READ))).status_code == 200


async def test_without_its_store_the_gateway_shows_no_session() -> None:
    """When ownership cannot be told, the answer is 503 and not the session."""

    class Lost(MemoryStore):
        async def owner(self, session_id: str) -> str | None:
            raise StoreUnavailable("The store is unreachable; try again later.")

    rest = Rest(store=Lost(dedupe_window=60))

    response = await rest.get("/api/v1/sessions/s/history", ALICE)
    assert response.status_code == 503
    assert (await response.get_json())["error"] == {
        "code": "STORE_UNAVAILABLE",
        "message": "The store is unreachable; try again later.",
        "retryable": True,
    }
    assert rest.seen == []


async def test_the_answer_is_json_text_in_json_errors() -> None:
    """An error body can be read by clients of both generations: error and detail say the same."""
    rest = Rest()
    await rest.store.claim("s", "alice", 0)

    body = json.loads(await (await rest.get("/api/v1/sessions/s/history", BOB)).get_data())
    assert body["detail"] == body["error"]["message"]
