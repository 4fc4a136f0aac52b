"""``hypercorn -c hypercorn.toml gateway.asgi:app`` serves REST and sockets too."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from tests.end_to_end.conversation import connected, hold_conversation
from tests.end_to_end.processes import ROOT, STOP_SECONDS, Process, environment, eventually

HYPERCORN = "from hypercorn.__main__ import main; raise SystemExit(main())"
"""The command, wherever its script was installed."""


def test_conversation_and_stop(agent: Process, tmp_path: Path) -> None:
    """The conversation, REST, and a clean stop with 1012, in plain hypercorn."""
    with running_hypercorn(tmp_path, agent.url) as (url, process):
        request = urllib.request.Request(
            f"{url}/api/v1/agents", headers={"X-Internal-Auth": "change-me-internal-key"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.status == 200
        with connected(f"{url.replace('http', 'ws')}/api/v1/ws/{uuid.uuid4().hex}") as client:
            hold_conversation(client)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as closed:
                client.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert process.wait(STOP_SECONDS) == 0
        assert "Traceback" not in (tmp_path / "hypercorn.log").read_text("utf-8")


def test_wrong_configuration_ends_it(tmp_path: Path) -> None:
    """hypercorn does not go on without a gateway: it ends, and all that is said is what is wrong.

    Its exit code is not looked at: hypercorn 0.18 loses that of its only worker.
    """
    command = [sys.executable, "-c", HYPERCORN, "--bind", "127.0.0.1:0", "gateway.asgi:app"]
    ended = subprocess.run(
        [*command, "--worker-class", "trio"],
        cwd=tmp_path,
        env=environment({"LOG_LEVEL": "LOUD"}),
        capture_output=True,
        text=True,
        timeout=STOP_SECONDS,
        check=False,
    )

    assert "GATEWAY__LOG_LEVEL = 'LOUD'" in ended.stderr
    assert "Traceback" not in ended.stderr


@contextmanager
def running_hypercorn(folder: Path, agent_url: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """hypercorn with the repository's configuration, but for the port; its URL and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    toml = (ROOT / "hypercorn.toml").read_text("utf-8")
    assert "127.0.0.1:8000" in toml
    # hypercorn tells the application of a stop only when this is over.
    assert "graceful_timeout = 12" in toml
    toml = toml.replace("127.0.0.1:8000", address).replace("graceful_timeout = 12", "graceful_timeout = 1")
    (folder / "hypercorn.toml").write_text(toml, "utf-8")
    command = [sys.executable, "-c", HYPERCORN, "-c", "hypercorn.toml", "gateway.asgi:app"]
    with (folder / "hypercorn.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment({"AGENT_URL": agent_url}), stdout=log, stderr=log
        )
    url = f"http://{address}"
    try:
        eventually(lambda: process.poll() is not None or _is_healthy(url), seconds=20)
        assert process.poll() is None, (folder / "hypercorn.log").read_text("utf-8")
        yield url, process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
