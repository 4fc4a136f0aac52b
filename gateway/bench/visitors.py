"""Clients of a soak: sessions that come, talk, lose their sockets, resume and go, again and again."""

from __future__ import annotations

import asyncio
import random
import time

from attrs import Factory, define, field

from gateway.bench.emitter import Plan
from gateway.bench.load import cancel, message
from gateway.bench.socket_client import BenchError, SocketClient, connect, upgrade_request

WITHIN_SECONDS = 120.0
"""An upgrade, or an answer longer than its plan, may take so long before it counts as failed: machines that
are soaked for an hour do other things as well."""
_TURNS = (1, 6)
"""Turns of a session, at least and at most."""
_TOKENS = (20, 200)
_CUT_SHARE, _CANCEL_SHARE = 0.3, 0.1
"""How many of the turns lose their socket, and how many are stopped by the user."""
_GOODBYE_SHARE = 0.5
"""How many sockets are closed at the end; of the others the connection just goes."""
_AWAY_SECONDS = (0.0, 0.2, 3.0)
"""How long a socket that was cut stays away: at once, a network that changes, a tunnel."""
_KEPT_REASONS = 5


@define
class Tally:
    """What has happened so far."""

    tokens: int = 0
    turns: int = 0
    sessions: int = 0
    reconnects: int = 0
    failures: int = 0
    reasons: list[str] = Factory(list)
    """Why the first few failed."""

    def failed(self, reason: str) -> None:
        """Count a failure."""
        self.failures += 1
        if len(self.reasons) < _KEPT_REASONS:
            self.reasons.append(reason)


@define
class Visitor:
    """One place in the load: has one session at a time."""

    host: str
    port: int
    path: str
    """With ``%d`` for the session's name."""
    headers: list[str]
    dialects: tuple[str, ...]
    pace: float
    """Seconds from token to token."""
    name: str
    """Unique among the visitors of all loads."""
    randomness: random.Random
    tally: Tally
    latencies: list[int]
    _sessions: int = field(default=0, init=False)

    async def stay(self, until: float) -> None:
        """Have one session after the other until ``time.monotonic()`` is ``until``."""
        while time.monotonic() < until:
            self._sessions += 1
            self.tally.sessions += 1
            session, dialect = f"{self.name}-{self._sessions}", self.randomness.choice(self.dialects)
            try:
                await self._talk(session, dialect, until)
            except TimeoutError:
                self.tally.failed(f"{session} ({dialect}): no answer in time")
            except (BenchError, OSError) as error:
                self.tally.failed(f"{session} ({dialect}): {error!s:.300}")
            else:
                continue
            # Not at once: whatever is wrong would be asked as fast as it can refuse.
            await asyncio.sleep(1.0)

    async def _talk(self, session: str, dialect: str, until: float) -> None:
        client = await self._connect(session, dialect)
        try:
            for turn in range(self.randomness.randint(*_TURNS)):
                if time.monotonic() >= until:
                    break
                client = await self._turn(client, session, dialect, f"{session}-{turn}")
                self.tally.turns += 1
                await asyncio.sleep(self.randomness.random())
        finally:
            if self.randomness.random() < _GOODBYE_SHARE:
                client.leave()
            else:
                client.cut()

    async def _turn(self, client: SocketClient, session: str, dialect: str, message_id: str) -> SocketClient:
        """One turn, whatever happens in it; returns the client that saw its end."""
        plan = Plan(self.randomness.randint(*_TOKENS), self.pace)
        answer = client.ask(message(dialect, plan, message_id))
        fate = self.randomness.random()
        if fate > _CUT_SHARE + _CANCEL_SHARE:
            await self._answered(answer, plan)
            self._count(dialect, plan, client.tokens)
            return client
        # Not in the last quarter: what v1 was sent and had not read when it was cut is lost, the end too.
        await asyncio.sleep(plan.tokens * plan.pace * self.randomness.uniform(0.0, 0.75))
        if fate > _CUT_SHARE:
            client.say(cancel(dialect, f"{message_id}-stop"))
            if dialect == "v1":
                await asyncio.sleep(1.0)  # It is not told of the end; what was on its way has come by then.
            else:
                await self._answered(answer, plan)
            self.tally.tokens += client.tokens
            return client
        if answer.done():
            answer.result()
            self._count(dialect, plan, client.tokens)
            return client
        client.cut()
        seen = client.tokens
        await asyncio.sleep(self.randomness.choice(_AWAY_SECONDS))
        client = await self._connect(session, dialect, client)
        self.tally.reconnects += 1
        await self._answered(client.answered, plan)
        self._count(dialect, plan, seen + client.tokens)
        return client

    async def _answered(self, answer: asyncio.Future[None], plan: Plan) -> None:
        async with asyncio.timeout(plan.tokens * plan.pace + WITHIN_SECONDS):
            await answer

    def _count(self, dialect: str, plan: Plan, tokens: int) -> None:
        """Tokens never come twice; in v2 none is ever missing."""
        self.tally.tokens += tokens
        if tokens > plan.tokens or (tokens < plan.tokens and dialect != "v1"):
            self.tally.failed(f"{dialect}: {tokens} tokens came of {plan.tokens}")

    async def _connect(self, session: str, dialect: str, before: SocketClient | None = None) -> SocketClient:
        query = ""
        if before is not None and before.epoch:
            query = f"?epoch={before.epoch}&last_seq={before.last_seq}"
        path = self.path.replace("%d", session)
        request = upgrade_request(f"{self.host}:{self.port}", path, dialect, self.headers, query)
        return await connect(self.host, self.port, request, dialect, self.latencies, within=WITHIN_SECONDS)
