"""Traces from a client's ``traceparent`` to the collector and the Agent Runtime: real processes and OTLP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.bad_agent import STREAM, event
from tests.end_to_end.conversation import connected, hold_conversation, is_final, receive_until
from tests.end_to_end.processes import ROOT, Process, environment, eventually, running_gateway
from tests.otlp_collector import Collector, collecting
from tests.tracing_fake import CALLER

TRACE = CALLER.traceparent.split("-")[1]
HEADERS = {"traceparent": CALLER.traceparent, "tracestate": CALLER.tracestate}
KEY = {"X-Internal-Auth": "change-me-internal-key"}


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that gateways are told of."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ide")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield collector


@pytest.fixture
def recording_agent() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A runtime that says one word, and the header fields that it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer."""
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(STREAM + event("Hello.", final=True))

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def test_turns_and_calls_are_exported_in_the_caller_s_trace(
    agent: Process, exporting: Collector, tmp_path: Path
) -> None:
    """A conversation of three POSTs is three spans; a REST call one; nothing that was said is in them."""
    with running_gateway(tmp_path, agent.url, TRACES="otlp") as gateway:
        with connected(f"{gateway.socket_url}/ws/traced", additional_headers=HEADERS) as client:
            hold_conversation(client)
        with httpx.Client(trust_env=False) as http:
            history = http.get(f"{gateway.url}/api/v1/sessions/traced/history", headers={**KEY, **HEADERS})
            assert history.status_code == 200
            http.get(f"{gateway.url}/health")
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        logged = [json.loads(line) for line in gateway.log.splitlines()]

    turns = exporting.named("turn")
    assert [turn.attributes["gateway.turn.outcome"] for turn in turns] == ["completed"] * 3
    assert {turn.attributes["session.id"] for turn in turns} == {"traced"}
    assert [turn.events for turn in turns] == [["first_token", "tool_call"], [], ["first_token"]]
    (call,) = exporting.named("GET /api/v1/sessions/<session_id>/history")
    assert call.attributes["http.response.status_code"] == 200
    assert len(exporting.spans) == 4
    for span in exporting.spans:
        assert (span.trace_id, span.parent) == (TRACE, CALLER.traceparent.split("-")[2])
        assert span.resource["service.name"] == "codelab-gateway"
        assert not span.is_error
    assert {headers["x-tenant"] for headers in exporting.headers} == {"ide"}
    for secret in (b"hello.py", b"change-me-internal-key", b"Done:"):
        assert all(secret not in raw for raw in exporting.raw)
    spans = {entry["span_id"] for entry in logged if entry["event"] in ("turn_started", "rest_request")}
    assert spans >= {span.span_id for span in exporting.spans}


def test_the_runtime_gets_the_span_and_the_rest_goes_on_without_it(
    exporting: Collector, tmp_path: Path, recording_agent: tuple[str, list[dict[str, str]]]
) -> None:
    """With traces on its parent is the turn's span; with traces off, the caller's own."""
    url, seen = recording_agent
    for traces in ("otlp", "off"):
        with running_gateway(tmp_path, url, TRACES=traces, STORE_URL="memory://") as gateway:
            with connected(f"{gateway.socket_url}/ws/s", additional_headers=HEADERS) as client:
                client.send({"type": "user_message", "content": "hi"})
                receive_until(client, is_final)
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0

    (turn,) = exporting.named("turn")
    assert [head["traceparent"] for head in seen] == [f"00-{TRACE}-{turn.span_id}-01", CALLER.traceparent]
    assert [head["tracestate"] for head in seen] == [CALLER.tracestate] * 2


def test_a_collector_that_is_away_costs_nobody_anything(
    agent: Process, exporting: Collector, tmp_path: Path
) -> None:
    """Turns go on, it is reported once and not at every try, and the stop is not held up."""
    exporting.status = 503
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "10"
    try:
        with running_gateway(tmp_path, agent.url, TRACES="otlp") as gateway:
            for session in ("a", "b"):
                with connected(f"{gateway.socket_url}/ws/{session}") as client:
                    hold_conversation(client)
                asked = exporting.asked
                eventually(lambda asked=asked: exporting.asked > asked)
            eventually(lambda: exporting.asked > 2)
            began = time.monotonic()
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0
            took = time.monotonic() - began
            warned = [json.loads(line) for line in gateway.log.splitlines() if '"warning"' in line]
    finally:
        del os.environ["OTEL_BSP_SCHEDULE_DELAY"]

    transient = [entry for entry in warned if entry["event"].startswith("Transient error")]
    assert len(transient) == 1
    assert took < 10


def test_off_imports_nothing_of_it() -> None:
    """Neither the SDK nor the exporter, nor what they bring; the default is off."""
    program = (
        "import sys, trio\n"
        "from gateway import app\n"
        "from gateway.config import load_configuration\n"
        "async def main():\n"
        "    configuration = load_configuration({'GATEWAY__STORE_URL': 'memory://'}, dotenv=None)\n"
        "    async with app.open_gateway(configuration, app.make_telemetry(configuration.settings)):\n"
        "        print([name for name in sys.modules if name.startswith(('opentelemetry', 'requests'))])\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_the_packages_it_is_a_problem_of_the_configuration(tmp_path: Path) -> None:
    """Which names what to install."""
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from gateway.cli import main\n"
        "sys.exit(main(['check-config']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment({"TRACES": "otlp"}),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 78
    assert "GATEWAY__TRACES = otlp" in done.stderr
    assert "pip install 'codelab-gateway[otel]'" in done.stderr
