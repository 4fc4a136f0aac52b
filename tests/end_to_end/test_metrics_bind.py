"""``METRICS_BIND``: metrics beside the port that clients connect to."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.processes import Process, eventually, running_gateway, started


def logged(process: Process, event: str) -> dict[str, list[str]] | None:
    """The first log entry of that name."""
    entries = (json.loads(line) for line in process.log.splitlines() if line.startswith("{"))
    return next((entry for entry in entries if entry["event"] == event), None)


def test_metrics_have_an_address_of_their_own(agent: Process, tmp_path: Path) -> None:
    """There without a key, on the main port with it; nothing but metrics is there."""
    with running_gateway(tmp_path, agent.url, METRICS_BIND="127.0.0.1:0") as gateway:
        entry = logged(gateway, "metrics_listening")
        assert entry is not None
        (url,) = entry["urls"]
        with httpx.Client(trust_env=False) as http:
            assert "gateway_sessions_live 0.0" in http.get(f"{url}/metrics").text
            assert http.get(f"{url}/health").status_code == 404
            assert http.get(f"{gateway.url}/metrics").status_code == 401

        assert logged(gateway, "metrics_open_to_other_machines") is None


def test_an_open_address_is_pointed_out(agent: Process, tmp_path: Path) -> None:
    """It is served, and a warning says so; sockets are no more open than before."""
    with running_gateway(tmp_path, agent.url, METRICS_BIND="0.0.0.0:0") as gateway:
        assert logged(gateway, "metrics_open_to_other_machines") is not None


def test_an_address_that_is_taken_is_a_failed_start(agent: Process, tmp_path: Path) -> None:
    """With the address in the message."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(AssertionError, match=f"Cannot listen on {bind}"),
            running_gateway(tmp_path, agent.url, METRICS_BIND=bind),
        ):
            pass


def test_plain_hypercorn_serves_them_too(agent: Process, tmp_path: Path) -> None:
    """By a Unix socket here, as one per worker would be."""
    path = tmp_path / "metrics.sock"
    (tmp_path / "hypercorn.toml").write_text('bind = "127.0.0.1:0"\nworker_class = "trio"\n')
    command = [
        *(sys.executable, "-c"),
        "print('Listening on nothing', flush=True); from hypercorn.__main__ import main; main()",
        *("-c", "hypercorn.toml", "gateway.asgi:app"),
    ]
    settings = {"AGENT_URL": agent.url, "METRICS_BIND": f"unix:{path}"}
    with started(command, tmp_path, settings, name="hypercorn"):
        eventually(path.exists)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
            assert "gateway_sessions_live 0.0" in http.get("http://metrics/metrics").text
