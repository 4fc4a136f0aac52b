"""``gateway serve --workers`` on a real Redis: one port, several processes, any of which may be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from tests.end_to_end.conversation import (
    WebsocketsClient,
    connected,
    hold_conversation,
    receive_rest,
    receive_until,
)
from tests.end_to_end.processes import Process, environment, eventually, running_agent, running_gateway
from tests.end_to_end.resuming_client import ResumingClient
from tests.redis_server import RedisServer

KEY = {"X-Internal-Auth": "change-me-internal-key"}
V2 = {"subprotocols": ["codelab.v2.json"]}
ALL_UP = {"1": 1.0, "2": 1.0}


@pytest.fixture(scope="module")
def unhurried_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """An agent that takes 20 ms for a token, so that there is a middle to kill something in."""
    with running_agent(tmp_path_factory.mktemp("agent"), "--token-delay", "0.02") as process:
        yield process


@contextmanager
def two_workers(agent: Process, redis: RedisServer, folder: Path) -> Iterator[Process]:
    """A gateway of two workers."""
    settings = {"WORKERS": "2", "STORE_URL": redis.url, "NODE_LEASE": "1", "DRAIN_TIMEOUT": "3"}
    settings["METRICS_BIND"] = "127.0.0.1:0"
    with running_gateway(folder, agent.url, **settings) as process:
        yield process


@pytest.fixture(scope="module")
def gateway(
    unhurried_agent: Process, shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """For all tests after which both workers are there again."""
    with two_workers(unhurried_agent, shared_redis, tmp_path_factory.mktemp("gateway")) as process:
        yield process


@pytest.fixture
def doomed(unhurried_agent: Process, shared_redis: RedisServer, tmp_path: Path) -> Iterator[Process]:
    """For tests that end it."""
    with two_workers(unhurried_agent, shared_redis, tmp_path) as process:
        yield process


def ask(url: str, method: str = "GET") -> bytes:
    """The body of an answer, over a connection of its own: any worker may give it."""
    request = urllib.request.Request(url, method=method, headers=KEY)
    with urllib.request.urlopen(request, timeout=10) as response:
        body = response.read()
        assert isinstance(body, bytes)
        return body


def series(gateway: Process, name: str) -> dict[str, float]:
    """One metric by worker."""
    page = ask(f"{gateway.url}/metrics").decode()
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


def pids(gateway: Process) -> dict[int, int]:
    """The process id of each worker that was started last in its place."""
    found = re.findall(r'"worker_started", "worker": (\d+), "pid": (\d+)', gateway.log)
    return {int(number): int(pid) for number, pid in found}


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_costs_nobody_anything(gateway: Process) -> None:
    """Under load: its clients resume at the others, its turns go on, and another takes its place."""
    clients = [ResumingClient(gateway.socket_url) for _ in range(24)]
    for client in clients:
        client.start()
    eventually(lambda: sum(len(client.events) > 5 for client in clients) == len(clients), seconds=20)
    before = pids(gateway)
    os.kill(before[2], signal.SIGKILL)
    for client in clients:
        client.join(50)
        client.check()
    assert sum(client.sockets for client in clients) > len(clients)

    eventually(lambda: series(gateway, "gateway_worker_up") == ALL_UP, seconds=20)
    after = pids(gateway)
    assert after[2] != before[2]
    assert after[1] == before[1]
    assert '"event": "worker_ended", "worker": 2, "exit_code": -9' in gateway.log
    with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as socket:
        hold_conversation(socket)


def test_every_worker_is_a_node_and_metrics_are_of_all(gateway: Process) -> None:
    """Whichever is asked; sockets are spread over all, and so are what they say in the log."""
    nodes = re.findall(r'"several_nodes", "worker": (\d), "node": "(\w+)"', gateway.log)
    assert {number for number, _ in nodes} == {"1", "2"}
    assert len({node for _, node in nodes}) == len(nodes)
    groups = {os.getpgid(pid) for pid in (gateway.pid, *pids(gateway).values())}
    assert len(groups) == 3, "Ctrl-C is for the supervisor"

    sockets = []
    for _ in range(60):
        opened = connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}")
        opened.__enter__()
        sockets.append(opened)
    for _ in range(6):
        found = series(gateway, "gateway_sockets_open")
        assert sum(found.values()) == 60
        assert min(found[number] for number in "12") > 7
        assert len(series(gateway, "process_cpu_seconds_total")) == 3
        assert set(series(gateway, "gateway_sessions_live")) == {"1", "2"}
    for opened in sockets:
        opened.__exit__(None, None, None)


def test_metrics_have_an_address_of_their_own(gateway: Process) -> None:
    """One for all workers, and each answers for all there too."""
    addresses = set(re.findall(r'"metrics_listening", "worker": \d, "urls": \["([^"]*)"\]', gateway.log))
    assert len(addresses) == 1
    for _ in range(4):
        with urllib.request.urlopen(f"{next(iter(addresses))}/metrics", timeout=10) as answer:
            page = answer.read()
        assert b'gateway_info{worker="1",' in page
        assert b'gateway_info{worker="2",' in page


def test_a_worker_shows_nothing_of_the_settings(gateway: Process) -> None:
    """Neither in its environment nor on its command line, which other programs of the user can read."""
    for pid in pids(gateway).values():
        for name in ("environ", "cmdline"):
            assert b"GATEWAY__" not in Path(f"/proc/{pid}/{name}").read_bytes()
            assert b"redis://" not in Path(f"/proc/{pid}/{name}").read_bytes()


def test_the_dashboard_finds_a_session_wherever_it_runs(gateway: Process) -> None:
    """To look at it and to close it, whichever worker is asked."""
    session = uuid.uuid4().hex
    with connected(f"{gateway.socket_url}/api/v1/ws/{session}", **V2) as client:
        client.receive()
        for _ in range(8):
            assert b'"session_opened"' not in (shown := ask(f"{gateway.url}/dashboard/sessions/{session}"))
            assert f'"session_id":"{session}"'.encode() in shown
        assert b'"closed":true' in ask(f"{gateway.url}/dashboard/sessions/{session}/close", "POST")
        with pytest.raises(ConnectionClosed) as closed:
            receive_until(client, lambda _: False)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000


def test_a_stop_drains_all(doomed: Process) -> None:
    """Every socket is told and closed with 1012 within the drain timeout, and no process is left."""
    sockets: list[Any] = [
        connected(f"{doomed.socket_url}/api/v1/ws/{uuid.uuid4().hex}", **V2) for _ in range(12)
    ]
    clients: list[WebsocketsClient] = [socket.__enter__() for socket in sockets]
    for client in clients:
        client.receive()
    workers = pids(doomed)
    started = time.monotonic()
    doomed.signal(signal.SIGTERM)
    told = [receive_rest(client) for client in clients]
    took = time.monotonic() - started
    codes = [client.connection.close_code for client in clients]
    for socket in sockets:
        socket.__exit__(None, None, None)

    assert codes == [1012] * 12
    assert {events[-1]["type"] for events in told} == {"draining"}
    assert took < 3.5
    assert doomed.wait() == 0
    assert not any(is_alive(pid) for pid in workers.values())
    assert doomed.log.count('"event": "drained"') == 2
    assert "Traceback" not in doomed.log


def test_workers_do_not_outlive_their_supervisor(doomed: Process) -> None:
    """Killed itself, it cannot stop them: they drain and end, and the port is free."""
    workers = pids(doomed)
    with connected(f"{doomed.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
        doomed.signal(signal.SIGKILL)
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    eventually(lambda: not any(is_alive(pid) for pid in workers.values()), seconds=15)


def test_one_worker_is_replaced_when_asked_to_stop(gateway: Process) -> None:
    """SIGTERM to a worker drains it alone; meanwhile the others answer, and no connection waits for it."""
    before = pids(gateway)
    os.kill(before[1], signal.SIGTERM)
    eventually(lambda: '"event": "stopped", "worker": 1' in gateway.log)
    for _ in range(20):
        asked = time.monotonic()
        assert b"healthy" in ask(f"{gateway.url}/health")
        assert time.monotonic() - asked < 1
    eventually(lambda: pids(gateway)[1] != before[1], seconds=15)
    eventually(lambda: series(gateway, "gateway_worker_up") == ALL_UP, seconds=20)


def refused(folder: Path, **settings: str) -> tuple[int, str]:
    """The exit code of a start that fails, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--workers", "3", "--bind", "127.0.0.1:0"],
        cwd=folder,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def test_refuses_without_redis(tmp_path: Path) -> None:
    """Nothing is started, and the reason and the remedy are said."""
    code, said = refused(tmp_path)

    assert code == 78
    assert "GATEWAY__WORKERS = 3: needs Redis" in said
    assert "GATEWAY__STORE_URL=redis://HOST:PORT/0" in said
    assert len(said.splitlines()) == 2


def test_says_once_that_redis_is_away(tmp_path: Path) -> None:
    """The first worker says it, and its exit code is the supervisor's."""
    code, said = refused(tmp_path, STORE_URL="redis://127.0.0.1:1/0")

    assert code == 1
    assert len([line for line in said.splitlines() if line.startswith("gateway: ")]) == 1
    assert "Traceback" not in said
