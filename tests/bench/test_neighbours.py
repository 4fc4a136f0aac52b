"""Clients beside those that are measured, on a real gateway."""

from __future__ import annotations

import os
import socket
import sys
import time

import pytest

from gateway.bench.emitter import Plan
from gateway.bench.neighbour_load import held_connections
from gateway.bench.neighbours import neighbours
from gateway.bench.process_figures import CannotMeasure, open_descriptors
from gateway.bench.scenarios import Neighbours
from gateway.bench.socket_client import BenchError
from gateway.bench.subjects import Running, Subject, gateway_launch, running_emitter, running_launch

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gateway bench is for Linux")


def test_a_connection_is_held_until_its_process_closes_it() -> None:
    """Not until its bytes were read: a client that never reads cannot see it any other way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
        ports = (listener.getsockname()[1], client.getsockname()[1])
        with client:
            with served:
                served.sendall(b"never read")
                assert ports in held_connections()
            assert ports not in held_connections()


def test_descriptors_of_a_process_are_counted_from_outside() -> None:
    """One more with every socket; a process that is not there is a message."""
    before = open_descriptors(os.getpid())
    with socket.socket():
        assert open_descriptors(os.getpid()) == before + 1
    with pytest.raises(CannotMeasure):
        open_descriptors(2**22 - 1)


def test_who_never_reads_is_given_up_and_closed() -> None:
    """Both are seen from outside, and what it cost until then."""
    busy = Plan(5_000, 0.01, 0.0, 16 << 10)
    with running_emitter() as agent_url:
        launch = gateway_launch("memory://", agent_url, {"WS_SEND_TIMEOUT": "0.5", "WS_CLOSE_TIMEOUT": "0.5"})
        subject = Subject("gateway", launch)
        with (
            launch.start() as running,
            neighbours(Neighbours(stalled=2, plan=busy), subject, running) as finish,
        ):
            time.sleep(6)
            found = finish()
    assert found.still_open == 0
    assert len(found.closed_after_s) == 2
    assert found.given_up_after_s is not None
    assert 0.5 <= found.given_up_after_s <= found.closed_after_s[0] + 1
    assert found.kb_per_stalled is not None
    assert found.kb_per_stalled > 100


def test_neighbours_of_nothing_are_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """With the reason on standard error, and no process left."""
    subject = Subject("nobody", running_launch("x", "http://127.0.0.1:1", os.getpid()))
    wanted = Neighbours(readers=1, plan=Plan(3))
    with (
        pytest.raises(BenchError, match="the neighbours on nobody failed"),
        neighbours(wanted, subject, Running("127.0.0.1", 1, os.getpid())),
    ):
        pass
    assert "connect" in capfd.readouterr().err.lower()
