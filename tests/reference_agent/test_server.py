"""The runtime over real sockets: ending cleanly, stopping at once, surviving what clients do."""

import time
from typing import Any

import pytest
import trio
import trio.testing
from hypercorn.utils import wrap_app

from gateway.reference_agent.approvals import load_policy
from gateway.reference_agent.memory_state import MemoryState
from gateway.reference_agent.routes import create_app
from gateway.reference_agent.runtime import Runtime
from gateway.reference_agent.scripted_brain import ScriptedBrain
from gateway.reference_agent.server import HttpServer, hypercorn_config, serve_agent, split_bind
from gateway.reference_agent.settings import AgentSettings

from .conftest import AgentClient, RunAgent


async def test_a_conversation_with_approval_reaches_its_final_answer(client: AgentClient) -> None:
    """Create a file: switch, words, a call for approval; approve, run, and the answer ends."""
    asked = await client.say("create hello.py that prints hello")
    call = asked.calls[0]
    decided = await client.decide(call["call_id"], "APPROVE")
    answered = await client.result(call["call_id"], "ok")
    assert asked.types == ["agent_switched", "assistant_message", "tool_call"]
    assert (call["tool_name"], call["requires_approval"]) == ("write_file", True)
    assert call["arguments"] == {"path": "hello.py", "content": 'print("hello")\n'}
    assert (decided.events, decided.ended) == ([], True)
    assert answered.events[-1] == {"type": "assistant_message", "token": "", "is_final": True}
    assert answered.ended


async def test_closing_the_request_stops_the_brain_at_once(run_agent: RunAgent) -> None:
    """After the client has gone, no further word reaches the history."""
    async with run_agent(token_delay=0.02) as client:
        await client.read_until("count to 1000", b'"3 "')
        began = time.monotonic()
        while (await client.get("/events/metrics"))["running_turns"]:
            assert time.monotonic() - began < 1
            await trio.sleep(0.01)
        history = (await client.get("/sessions/s1/history"))["messages"]
    assert history[-1]["interrupted"] is True
    assert len(history[-1]["content"].split()) < 10


async def test_events_are_flushed_one_by_one(run_agent: RunAgent) -> None:
    """The first token is there long before the last."""
    async with run_agent(token_delay=0.05) as client:
        body = {"session_id": "s1", "message": {"type": "user_message", "content": "count to 10"}}
        async with client.http.stream("POST", "/agent/message/stream", json=body) as response:
            times = [time.monotonic() async for line in response.aiter_lines() if "token" in line]
    assert times[9] - times[0] > 0.3


async def test_silence_is_filled_with_heartbeats(run_agent: RunAgent) -> None:
    """While the brain thinks, comments keep the connection alive."""
    async with run_agent(heartbeat_interval=0.1) as client:
        body = {"session_id": "s1", "message": {"type": "user_message", "content": "think 1"}}
        response = await client.http.post("/agent/message/stream", json=body)
    assert 5 <= response.text.count(": heartbeat\n\n") <= 10
    assert "event: done" in response.text


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: a\xff\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: \xff\xfe\r\nConnection: upgrade\r\n\r\n",
        b"GET /h\xc3\xa9alth HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: \xff\xff\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Extensions: \xff\r\nSec-WebSocket-Protocol: \xff\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
async def test_a_malformed_request_ends_only_its_own_connection(client: AgentClient, head: bytes) -> None:
    """The server goes on answering others."""
    host, port = client.http.base_url.host, client.http.base_url.port
    assert port is not None
    stream = await trio.open_tcp_stream(host, port)
    async with stream:
        await stream.send_all(head)
        with trio.move_on_after(0.3):
            await stream.receive_some()
    assert (await client.get("/health"))["status"] == "healthy"


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application whose answer ends only with its client."""

    async def watch(scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(65_536), "more_body": True})


@pytest.mark.parametrize("ends_by", ["cancel", "send deadline"])
async def test_a_stalled_reader_holds_up_neither_the_end_nor_its_connection(ends_by: str) -> None:
    """hypercorn's shielded write ends when the server is cancelled, and at the deadline for writing."""
    deadline = 60.0 if ends_by == "cancel" else 0.3
    server = HttpServer(wrap_app(flood, 1, "asgi"), hypercorn_config(), send_deadline=deadline)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                await trio.sleep(0.5)
                if ends_by == "send deadline":
                    await trio.sleep(1)
                    assert server.connections == 0
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("path", ["/health", "/no/such/route", "/agent/message/stream"])
async def test_a_connection_to_be_closed_is_closed(client: AgentClient, path: str) -> None:
    """`Connection: close` and HTTP/1.0, which nginx speaks by default, end with the answer."""
    body = b'{"session_id":"s1","message":{"type":"user_message","content":"help"}}'
    method = b"POST" if "stream" in path else b"GET"
    for version, more in ((b"1.1", b"Connection: close\r\n"), (b"1.0", b"")):
        head = b"%b %b HTTP/%b\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n"
        url = client.http.base_url
        async with await trio.open_tcp_stream(url.host, url.port or 80) as stream:
            await stream.send_all(head % (method, path.encode(), version, len(body), more) + body)
            with trio.fail_after(2):
                received = b"".join([chunk async for chunk in stream])
        assert received.startswith(b"HTTP/1.1 ")


async def test_an_idle_connection_is_closed_in_time() -> None:
    """Also after its first request, and after a stream."""
    settings = AgentSettings(token_delay=0.0)
    async with trio.open_nursery() as nursery:
        brain = ScriptedBrain(0.0)
        runtime = Runtime(settings, brain, load_policy(None), MemoryState(), nursery)
        app = wrap_app(create_app(runtime, settings), 1, "asgi")
        server = HttpServer(app, hypercorn_config(keep_alive=0.2))
        listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
        await nursery.start(server.serve, listeners)
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            with trio.fail_after(2):
                received = b"".join([chunk async for chunk in stream])
        assert b"healthy" in received
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"]
)
async def test_a_client_that_leaves_is_let_go_of(sent: bytes) -> None:
    """At once, and not when the keep-alive timeout ends."""
    server = HttpServer(wrap_app(flood, 1, "asgi"), hypercorn_config())
    listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            await stream.send_all(sent)
            await trio.sleep(0.1)
            assert server.connections == 1
        await trio.sleep(0.3)
        assert server.connections == 0
        nursery.cancel_scope.cancel()


async def test_the_internal_key_guards_everything_but_health(run_agent: RunAgent) -> None:
    """A missing or wrong key is 401; the right one is let in."""
    async with run_agent(internal_key="secret") as client:
        refused = [
            (await client.http.get("/agents")).status_code,
            (await client.http.get("/agents", headers={"X-Internal-Auth": "secre"})).status_code,
            (await client.http.post("/agent/message/stream", json={})).status_code,
        ]
        open_to_all = (await client.http.get("/health")).status_code
        let_in = (await client.http.get("/agents", headers={"X-Internal-Auth": "secret"})).status_code
    assert (refused, open_to_all, let_in) == ([401, 401, 401], 200, 200)


async def test_a_taken_port_is_a_plain_oserror(client: AgentClient) -> None:
    """The caller can tell the user, without unwrapping groups."""
    with pytest.raises(OSError, match="in use"):
        await serve_agent(AgentSettings(bind=f"127.0.0.1:{client.http.base_url.port}"))


@pytest.mark.parametrize("bind", ["8001", "localhost", ":80", "a:b", "a:70000", "a:-1"])
def test_a_bad_bind_address_says_what_is_expected(bind: str) -> None:
    """Each is refused with an example."""
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        split_bind(bind)


def test_binds_of_both_families() -> None:
    """An IPv6 host is written in brackets."""
    assert (split_bind("127.0.0.1:0"), split_bind("[::1]:80")) == (("127.0.0.1", 0), ("::1", 80))


async def test_a_client_that_leaves_without_a_word_leaves_nothing() -> None:
    """Its connection is gone at once, not when the keep-alive timeout is over."""
    server = HttpServer(wrap_app(flood, 1, "asgi"), hypercorn_config())
    listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            await stream.send_eof()
            with trio.fail_after(5):
                assert await stream.receive_some() == b""
        with trio.move_on_after(0.1):
            await trio.testing.wait_all_tasks_blocked()
        assert server.connections == 0
        nursery.cancel_scope.cancel()
