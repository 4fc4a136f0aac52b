"""Turns cancelled at random moments: nothing is left of them, in the gateway or the agent."""

from __future__ import annotations

import os
import random
import selectors
import threading
import uuid
from pathlib import Path

from tests.end_to_end.conversation import WebsocketsClient, connected, is_final, receive_until, text_of
from tests.end_to_end.processes import Process, eventually, running_agent, running_gateway

TURNS = int(os.environ.get("GATEWAY_TEST_CANCELLED_TURNS", "1000"))
CLIENTS = 8
LATEST_CANCEL = 0.02
"""Seconds after its message; an answer's first token takes the tenth of it."""
ROOM_FOR_MEMORY_KB = 20_000


def test_cancelled_turns_leave_nothing(tmp_path: Path) -> None:
    """Sockets, descriptors and memory are back where they were, and every cancel was answered once."""
    # Events are kept for those who come back; a small window makes growth by anything else visible.
    settings = {"STORE_URL": "memory://", "REPLAY_EVENTS": "50"}
    with (
        running_agent(tmp_path, "--token-delay", "0.002") as agent,
        running_gateway(tmp_path, agent.url, **settings) as gateway,
    ):
        _cancel_turns(gateway, 10 * CLIENTS)
        before = _descriptors(gateway, agent)
        memory = gateway.resident_kilobytes()

        _cancel_turns(gateway, TURNS)

        # Connections that are kept for the next request are let go after a while; none is left over.
        eventually(lambda: _descriptors(gateway, agent) <= before, seconds=15)
        assert gateway.resident_kilobytes() - memory < ROOM_FOR_MEMORY_KB
        assert "Traceback" not in gateway.log + agent.log
        with connected(f"{gateway.socket_url}/api/v1/ws/{uuid.uuid4().hex}") as client:
            client.send({"type": "user_message", "content": "thank you"})
            assert text_of(receive_until(client, is_final)) == "You are welcome."


def _descriptors(*processes: Process) -> int:
    return sum(process.open_descriptors() for process in processes)


def _cancel_turns(gateway: Process, turns: int) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        moments = random.Random(seed)
        try:
            with connected(f"{gateway.socket_url}/api/v1/ws/cancelled-{seed}") as client:
                for _ in range(turns // CLIENTS):
                    _cancel_turn(client, moments.uniform(0, LATEST_CANCEL))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def _cancel_turn(client: WebsocketsClient, moment: float) -> None:
    client.send({"type": "user_message", "content": "count to 100000"})
    with selectors.DefaultSelector() as nothing:
        nothing.select(moment)
    client.send({"type": "cancel"})
    last = receive_until(client, is_final)[-1]
    assert last == {"type": "assistant_message", "token": "", "is_final": True, "outcome": "cancelled"}
