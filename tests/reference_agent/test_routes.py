"""Statuses and bodies of the HTTP side."""

from typing import Any

import pytest

from .conftest import AgentClient, RunAgent


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"session_id": NaN}', 400),
        (b"\xff", 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"session_id": "s1"}', 422),
        (b'{"session_id": "s1", "message": "hi"}', 422),
        (b'{"session_id": "a/b", "message": {}}', 422),
        (b'{"session_id": "..", "message": {}}', 422),
        (b'{"session_id": "' + b"x" * 129 + b'", "message": {}}', 422),
        (b'{"session_id": "s1", "message": {"a":' + b"[" * 300 + b"]" * 300 + b"}}", 422),
    ],
)
async def test_bodies_that_are_no_message_get_a_status(client: AgentClient, body: bytes, status: int) -> None:
    """And a detail that says what is wrong; no session comes of it."""
    response = await client.http.post("/agent/message/stream", content=body)
    assert response.status_code == status, response.text
    assert response.json()["detail"]
    assert (await client.get("/sessions"))["total"] == 0


async def test_a_body_over_the_limit_is_413(run_agent: RunAgent) -> None:
    """With or without a length announced."""
    async with run_agent(max_body_bytes=1000) as client:
        announced = await client.http.post("/agent/message/stream", content=b"x" * 2000)

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 100

        streamed = await client.http.post("/agent/message/stream", content=chunks())
        fine = await client.say("help")
    assert (announced.status_code, streamed.status_code, fine.status) == (413, 413, 200)


@pytest.mark.parametrize(
    "path",
    [
        "/agents/nobody/current",
        "/sessions/nobody/history",
        "/sessions/nobody/pending-approvals",
        "/events/metrics/session/nobody",
        "/no/such/route",
    ],
)
async def test_what_is_not_there_is_404_with_a_detail(client: AgentClient, path: str) -> None:
    """As the gateway passes it on."""
    response = await client.http.get(path)
    assert response.status_code == 404
    assert isinstance(response.json()["detail"], str)


async def test_a_wrong_method_is_405(client: AgentClient) -> None:
    """In JSON too."""
    response = await client.http.get("/agent/message/stream")
    assert (response.status_code, "detail" in response.json()) == (405, True)


async def test_sessions_are_created_named_and_listed(client: AgentClient) -> None:
    """Creating one that is there changes nothing."""
    created = await client.http.post("/sessions", json={"session_id": "mine", "title": "A title"})
    again = await client.http.post("/sessions", json={"session_id": "mine"})
    unnamed = await client.http.post("/sessions")
    listed = await client.get("/sessions?limit=1")
    history = await client.get("/sessions/mine/history")
    assert (created.status_code, again.status_code, unnamed.status_code) == (201, 200, 201)
    assert (again.json()["title"], len(unnamed.json()["session_id"]) > 10) == ("A title", True)
    assert (len(listed["sessions"]), listed["total"]) == (1, 2)
    assert history["messages"] == []


@pytest.mark.parametrize("body", [{"session_id": "a b"}, {"session_id": 7}, {"title": 7}, [1]])
async def test_sessions_with_bad_names_are_refused(client: AgentClient, body: Any) -> None:
    """422, and nothing is made."""
    assert (await client.http.post("/sessions", json=body)).status_code == 422
    assert (await client.get("/sessions"))["total"] == 0


async def test_sessions_are_listed_by_user_when_asked_for(client: AgentClient) -> None:
    """Not by X-User-ID: the gateway knows who may see what, and its internal key sees all."""
    await client.post({"type": "user_message", "content": "help"}, X_User_ID="ann")
    await client.http.post("/sessions", json={"session_id": "b"}, headers={"X-User-ID": "bob"})

    async def seen(user: str) -> list[str]:
        listed = await client.get(f"/sessions?user_id={user}")
        return [one["session_id"] for one in listed["sessions"]]

    assert (await seen("ann"), await seen("bob"), await seen("eve")) == (["s1"], ["b"], [])
    everything = await client.http.get("/sessions", headers={"X-User-ID": "eve"})
    assert everything.json()["total"] == 2


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "offset=1e3", "limit=99999999999"])
async def test_pages_that_are_no_numbers_are_refused(client: AgentClient, query: str) -> None:
    """422 on each list."""
    for path in ("/sessions", "/events/audit-log", "/events/metrics/sessions"):
        assert (await client.http.get(f"{path}?{query}")).status_code == 422


async def test_the_audit_log_tells_what_happened_and_not_what_was_said(client: AgentClient) -> None:
    """Filtered by session and type; the statistics count the same."""
    asked = await client.say("create very-private.txt with content top secret")
    await client.decide(asked.calls[0]["call_id"], "reject", feedback="hush")
    log = await client.get("/events/audit-log?session_id=s1")
    decided = await client.get("/events/audit-log?event_type=approval_decided")
    stats = await client.get("/events/stats")
    assert [one["event_type"] for one in reversed(log["events"])] == [
        "session_created",
        "message_received",
        "agent_switched",
        "tool_call",
        "approval_decided",
        "answer_completed",
    ]
    assert decided["events"][0]["details"]["decision"] == "reject"
    assert not any(word in str(log) for word in ("private", "secret", "hush"))
    assert stats["total"] == 6


async def test_feedback_with_an_approval_reaches_the_brain(client: AgentClient) -> None:
    """It stands before the result in the history."""
    asked = await client.say("create a.txt")
    await client.decide(asked.calls[0]["call_id"], "approve", feedback="but be quick")
    await client.result(asked.calls[0]["call_id"], "ok")
    messages = (await client.get("/sessions/s1/history"))["messages"]
    assert messages[2]["content"] == "(The user said: but be quick)\nok"


async def test_a_message_for_the_agent_at_hand_switches_nothing(client: AgentClient) -> None:
    """IDEs that send their selection with every message do not cause a switch each time."""
    await client.say("create a.txt")
    answer = await client.say("help", agent_type="coder")
    planned = await client.say("plan a shop")
    assert answer.types == ["assistant_message"]
    assert planned.events[0]["to_agent"] == "architect"
