"""Secrets planted in everything that comes in: what was said or presented is in no log, error or metric."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import orjson
import pytest
import trio

from tests.adapters.socket_harness import client_frame
from tests.hostile.servers import Request, answer
from tests.hostile.surroundings import INTERNAL_KEY, Surroundings, events, open_surroundings, saying

MARK = "pL4nt3d"


def planted(place: str) -> str:
    """A secret that says where it was put."""
    return f"{MARK}-{place}"


async def agent(request: Request, stream: trio.SocketStream) -> None:
    """Answers that are full of secrets: tokens, errors, heads, bodies, rubbish."""
    if request.method != "POST" or request.target != "/agent/message/stream":
        status = "500 Oops" if "history" in request.target else "200 OK"
        headers = f"X-Debug: {planted('agent-header')}\r\nSet-Cookie: s={planted('agent-cookie')}\r\n"
        body = b'{"detail":"%b"}' % planted("agent-rest").encode()
        if request.target.startswith("/events/stats"):
            await stream.send_all(answer(body, content_type="text/html", headers=headers))
        else:
            await stream.send_all(answer(body, status=status, headers=headers))
        return
    session = orjson.loads(request.body)["session_id"]
    secret = planted(f"agent-{session}")
    answers = {
        "tokens": saying(secret),
        "tool": events({"type": "tool_call", "call_id": secret, "tool_name": "t", "arguments": {}}),
        "refused": answer(secret.encode(), status=f"500 {secret}"),
        "text": answer(secret.encode(), content_type="text/html"),
        "moved": answer(b"", status="302 Found", headers=f"Location: http://{secret}.example/\r\n"),
        "rubbish": answer(
            f"data: {secret}\n\ndata: {{\n\ndata: [{secret!r}]\n\nid: {secret}\nevent: {secret}\n\n".encode(),
            content_type="text/event-stream",
        ),
        "head": f"HTTP/1.1 200 OK\r\n{secret}\r\nX-A: {secret}\x00\r\n\r\n".encode(),
        "cut": saying(secret)[:-40],
    }
    await stream.send_all(answers.get(session, saying(secret)))


def upgrade(path: str, *lines: str) -> bytes:
    """An upgrade with further header lines."""
    fields = "".join(f"{line}\r\n" for line in lines)
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{fields}\r\n"
    ).encode()


def a_jwt(place: str) -> str:
    """Something shaped like a token whose every part holds a secret."""
    parts = (
        orjson.dumps({"alg": "RS256", "kid": planted(place)}),
        orjson.dumps({"sub": planted(place)}),
        b"sig",
    )
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


async def plant(world: Surroundings) -> list[bytes]:
    """Send them everywhere; returns the error answers that came back."""
    good = f"Authorization: Bearer {world.issuer.token('alice')}"
    answers: list[bytes] = []
    for lines in (
        (f"Authorization: Bearer {planted('bearer')}",),
        (f"Authorization: Bearer {a_jwt('jwt')}",),
        (f"Authorization: Basic {planted('basic')}",),
        (f"X-Internal-Auth: {planted('key')}",),
        (f"Sec-WebSocket-Protocol: codelab.v2.json, bearer.{planted('subprotocol')}",),
        (f"Sec-WebSocket-Protocol: {planted('unknown-protocol')}", good),
        (f"Cookie: session={planted('cookie')}",),
        (f"Origin: https://{planted('origin')}.example", good),
        (f"X-Forwarded-For: {planted('forwarded')}", f"X-Request-ID: {planted('request id')}"),
        (f"User-Agent: {planted('agent')}", f"{planted('field-name')}: x"),
        (f"Host: {planted('second-host')}",),
    ):
        answers.append(await world.exchange(upgrade("/ws/s", *lines), seconds=2))
        fields = dict(line.split(": ", 1) for line in lines if not line.startswith("Host"))
        answers.append((await world.call("GET", "/api/v1/sessions", fields))[2])
    for query in ("access_token", "token", "epoch", "x"):
        value = planted(f"query-{query}")
        answers.append(await world.exchange(upgrade(f"/ws/s?{query}={value}", good), seconds=2))
        answers.append((await world.call("GET", f"/api/v1/sessions?{query}={value}&access_token={value}"))[2])
    authorized = dict([good.split(": ", 1)])
    for path in (
        f"/{planted('path')}",
        f"/api/v1/sessions/{planted('sid')}%2f/history",
        f"/ws/{planted('ws')}%00",
    ):
        answers.append((await world.call("GET", path, authorized))[2])
        answers.append(await world.exchange(upgrade(path, good), seconds=2))
    for body in (
        f'{{"session_id":"{planted("body")}/"}}',
        f'{{"a":{planted("broken")}',
        f'{{"{MARK}":1,"{MARK}":2}}',
    ):
        status, _, told = await world.call("POST", "/api/v1/sessions", authorized, body.encode())
        assert status == 400
        answers.append(told)
    # Not JSON, and no list: what the Agent Runtime answers is passed on only when it is what it must be.
    for target in ("/api/v1/events/stats", "/api/v1/sessions"):
        status, _, told = await world.call("GET", target, authorized)
        assert status == 502
        answers.append(told)
    answers.append(await world.exchange(f"{planted('method')} / HTTP/1.1\r\n\r\n".encode()))
    answers.append(await world.exchange(f"GET / HTTP/1.1\r\nHost: a\r\n{planted('line')}\r\n\r\n".encode()))
    await plant_in_frames(world, good)
    return answers


async def plant_in_frames(world: Surroundings, good: str) -> None:
    """Messages and rubbish on open sockets; the agent's answers to them hold secrets too."""
    said = planted("frame")
    broken = (
        planted("not-json"),
        f'{{"type":"user_message","content":"{said}"',
        f'{{"type":"user_message","content":{{"{said}":1}},"id":"i"}}',
        f'{{"type":"hitl_decision","call_id":"{said}","decision":"{said}","id":"i"}}',
        f'{{"type":"authenticate","token":"{planted("in-band")}","id":"i"}}',
        f'{{"type":"authenticate","token":"{a_jwt("in-band-jwt")}","id":"i"}}',
        f'{{"type":"cancel","turn_id":"{said}","id":"i"}}',
    )

    async def converse(session: str) -> None:
        message = {
            "type": "user_message",
            "content": said,
            "metadata": {"api_key": said},
            "id": f"id-{session}",
        }
        frames = [client_frame(1, text.encode()) for text in (orjson.dumps(message).decode(), *broken)]
        protocol = "Sec-WebSocket-Protocol: codelab.v2.json"
        pieces = [upgrade(f"/ws/{session}", good, protocol), *frames]
        await world.exchange(*pieces, seconds=1.5)
        await world.exchange(
            pieces[0], client_frame(8, b"\x03\xe8" + planted("close-reason").encode()), seconds=1
        )

    async with trio.open_nursery() as nursery:
        for session in ("tokens", "tool", "refused", "text", "moved", "rubbish", "head", "cut"):
            nursery.start_soon(converse, session)


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_planted_secrets_appear_nowhere(tmp_path: Path, log_format: str) -> None:
    """At the most talkative level of the log, in either format; lines are one line each."""
    async with open_surroundings(tmp_path, agent, LOG_LEVEL="DEBUG", LOG_FORMAT=log_format) as world:
        answers = await plant(world)
        metrics = await world.metrics()
        genuine = world.issuer.token("alice").split(".")[0]
        assert any(MARK.encode() in request.body for request in world.requests)
        await trio.sleep(0.2)
        log = world.gateway.log
    assert MARK not in metrics
    for given in answers:
        # What a client is told of its own message may name its type or its key, and nothing else of it.
        text = given.decode("latin-1")
        assert MARK not in re.sub(rf"duplicate key [^.]*{MARK}", "", text), text
    # Session ids are names, not secrets: the log says them.
    shown = [line for line in log.splitlines() if MARK in line]
    assert shown == []
    assert genuine not in log
    assert INTERNAL_KEY not in log
    assert base64.urlsafe_b64encode(planted("jwt").encode()).decode()[:12] not in log
    if log_format == "json":
        for line in log.splitlines():
            orjson.loads(line)
