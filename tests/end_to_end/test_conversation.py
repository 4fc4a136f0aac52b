"""One conversation through clients that are not ours."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.conversation import Message, connected, hold_conversation
from tests.end_to_end.processes import Process
from tests.end_to_end.requirements import need_program

NODE_CLIENT = Path(__file__).with_name("node_client.mjs")
KEY = "X-Internal-Auth: change-me-internal-key"


@pytest.mark.parametrize("path", ["/api/v1/ws", "/ws"])
def test_websockets(gateway: Process, path: str) -> None:
    """Python's ``websockets`` holds the conversation on both paths."""
    with connected(f"{gateway.socket_url}{path}/{uuid.uuid4().hex}") as client:
        hold_conversation(client)


def test_node(gateway: Process, node_modules: Path) -> None:
    """So does Node's ``ws``, with permessage-deflate offered as it does by default."""
    with node_client(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}", node_modules) as client:
        hold_conversation(client)


def test_curl(gateway: Process) -> None:
    """``curl`` sees over REST what was said over the socket."""
    curl = need_program("curl", "apt-get install curl")
    session_id = uuid.uuid4().hex
    with connected(f"{gateway.socket_url}/api/v1/ws/{session_id}") as client:
        hold_conversation(client)

    def get(path: str, *options: str) -> tuple[int, Message]:
        command = [curl, "-sS", "-w", "\n%{http_code}", *options, gateway.url + path]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        body, _, status = output.rpartition("\n")
        return int(status), json.loads(body)

    assert get("/health")[1]["status"] == "healthy"
    assert get("/health?ready=1")[0] == 200
    assert get("/api/v1/agents")[0] == 401
    status, history = get(f"/api/v1/sessions/{session_id}/history", "-H", KEY)
    assert status == 200
    assert "create hello.py that prints hello" in json.dumps(history)
    assert get(f"/api/v1/agents/{session_id}/current", "-H", KEY)[1]["agent"] == "coder"
    status, missing = get("/api/v1/sessions/nobody-said-anything/history", "-H", KEY)
    assert (status, list(missing)) == (404, ["detail"])
    status, created = get("/api/v1/sessions", "-H", KEY, "-H", "Content-Type: application/json", "-d", "{}")
    assert status in (200, 201), created


class NodeClient:
    """Speaks lines of JSON with the script next to this file."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, message: Message) -> None:
        """See ``Client``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Message:
        """See ``Client``; the script ends by itself when nothing comes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the Node client ended"
        event = json.loads(line)
        assert isinstance(event, dict)
        return event


@contextmanager
def node_client(url: str, node_modules: Path) -> Iterator[NodeClient]:
    """A v1 socket through Node's ``ws``."""
    node = need_program("node", "apt-get install nodejs")
    process = subprocess.Popen(
        [node, str(NODE_CLIENT), str(node_modules / "ws" / "wrapper.mjs"), url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield NodeClient(process)
    finally:
        process.kill()
        process.communicate()
