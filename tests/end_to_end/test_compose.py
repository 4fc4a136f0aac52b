"""The nodes of compose.yaml by hand: its very commands, settings and nginx files, only addresses replaced."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from attrs import frozen
from websockets.exceptions import ConnectionClosed

from tests.end_to_end.conversation import connected, hold_conversation
from tests.end_to_end.nginx import running_nginx
from tests.end_to_end.processes import ROOT, Process, eventually, running_agent, started
from tests.end_to_end.resuming_client import ResumingClient
from tests.redis_server import RedisServer

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
NAMES = ("gateway-1", "gateway-2")
V2 = {"subprotocols": ["codelab.v2.json"]}


@frozen
class Deployment:
    """What ``docker compose --profile nodes up balancer`` starts."""

    address: str
    nodes: dict[str, Process]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """On loopback; the second address of it stands for the network that nginx is in."""
    key = tmp_path / "internal_api_key"
    key.write_text("a-secret-of-this-test\n")
    program, *options = SERVICES["redis"]["command"]
    assert program == "redis-server"
    redis = RedisServer(tmp_path, *options)
    with ExitStack() as stack:
        redis.start()
        stack.callback(redis.kill)
        agent = stack.enter_context(running_agent(tmp_path, "--token-delay", "0.02"))
        nodes = {}
        for name in NAMES:
            given = {
                setting.removeprefix("GATEWAY__"): value.replace("http://agent:8001", agent.url)
                .replace("redis://redis:6379/0", redis.url)
                .replace("/run/secrets/internal_api_key", str(key))
                .replace("172.31.250.0/24", "127.0.0.1")
                for setting, value in SERVICES[name]["environment"].items()
            }
            command = [sys.executable, "-m", "gateway", *SERVICES[name].get("command", ["serve"])]
            folder = tmp_path / name
            folder.mkdir()
            nodes[name] = stack.enter_context(
                started(command, folder, {**given, "BIND": "127.0.0.1:0"}, name=name)
            )
        balancer = SERVICES["balancer"]["volumes"][1].partition(":")[0]
        address = stack.enter_context(
            running_nginx(
                tmp_path,
                {f"{name}:8000": node.address for name, node in nodes.items()},
                ROOT / balancer,
            )
        )
        yield Deployment(address, nodes)


def node_of(deployment: Deployment, session: str) -> str:
    """The node that a session's socket came to."""
    found = [name for name, node in deployment.nodes.items() if f'"session_id": "{session}"' in node.log]
    assert len(found) == 1
    return found[0]


def test_two_nodes_behind_nginx(deployment: Deployment) -> None:
    """Sessions are spread, each stays with its node; one that is killed costs its clients a reconnect."""
    sessions = [uuid.uuid4().hex for _ in range(12)]
    homes = {}
    for session in sessions:
        for _ in range(2):
            with connected(f"ws://{deployment.address}/api/v1/ws/{session}", **V2) as socket:
                assert socket.receive()["type"] == "welcome"
        homes[session] = node_of(deployment, session)
    assert set(homes.values()) == set(NAMES)

    address = f"ws://{deployment.address}"
    clients = [ResumingClient(address, session) for session in sessions if homes[session] == "gateway-1"]
    for client in clients:
        client.start()
    eventually(lambda: all(len(client.events) > 5 for client in clients))
    deployment.nodes["gateway-1"].signal(signal.SIGKILL)
    for client in clients:
        client.join(50)
        client.check()
        assert client.sockets > 1
    for _ in range(4):
        with connected(f"{address}/ws/{uuid.uuid4().hex}", open_timeout=5) as socket:
            hold_conversation(socket)


def test_a_node_that_is_replaced(deployment: Deployment) -> None:
    """SIGTERM: its sockets are closed with 1012, and at once the other serves, REST too."""
    url = f"ws://{deployment.address}/api/v1/ws/{uuid.uuid4().hex}"
    with connected(url) as client:
        hold_conversation(client)
        (home,) = (name for name, node in deployment.nodes.items() if '"socket_opened"' in node.log)
        deployment.nodes[home].signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    with connected(url, open_timeout=5) as client:
        hold_conversation(client, agents=[])
    assert deployment.nodes[home].wait() == 0
    for _ in range(10):
        with urllib.request.urlopen(f"http://{deployment.address}/health?ready=1", timeout=5) as answer:
            assert json.load(answer)["status"] == "healthy"
