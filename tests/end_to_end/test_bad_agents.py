"""An Agent Runtime that fails in every way: one clear error each, and the session goes on."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator

import pytest

from tests.end_to_end.bad_agent import running_bad_agent
from tests.end_to_end.conversation import connected, is_final, receive_until, text_of
from tests.end_to_end.processes import Process, running_gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A gateway before an agent that misbehaves, patient for one second."""
    folder = tmp_path_factory.mktemp("gateway")
    with running_bad_agent() as url, running_gateway(folder, url, AGENT_STREAM_TIMEOUT="1") as process:
        yield process


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        ("stall", "AGENT_TIMEOUT", True),
        ("never", "AGENT_TIMEOUT", True),
        ("cut", "AGENT_STREAM_INTERRUPTED", True),
        ("reset", "AGENT_STREAM_INTERRUPTED", True),
        ("hang up", "AGENT_STREAM_INTERRUPTED", True),
        ("500", "AGENT_ERROR", True),
        ("html", "AGENT_PROTOCOL_ERROR", False),
        ("huge", "AGENT_PROTOCOL_ERROR", False),
        ("rubbish", "AGENT_PROTOCOL_ERROR", False),
    ],
)
def test_one_error(gateway: Process, fault: str, code: str, retryable: bool) -> None:
    """One error with the right code, which names the message, and the next message is answered."""
    with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
        client.send({"type": "user_message", "content": fault, "message_id": "m1"})
        client.send({"type": "user_message", "content": "fine"})
        events = receive_until(client, is_final)

    errors = [event for event in events if event["type"] == "error"]
    assert [(error["code"], error["retryable"], error["message_id"]) for error in errors] == [
        (code, retryable, "m1")
    ]
    assert errors[0]["error"] == errors[0]["content"]
    assert "hunter2" not in str(events)
    assert text_of(events).removeprefix("before it ") == "all is well"


def test_broken_utf8(gateway: Process) -> None:
    """What is not UTF-8 is replaced; what is then no event is skipped; the answer goes on."""
    with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
        client.send({"type": "user_message", "content": "broken utf8"})
        events = receive_until(client, is_final)

    assert text_of(events) == "a\ufffd\ufffdb"
    assert [event for event in events if event["type"] == "error"] == []


def test_huge_event_is_not_kept(gateway: Process) -> None:
    """An event of 50 MB does not stay in memory."""
    before = gateway.resident_kilobytes()
    for _ in range(3):
        with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
            client.send({"type": "user_message", "content": "huge"})
            assert client.receive()["code"] == "AGENT_PROTOCOL_ERROR"

    assert gateway.resident_kilobytes() - before < 40_000


def test_nobody_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An agent that refuses connections: one error, after a few tries."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("nobody")
    with (
        running_gateway(folder, f"http://127.0.0.1:{port}") as lonely,
        connected(f"{lonely.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client,
    ):
        client.send({"type": "user_message", "content": "fine"})
        error = client.receive()

    assert (error["type"], error["code"], error["retryable"]) == ("error", "AGENT_UNAVAILABLE", True)
