"""``kill -9``, of the client and of the gateway, in the middle of an answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.bad_agent import running_bad_agent
from tests.end_to_end.conversation import connected, is_final, receive_rest, receive_until, text_of
from tests.end_to_end.processes import Process, running_agent, running_gateway

COUNT = 60
WHOLE = "".join(f"{n} " for n in range(1, COUNT + 1))
REQUEST = {"type": "user_message", "content": f"count to {COUNT}"}

CLIENT = f"""
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], compression=None, proxy=None) as socket:
    socket.send({json.dumps(json.dumps(REQUEST))})
    while True:
        sys.stdout.write(socket.recv() + "\\n")
        sys.stdout.flush()
"""
"""A client in a process of its own, so that it can be killed as users' are."""


@pytest.fixture(scope="module")
def unhurried_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """An agent that takes 20 ms for a token, so that there is a middle to kill something in."""
    with running_agent(tmp_path_factory.mktemp("agent"), "--token-delay", "0.02") as process:
        yield process


def test_client_is_killed(unhurried_agent: Process, tmp_path: Path) -> None:
    """It comes back to what it was not sent, in order and nothing twice.

    Missing may be only what the kernel had already taken for the dead socket: v1 has no acknowledgements.
    """
    with running_gateway(tmp_path, unhurried_agent.url) as gateway:
        url = f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}"
        client = subprocess.Popen([sys.executable, "-c", CLIENT, url], stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        before = [json.loads(client.stdout.readline()) for _ in range(8)]
        client.kill()
        rest, _ = client.communicate(timeout=20)
        before += [json.loads(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        with connected(url) as again:
            after = receive_until(again, is_final)

    assert_continued(text_of(before), text_of(after), most_missing=3)


def test_gateway_is_killed(unhurried_agent: Process, tmp_path: Path) -> None:
    """The next one, on the same SQLite file, carries the answer on: in order, and no token twice.

    What v1 had been sent died with the process, so what was stored and not sent by then is missing.
    """
    session = f"/api/v1/ws/{uuid.uuid4().hex}"
    with running_gateway(tmp_path, unhurried_agent.url) as gateway:
        with connected(gateway.socket_url + session) as client:
            client.send(REQUEST)
            before = [client.receive() for _ in range(8)]
            gateway.signal(signal.SIGKILL)
            before += receive_rest(client)
        assert gateway.wait() == -signal.SIGKILL
    with (
        running_gateway(tmp_path, unhurried_agent.url) as gateway,
        connected(gateway.socket_url + session) as client,
    ):
        after = receive_until(client, is_final)
        client.send({"type": "user_message", "content": "thank you"})
        assert text_of(receive_until(client, is_final)) == "You are welcome."

    assert_continued(text_of(before), text_of(after), most_missing=3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_v2_misses_nothing(unhurried_agent: Process, tmp_path: Path, number: signal.Signals) -> None:
    """A v2 client that names its place gets exactly what follows, whichever way the gateway ended."""
    session = f"/api/v1/ws/{uuid.uuid4().hex}"
    v2 = {"subprotocols": ["codelab.v2.json"]}
    with running_gateway(tmp_path, unhurried_agent.url) as gateway:
        with connected(gateway.socket_url + session, **v2) as client:
            epoch = client.receive()["epoch"]
            client.send({**REQUEST, "id": "m1"})
            before = receive_until(client, lambda event: event.get("token") == "7 ")
            gateway.signal(number)
            before += receive_rest(client)
        gateway.wait()
    before = [event for event in before if "seq" in event]
    resume = f"?epoch={epoch}&last_seq={before[-1]['seq']}"
    with (
        running_gateway(tmp_path, unhurried_agent.url) as gateway,
        connected(gateway.socket_url + session + resume, **v2) as client,
    ):
        welcome = client.receive()
        client.send({**REQUEST, "id": "m1"})
        after = receive_until(client, lambda event: event["type"] == "turn_ended")

    assert (welcome["resumed"], welcome["epoch"]) == (True, epoch)
    assert [event["status"] for event in after if event["type"] == "ack"] == ["duplicate"]
    events = before + [event for event in after if "seq" in event]
    assert text_of(events) == WHOLE
    assert [event.get("first_seq", event["seq"]) for event in events[1:]] == [
        event["seq"] + 1 for event in events[:-1]
    ]
    assert events[-1]["outcome"] == "completed"


def assert_continued(before: str, after: str, *, most_missing: int) -> None:
    """``before`` is the beginning, ``after`` the end, and between them at most so many tokens are missing."""
    read, came_back = before.split(), after.split()
    assert read == WHOLE.split()[: len(read)]
    assert came_back == WHOLE.split()[-len(came_back) :]
    assert 0 <= COUNT - len(read) - len(came_back) <= most_missing


def test_gateway_is_killed_before_an_agent_that_cannot_resume(tmp_path: Path) -> None:
    """The client is told that the outcome is unknown, once, and the session goes on."""
    session = f"/api/v1/ws/{uuid.uuid4().hex}"
    with running_bad_agent() as agent_url:
        with running_gateway(tmp_path, agent_url) as gateway:
            with connected(gateway.socket_url + session) as client:
                client.send({"type": "user_message", "content": "stall"})
                assert client.receive()["token"] == "before it "
                gateway.signal(signal.SIGKILL)
            gateway.wait()
        with (
            running_gateway(tmp_path, agent_url) as gateway,
            connected(gateway.socket_url + session) as client,
        ):
            client.send({"type": "user_message", "content": "fine"})
            events = receive_until(client, is_final)

    assert [event["code"] for event in events if event["type"] == "error"] == ["OUTCOME_UNKNOWN"]
    assert text_of(events[-2:]) == "all is well"
