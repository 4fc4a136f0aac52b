"""The inputs: for each target, a function from a source of randomness to what is sent."""

from __future__ import annotations

import base64
import random

import msgspec
import orjson

from tests.adapters.socket_harness import client_frame
from tests.fuzz.mutation import damage
from tests.hostile.servers import answer

HEAD_WORDS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b"\xff", b"\xc3\xa9", b" ", b"\t", b":", b"/", b"..",
    b"%2f", b"%00", b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Host: a\r\n", b"Host: [::1\r\n", b"Host: a..b\r\n",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"HTTP/2.0", b"HTTP/1.0",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT", b"http://evil/",
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=999\r\n",
    b"Sec-WebSocket-Protocol: codelab.v2.json, bearer.x\r\n", b"X" * 20_000, b"A: b\r\n" * 120, b"-1",
    b"\x7f",
)  # fmt: skip
JSON_WORDS = (
    b"[", b"]", b"{", b"}", b'"', b"\\", b"\\u", b"\\ud800", b"null", b"NaN", b"1e999", b"-", b"0" * 400,
    b"[" * 500, b'{"a":' * 80, b'"type":"user_message"', b'"type":"cancel"',
    b'"type":"ack","seq":99999999999999999999', b'"type":"authenticate","token":"x"', b'"content":1',
    b'"id":""', b'"message_id":"'+b"m" * 300+b'"', b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00",
    b"[[],[],[],[]]", b',"role":"tool"', b'"turn_id":"x"', b'{"x":{}}',
)  # fmt: skip
SSE_WORDS = (
    b"\n\n", b"\r", b"\r\n", b"data:", b"data: ", b"event: done\n", b"event: error\n", b"id: x\x00\n",
    b"retry: -1\n", b": c\n", b"\xef\xbb\xbf", b"data: [DONE]\n\n", b"\xff", b'data: {"type":"done"}\n\n',
    b'"type":"tool_call"', b'data: {"type":"error","error":5}\n\n', b"X-Stream-Resumable: 1\r\n",
    b"HTTP/1.1 302 Found\r\n", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\n",
    b"Content-Encoding: gzip\r\n", b"ffffffffff\r\n", b"-5\r\n", b"HTTP/1.1 500 X\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"text/html", * JSON_WORDS[:14],
)  # fmt: skip
PATH_WORDS = (
    b"/", b"..", b"/../", b"%2e%2e", b"%2f", b"%5c", b"\\", b"%00", b"%0d%0a", b"@evil.example",
    b"//evil.example/", b"?", b"#", b";", b"%", b"%zz", b"\xc3\xa9", b"%c3%a9", b"sessions", b"history",
    b"agents", b"api/v1", b"\x01", b"limit=-1", b"limit=99999999999999999999", b"offset=1e9",
    b"access_token=x", b"&", b"=", b"a" * 200, b":80",
)  # fmt: skip
TOKEN_WORDS = (
    b".", b"=", b"==", b"_", b"-", b"+", b"/", b"eyJ", b"none", b" ", b"\t", b",", b"Bearer ", b"A" * 9000,
    b"\\u0061",
)  # fmt: skip

MESSAGES: tuple[dict[str, object], ...] = (
    {"type": "user_message", "content": "hi", "message_id": "m1", "id": "i1"},
    {
        "type": "user_message",
        "content": "é😀",
        "role": "user",
        "metadata": {"a": [1, {"b": None}]},
        "id": "i2",
    },
    {"type": "tool_result", "call_id": "c1", "result": {"ok": True}, "id": "i3"},
    {"type": "hitl_decision", "call_id": "c1", "decision": "EDIT", "modified_arguments": {}, "id": "i4"},
    {"type": "switch_agent", "agent_type": "coder", "id": "i5"},
    {"type": "cancel", "id": "i6"},
    {"type": "ack", "seq": 3},
    {"type": "authenticate", "token": "eyJhbGciOiJub25lIn0.e30.", "id": "i7"},
    {"type": "attach", "session_id": "s1"},
    {"type": "detach", "session_id": "s1"},
)

BAD_HEADERS: tuple[dict[str, object], ...] = (
    {"alg": "none"},
    {"alg": "HS256", "kid": "rsa-1"},
    {"alg": "RS256", "kid": "unknown"},
    {"alg": "RS256", "kid": "rsa-1", "jku": "http://127.0.0.1:1/x"},
    {"alg": "RS256", "kid": "rsa-1", "crit": []},
    {"alg": ["RS256"], "kid": {"a": 1}},
    {"alg": "RS256", "kid": "rsa-1", "jwk": {"kty": "oct", "k": "AA"}},
)

PATHS = (
    "/health", "/api/v1/health?ready=1", "/metrics", "/openapi.json", "/docs", "/api/v1/agents",
    "/api/v1/agents/s1/current", "/api/v1/sessions?limit=10", "/api/v1/sessions/s1/history",
    "/api/v1/sessions/s1/pending-approvals", "/api/v1/events/metrics", "/api/v1/events/metrics/sessions",
    "/api/v1/events/metrics/session/s1", "/api/v1/events/stats", "/api/v1/events/audit-log?session_id=s1",
)  # fmt: skip

EVENTS = (
    b'event: message\ndata: {"type":"assistant_message","token":"a","is_final":false}\n\n'
    b'id: 7\ndata: {"type":"tool_call","call_id":"c1","tool_name":"t",\n'
    b'data: "arguments":{},"requires_approval":true}\n\n'
    b': heartbeat\n\ndata: {"type":"agent_switched","metadata":{"from_agent":"a","to_agent":"b"}}\n\n'
    b'data: {"type":"error","content":"e"}\n\n'
    b'data: {"type":"assistant_message","token":"","is_final":true}\n\n'
    b'event: done\ndata: {"status":"completed"}\n\n'
)


def upgrade(token: str, path: str = "/api/v1/ws/fuzz", protocol: str | None = None, extra: str = "") -> bytes:
    """A good upgrade."""
    offered = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{offered}"
        f"Authorization: Bearer {token}\r\n{extra}\r\n"
    ).encode()


def handshake(source: random.Random, token: str) -> bytes:
    """Damaged upgrades and requests, one or several on a connection, or bytes of any kind."""
    good = [
        upgrade(token, f"/ws/fuzz-{source.randrange(9)}", source.choice((None, "codelab.v2.json", "x"))),
        f"GET {source.choice(PATHS)} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n".encode(),
        b"POST /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /api/v1/sessions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\n{}\r\n0\r\n\r\n",
    ]
    if source.random() < 0.05:
        return source.randbytes(source.randrange(2_000))
    chosen = b"".join(source.choices(good, k=source.choice((1, 1, 1, 2, 3))))
    return damage(source, chosen, HEAD_WORDS)


def frames(source: random.Random) -> bytes:
    """WebSocket frames: legal, illegal, cut, in floods, with messages in them."""
    result = b""
    for _ in range(source.randint(1, 8)):
        payload = source.choice(
            (
                orjson.dumps(source.choice(MESSAGES)),
                source.randbytes(source.choice((0, 1, 2, 125, 126, 300))),
                source.choice((1000, 1005, 1006, 999, 4401, 65_535)).to_bytes(2, "big")
                + b"bye\xff"[: source.randrange(5)],
                "é😀".encode()[: source.randrange(7)],
            )
        )
        opcode = source.choice((0, 1, 1, 1, 2, 8, 9, 10, source.randrange(128)))
        final, masked = source.random() < 0.7, source.random() < 0.95
        result += client_frame(opcode, payload, final=final, masked=masked) * source.choice(
            (1, 1, 1, 1, 3, 120)
        )
    return (
        damage(source, result, (b"\x81\xfe\xff\xff", b"\x88\x80abcd", b"\x89\xff", b"\xff" * 10))
        if source.random() < 0.5
        else result
    )


def messages(source: random.Random, *, binary: bool) -> bytes:
    """Frames that hold damaged JSON or MessagePack, alone and in batches."""
    result = b""
    for _ in range(source.randint(1, 10)):
        chosen = source.choices(MESSAGES, k=source.choice((1, 1, 1, 3)))
        value: object = chosen if len(chosen) > 1 or source.random() < 0.1 else chosen[0]
        if binary:
            payload = damage(
                source,
                msgspec.msgpack.encode(value),
                (b"\x80", b"\xdf\xff\xff\xff\xff", b"\xc1", b"\xd6\xff"),
            )
        else:
            payload = damage(source, orjson.dumps(value), JSON_WORDS)
        result += client_frame(2 if binary else 1, payload)
    return result


def stream(source: random.Random) -> bytes:
    """An Agent Runtime's answer, damaged in its head, its framing or its events."""
    body = damage(source, EVENTS * source.choice((1, 1, 3)), SSE_WORDS, times=6)
    whole = answer(
        body, content_type="text/event-stream", headers=source.choice(("", "X-Stream-Resumable: 1\r\n"))
    )
    if source.random() < 0.3:
        size = f"{len(body):x}".encode()
        whole = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            + size + b"\r\n" + body + b"\r\n0\r\n\r\n"
        )  # fmt: skip
    return damage(source, whole, SSE_WORDS) if source.random() < 0.4 else whole


def request(source: random.Random, token: str) -> bytes:
    """A REST request with a damaged target or body, by all methods."""
    target = source.choice(PATHS).encode()
    if source.random() < 0.8:
        target = damage(source, target, PATH_WORDS)
    method = source.choice((b"GET", b"GET", b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"TRACE"))
    body = (
        damage(source, b'{"session_id":"fuzz-1","title":"t"}', JSON_WORDS) if source.random() < 0.4 else b""
    )
    length = b"Content-Length: %d\r\nContent-Type: application/json\r\n" % len(body) if body else b""
    origin = source.choice((b"", b"Origin: https://evil.example\r\nAccess-Control-Request-Method: POST\r\n"))
    fields = b"Host: localhost\r\nConnection: close\r\n" + origin + length
    return (
        method
        + b" "
        + target
        + b" HTTP/1.1\r\n"
        + fields
        + b"Authorization: Bearer "
        + token.encode()
        + b"\r\n\r\n"
        + body
    )


def bad_token(source: random.Random, good: str) -> str:
    """A token that must not hold: ``good`` with a change in any part, or another header or payload."""
    head, payload, signature = good.split(".")
    if source.random() < 0.4:
        header = dict(source.choice(BAD_HEADERS))
        if header.get("kid") == "unknown":
            header["kid"] = str(source.random())
        head = base64.urlsafe_b64encode(orjson.dumps(header)).rstrip(b"=").decode()
        return f"{head}.{payload}.{signature}"
    while True:
        changed = damage(source, good.encode(), TOKEN_WORDS).replace(b"\r", b"").replace(b"\n", b"")
        text = changed.decode("latin-1").strip(" \t")
        if text != good and not text.startswith(f"{good} ") and text:
            return text
