"""The real gateway and the real reference Agent Runtime on loopback, inside one Trio run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio
from attrs import frozen

from gateway.app import serve
from gateway.config import load_configuration
from gateway.reference_agent.server import serve_agent
from gateway.reference_agent.settings import AgentSettings


@frozen
class LiveGateway:
    """Where it listens."""

    url: str
    key: str = "change-me-internal-key"

    @property
    def port(self) -> int:
        """The one port."""
        return int(self.url.rpartition(":")[2])

    async def history(self, session_id: str) -> list[dict[str, object]]:
        """What the Agent Runtime remembers of a session."""
        async with httpx.AsyncClient(headers={"X-Internal-Auth": self.key}) as client:
            answer = await client.get(f"{self.url}/api/v1/sessions/{session_id}/history")
            answer.raise_for_status()
            messages = answer.json()["messages"]
            assert isinstance(messages, list)
            return messages


@asynccontextmanager
async def live_gateway(
    store_url: str = "memory://", *, token_delay: float = 0.0, **settings: str
) -> AsyncIterator[LiveGateway]:
    """Serve both inside the block."""
    async with trio.open_nursery() as nursery:
        agent_url = await nursery.start(
            serve_agent, AgentSettings(bind="127.0.0.1:0", token_delay=token_delay)
        )
        configuration = load_configuration(
            {
                "GATEWAY__STORE_URL": store_url,
                "GATEWAY__AGENT_URL": agent_url,
                "GATEWAY__LOG_LEVEL": "ERROR",
                "GATEWAY__RATE_UPGRADES_PER_MINUTE": "0",
                **{f"GATEWAY__{name}": value for name, value in settings.items()},
            },
            bind="127.0.0.1:0",
        )
        stop = trio.Event()

        async def run(*, task_status: trio.TaskStatus[object]) -> None:
            await serve(configuration, announce=lambda _: None, stop=stop, task_status=task_status)
            stopped.set()

        stopped = trio.Event()
        urls = await nursery.start(run)
        yield LiveGateway(urls[0])
        stop.set()
        with trio.move_on_after(5):
            await stopped.wait()
        nursery.cancel_scope.cancel()
