"""The nginx.conf of the deployment, run by Debian's nginx before a real gateway."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from tests.end_to_end.conversation import connected, hold_conversation
from tests.end_to_end.nginx import running_nginx
from tests.end_to_end.processes import Process, running_gateway
from tests.end_to_end.test_conversation import node_client


@pytest.fixture(scope="module")
def proxy(gateway: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``HOST:PORT`` of an nginx before the shared gateway."""
    with running_nginx(tmp_path_factory.mktemp("nginx"), {"gateway:8000": gateway.address}) as address:
        yield address


def test_conversation(proxy: str) -> None:
    """The whole conversation works through it."""
    with connected(f"ws://{proxy}/api/v1/ws/{uuid.uuid4().hex}") as client:
        hold_conversation(client)


def test_conversation_of_node(proxy: str, node_modules: Path) -> None:
    """Also from Node."""
    with node_client(f"ws://{proxy}/ws/{uuid.uuid4().hex}", node_modules) as client:
        hold_conversation(client)


def test_rest(proxy: str) -> None:
    """REST goes through, on one kept connection, with the gateway's own errors."""
    with closing(http.client.HTTPConnection(proxy, timeout=20)) as connection:
        key = {"X-Internal-Auth": "change-me-internal-key"}
        for path, headers, status in (
            ("/health?ready=1", {}, 200),
            ("/api/v1/agents", {}, 401),
            ("/api/v1/agents", key, 200),
            ("/api/v1/sessions/..%2f..%2fadmin/history", key, 400),
            ("/nothing-here", key, 404),
        ):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            assert response.status == status, (path, body)
            assert json.loads(body)


def test_too_large_body_is_answered_by_the_gateway(proxy: str) -> None:
    """A body over the gateway's limit gets its JSON error, not nginx's page."""
    with closing(http.client.HTTPConnection(proxy, timeout=20)) as connection:
        headers = {"X-Internal-Auth": "change-me-internal-key", "Content-Type": "application/json"}
        connection.request("POST", "/api/v1/sessions", body=b" " * (1_048_576 + 1), headers=headers)
        response = connection.getresponse()

        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "MESSAGE_TOO_LARGE"


def test_restart_of_the_gateway(agent: Process, tmp_path: Path) -> None:
    """A gateway that stops closes sockets with 1012 through nginx, and the next one is found at once."""
    with (
        running_gateway(tmp_path, agent.url) as first,
        running_nginx(tmp_path, {"gateway:8000": first.address}) as address,
    ):
        session = f"ws://{address}/api/v1/ws/{uuid.uuid4().hex}"
        with connected(session) as client:
            hold_conversation(client)
            first.end()
            with pytest.raises(ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
        with running_gateway(tmp_path, agent.url, bind=first.address), connected(session) as client:
            hold_conversation(client, agents=[])
