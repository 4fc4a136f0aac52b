"""One session from its first message on: its clients talk until all is settled."""

from __future__ import annotations

import random

import trio

from tests.faults.client import Client, World
from tests.faults.client_v1 import V1Client
from tests.faults.client_v2 import V2Client, replay
from tests.faults.records import ClientRecord, SessionRecord
from tests.faults.violations import Violation
from tests.faults.websocket import SocketLost

SETTLE_SECONDS = 60.0
NAPS = 0.1
"""How many sessions are left by all their clients for a while."""
DETACH_GRACE = 4.0
NAP_SECONDS = DETACH_GRACE + 1.0
CASTS: tuple[tuple[str, ...], ...] = (
    ("json", "msgpack", "v1"),
    ("msgpack", "json"),
    ("json", "json", "msgpack"),
    ("json", "v1"),
    ("v1",),
)
"""The dialects of a session's clients. One v1 client at most: v1 cannot say which of two it is."""


class Conversation:
    """Runs one session."""

    def __init__(self, number: int, world: World, seed: int) -> None:
        self._random = random.Random(f"{seed}/{number}")
        self._world = world
        kind = "r" if self._random.random() < 0.6 else "n"
        self.session_id = f"{kind}-{seed}-{number}"
        self.record = SessionRecord(self.session_id)
        self.awake = trio.Event()
        self.awake.set()
        self._clients: list[Client] = []
        for index, dialect in enumerate(self._random.choice(CASTS)):
            client = ClientRecord(f"{dialect}{index}", dialect)  # type: ignore[arg-type]
            self.record.clients.append(client)
            make = V2Client if client.is_v2 else V1Client
            self._clients.append(make(client, self, world, random.Random(self._random.random())))

    @property
    def answerers(self) -> list[str]:
        """Names of the clients among which it is agreed who runs a tool: v2 where there is one."""
        clients = [client for client in self.record.clients if client.is_v2] or self.record.clients
        return [client.name for client in clients]

    async def run(self) -> list[Violation]:
        """Talk until all is settled; the record is complete then. Gives what did not settle."""
        violations: list[Violation] = []
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as talking:
                if self._random.random() < NAPS:
                    talking.start_soon(self._nap)
                for client in self._clients:
                    nursery.start_soon(client.run)
                    talking.start_soon(client.talk, self._random.randint(2, 5), 0.3)
            with trio.move_on_after(SETTLE_SECONDS) as patience:
                await self._settle()
            if patience.cancelled_caught:
                violations.append(Violation("stuck", self.session_id, "session", self._why()))
            nursery.cancel_scope.cancel()
        return violations

    async def _nap(self) -> None:
        """All clients go away for longer than the gateway keeps a session without any in memory."""
        await trio.sleep(self._random.uniform(0.2, 1.5))
        self.awake = trio.Event()
        self.record.napped = True
        for client in self._clients:
            client.drop()
        await trio.sleep(NAP_SECONDS)
        self.awake.set()

    async def _settle(self) -> None:
        settled = False
        while not settled:
            await trio.sleep(0.05)
            settled = await self._is_settled()

    async def _is_settled(self) -> bool:
        if not all(client.is_settled for client in self._clients):
            return False
        try:
            with trio.fail_after(10):
                self.record.final, self.record.audit = await replay(self._world, self.session_id)
        except (SocketLost, trio.TooSlowError):
            return False
        final = self.record.final
        followers = [client for client in self._clients if isinstance(client, V2Client)]
        if final["turn"]["state"] == "running" or (followers and final["pending"]):
            return False
        return all(
            client.is_settled and (not isinstance(client, V2Client) or client.last_seq == final["last_seq"])
            for client in self._clients
        )

    def _why(self) -> str:
        unsettled = [
            f"{client.record.name}: {sent.body}, answers {sent.answers}"
            for client in self._clients
            for sent in client.record.sent.values()
            if not sent.is_settled
        ]
        places = {
            client.record.name: client.last_seq for client in self._clients if isinstance(client, V2Client)
        }
        return f"not settled in {SETTLE_SECONDS:g} s: welcome {self.record.final}, at {places}, {unsettled}"
