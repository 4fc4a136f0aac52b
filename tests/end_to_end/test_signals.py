"""How the servers stop: asked, asked twice, and with somebody connected."""

from __future__ import annotations

import signal
import sys
import uuid
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from tests.end_to_end.conversation import (
    connected,
    hold_conversation,
)
from tests.end_to_end.processes import Process, running_gateway, started

STOPS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_stop_drains_the_gateway(agent: Process, tmp_path: Path, number: signal.Signals) -> None:
    """Sockets are closed with 1012, the exit code is 0, and nothing of it is a traceback."""
    with running_gateway(tmp_path, agent.url) as gateway:
        with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
            hold_conversation(client)
            gateway.signal(number)
            with pytest.raises(ConnectionClosed) as closed:
                client.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.log
        assert '"event": "drained"' in gateway.log


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["agent", "demo"])
def test_other_servers_stop_cleanly(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """Exit code 0 and no traceback."""
    with started([sys.executable, "-m", "gateway", command, "--bind", "127.0.0.1:0"], tmp_path) as process:
        process.signal(number)
        assert process.wait() == 0
        assert "Traceback" not in process.log
