"""Who gets in and what gets through, at a real gateway in JWT mode."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import trio
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from tests.end_to_end.conversation import connected, receive_until
from tests.end_to_end.processes import environment, running_agent, running_gateway
from tests.end_to_end.test_planted_secrets import upgrade
from tests.hostile.servers import Request, answer
from tests.hostile.surroundings import INTERNAL_KEY, Surroundings, open_surroundings, saying

KEY = {"X-Internal-Auth": INTERNAL_KEY}
KEY_LINE = f"X-Internal-Auth: {INTERNAL_KEY}"


async def agent(request: Request, stream: trio.SocketStream) -> None:
    """Everybody's sessions, histories, a redirect, and one word for each message."""
    if request.method == "POST" and request.target == "/agent/message/stream":
        await stream.send_all(saying("fine"))
    elif request.target == "/agents":
        moved = f"Location: http://{request.header('host')}/evil\r\n"
        await stream.send_all(answer(b"{}", status="302 Found", headers=moved))
    else:
        names = ("alices", "bobs", "nobodys")
        await stream.send_all(answer(orjson.dumps({"sessions": [{"session_id": name} for name in names]})))


def status_of(received: bytes) -> int:
    """The status of the first answer."""
    return int(received.split(b" ", 2)[1])


async def open_socket(world: Surroundings, session: str, subject: str | None, *lines: str) -> bytes:
    """Upgrade, stay a moment, and leave; what came back."""
    if subject is not None:
        lines = (f"Authorization: Bearer {world.issuer.token(subject)}", *lines)
    return await world.exchange(upgrade(f"/api/v1/ws/{session}", *lines), seconds=0.7)


async def test_sessions_are_their_owners_also_after_a_restart(tmp_path: Path) -> None:
    """On sockets and REST alike; lists are filtered; the internal key sees all and takes nothing."""
    for round_number in range(2):  # the second one over what the first one left in the file
        async with open_surroundings(tmp_path, agent) as world:
            if round_number == 0:
                assert status_of(await open_socket(world, "nobodys", None, KEY_LINE)) == 101
                assert status_of(await open_socket(world, "alices", "alice")) == 101
                assert status_of(await open_socket(world, "bobs", "bob")) == 101
            assert status_of(await open_socket(world, "alices", "bob")) == 403
            assert status_of(await open_socket(world, "alices", None, KEY_LINE)) == 101
            for subject, own in (("alice", ["alices"]), ("bob", ["bobs"]), ("eve", [])):
                headers = {"Authorization": f"Bearer {world.issuer.token(subject)}"}
                _, _, body = await world.call("GET", "/api/v1/sessions", headers)
                assert [entry["session_id"] for entry in orjson.loads(body)["sessions"]] == own
                expected = 200 if subject == "alice" else 403
                assert (await world.call("GET", "/api/v1/sessions/alices/history", headers))[0] == expected
            _, _, body = await world.call("GET", "/api/v1/sessions", KEY)
            assert len(orjson.loads(body)["sessions"]) == 3
    async with open_surroundings(tmp_path, agent) as world:
        assert status_of(await open_socket(world, "nobodys", "carol")) == 101
        assert status_of(await open_socket(world, "nobodys", "alice")) == 403


async def test_limits_are_told_on_upgrades_messages_and_calls(tmp_path: Path) -> None:
    """429 with Retry-After before an upgrade and on REST, RATE_LIMITED on a socket."""
    rates = {
        "RATE_UPGRADES_PER_MINUTE": "3",
        "RATE_MESSAGES_PER_MINUTE": "2",
        "RATE_REST_PER_MINUTE": "4",
        "MAX_SOCKETS_PER_SUBJECT": "1",
    }
    async with open_surroundings(tmp_path, agent, **rates) as world:
        token = world.issuer.token("alice")
        header = [("Authorization", f"Bearer {token}")]

        def converse() -> list[dict[str, object]]:
            with connected(f"{world.gateway.socket_url}/ws/s", additional_headers=header) as client:
                for _ in range(3):
                    client.send({"type": "cancel"})
                told = receive_until(client, lambda event: event.get("code") == "RATE_LIMITED")
                second = trio.from_thread.run(open_socket, world, "s2", "alice")
                assert status_of(second) == 429
                assert b"RATE_LIMITED" in second
                return told

        told = await trio.to_thread.run_sync(converse)
        assert told[-1]["retryable"] is True
        assert status_of(await open_socket(world, "s", "alice")) == 101
        refused = await open_socket(world, "s", "alice")
        assert status_of(refused) == 429
        assert re.search(rb"(?i)\r\nretry-after: [1-9]", refused)
        answers = [await world.call("GET", "/api/v1/sessions", KEY) for _ in range(5)]
        assert [status for status, _, _ in answers] == [200] * 4 + [429]
        assert int(answers[-1][1]["retry-after"]) >= 1
        assert orjson.loads(answers[-1][2])["error"]["code"] == "RATE_LIMITED"


async def test_browsers_come_from_listed_origins_with_the_token_as_a_subprotocol(tmp_path: Path) -> None:
    """Foreign origins and tokens in the URL are refused with 403 before the upgrade."""
    async with open_surroundings(tmp_path, agent, ALLOWED_ORIGINS="https://ide.example") as world:
        token = world.issuer.token("alice")

        def converse() -> None:
            offered = [Subprotocol("codelab.v2.json"), Subprotocol(f"bearer.{token}")]
            url = f"{world.gateway.socket_url}/api/v1/ws/s"
            with connected(url, subprotocols=offered, origin=Origin("https://ide.example")) as client:
                assert client.connection.subprotocol == "codelab.v2.json"
                assert client.receive()["type"] == "welcome"

        await trio.to_thread.run_sync(converse)
        assert status_of(await open_socket(world, "s", "alice", "Origin: https://evil.example")) == 403
        for query in (f"access_token={token}", f"x={token}", "token=abc"):
            assert status_of(await world.exchange(upgrade(f"/api/v1/ws/s?{query}"), seconds=2)) == 403
            status, _, body = await world.call("GET", f"/api/v1/sessions?{query}", KEY)
            assert (status, token.encode() in body) == (403, False)
        preflight = {"Access-Control-Request-Method": "POST"}
        for origin, status in (("https://ide.example", 204), ("https://evil.example", 403)):
            answered = await world.call("OPTIONS", "/api/v1/sessions", {"Origin": origin, **preflight})
            assert answered[0] == status
        assert token not in world.gateway.log


PATHS = (
    "/api/v1/sessions/../agents/history",
    "/api/v1/sessions/%2e%2e/history",
    "/api/v1/sessions/a%2f..%2fb/history",
    "/api/v1/sessions/a%00/history",
    "/api/v1/sessions/a%0d%0aX-Evil:%201/history",
    "/api/v1//evil.example/history",
    "/api/v1/sessions/@evil.example/history",
    "/api/v1/sessions/a%5cb/history",
    "/api/v1/sessions/a;b/history",
    "/api/v1/sessions/http:%2f%2fevil.example/history",
    "/api/v1/%2e%2e/agent/message/stream",
    "//evil.example/agents",
    "/api/v1/agent/message/stream",
    "/api/v1/sessions/s/history/../../../x",
    "/api/v1/agents/..;/current",
)


async def test_nothing_in_a_path_changes_where_a_call_goes(tmp_path: Path) -> None:
    """Nor does a redirect, a query, a header or a body; and no line of the log is split or made up."""
    async with open_surroundings(tmp_path, agent) as world:
        for path in PATHS:
            status, _, _ = await world.call("GET", path, KEY)
            assert status in (400, 404), path
            status = status_of(
                await world.exchange(upgrade(path.replace("sessions", "ws"), "X-A: b"), seconds=2)
            )
            assert status in (400, 401, 404), path
        assert world.requests == []
        assert (await world.call("GET", "/api/v1/agents", KEY))[0] == 502
        evil = {
            **KEY,
            "Host": "evil.example",
            "X-Forwarded-Host": "evil.example",
            "X-User-ID": "root",
            "Cookie": "a=b",
            "Connection": "close, x-drop",
            "X-Drop": "1",
            "X-Request-ID": "a b",
        }
        query = "?x=%0d%0aX-Evil:%201&@evil.example/..%2f"
        assert (await world.call("GET", f"/api/v1/sessions/s/history{query}", evil))[0] == 200
        redirected, forwarded = world.requests
        assert (redirected.target, forwarded.target) == ("/agents", f"/sessions/s/history{query}")
        assert forwarded.header("host") == redirected.header("host") != "evil.example"
        assert forwarded.header("x-user-id") == "internal"
        for name in ("cookie", "x-drop", "x-forwarded-host", "x-evil", "authorization"):
            assert forwarded.header(name) is None
        assert world.gateway.log
        for line in world.gateway.log.splitlines():
            assert set(orjson.loads(line)) >= {"timestamp", "level", "event"}


class DevTokens:
    """``gateway dev-token``: its keys, served, and as many tokens as are wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "gateway", "dev-token", "--directory", str(self._folder), *options]

    def token(self, subject: str, lifetime: int) -> str:
        """A token of that key."""
        command = self._command("--subject", subject, "--lifetime", str(lifetime), "--no-serve")
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip().removeprefix("export TOKEN=")

    @contextmanager
    def served(self) -> Iterator[str]:
        """The URL of the auth service that it stands in for."""
        command = self._command("--bind", "127.0.0.1:0")
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if found := re.search(r"AUTH_SERVICE_URL=(http://\S+)", line):
                        yield found[1].strip("'")
                        break
            finally:
                process.terminate()


def test_an_expiring_token_closes_v1_and_is_renewed_on_v2(tmp_path: Path) -> None:
    """4401 at the moment of expiry; v2 is warned, renews in band, keeps the socket and loses no event."""
    issuer = DevTokens(tmp_path / "keys")
    with (
        issuer.served() as auth_url,
        running_agent(tmp_path) as runtime,
        running_gateway(tmp_path, runtime.url, USE_JWT_AUTH="true", AUTH_SERVICE_URL=auth_url) as gateway,
    ):
        others, renewed = issuer.token("bob", 600), issuer.token("alice", 600)
        short = issuer.token("alice", 12)
        expires = time.time() + 12
        header = [("Authorization", f"Bearer {short}")]
        with (
            connected(f"{gateway.socket_url}/ws/one", additional_headers=header) as v1,
            connected(
                f"{gateway.socket_url}/ws/two",
                additional_headers=header,
                subprotocols=[Subprotocol("codelab.v2.json")],
            ) as v2,
        ):
            assert receive_until(v2, lambda event: event["type"] == "token_expiring")[-1]["in_s"] <= 12
            v2.send({"type": "authenticate", "id": "a1", "token": others})
            refused = v2.receive()
            assert (refused["type"], refused["code"]) == ("nack", "INVALID_TOKEN")
            v2.send({"type": "authenticate", "id": "a2", "token": renewed})
            assert v2.receive()["type"] == "authenticated"
            v2.send({"type": "user_message", "id": "m1", "content": "hello"})
            with pytest.raises(ConnectionClosed) as closed:
                v1.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4401
            assert time.time() >= expires - 2
            seen = receive_until(v2, lambda event: event["type"] == "turn_ended")
            seqs = [seq for event in seen if event["type"] != "ack" for seq in [event.get("seq")] if seq]
            assert seqs == sorted(set(seqs))
            assert seen[-1]["outcome"] == "completed"
            v2.send({"type": "user_message", "id": "m2", "content": "still there?"})
            assert (
                receive_until(v2, lambda event: event["type"] == "turn_ended")[-1]["outcome"] == "completed"
            )
        assert short not in gateway.log
