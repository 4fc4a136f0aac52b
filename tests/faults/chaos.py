"""Who kills the gateway, and when: after a random time, or at the very moment something happens."""

from __future__ import annotations

import random
import signal

import trio

from tests.faults.cutting_proxy import CuttingProxy
from tests.faults.gateway_process import GatewayFailed, GatewayProcess
from tests.redis_server import RedisServer

POINTS = ("post", "token", "sent", "ack", "call", "decided", "ended")
"""What a kill may strike at, as clients and runtime see it."""

STOPS = 0.05
"""How often the gateway is told to end, and drains, in place of being killed."""


class Chaos:
    """Kills gateways ``kills`` times, and starts each again, while the proxies cut ``cuts`` connections."""

    def __init__(self, randomness: random.Random, *, kills: int, cuts: int, mean_uptime: float) -> None:
        self._random = randomness
        self._mean_uptime = mean_uptime
        self.kills_wanted = kills
        self.cuts_wanted = cuts
        self.kills = 0
        self.stops = 0
        """Ends by SIGTERM, in between."""
        self.gateways: list[GatewayProcess] = []
        self._victim: GatewayProcess | None = None
        self.redis: RedisServer | None = None
        """Is killed and started again too, where there is one."""
        self.pauses = 0
        """Gateways that were stopped in their tracks for longer than others wait for them."""
        self.redis_kills = 0
        self.redis_link: CuttingProxy | None = None
        """Between the gateways and Redis, where there is one: a network that breaks."""
        self._starting = trio.Lock()
        """A gateway ends when Redis is away as it starts, which is right and not what is looked for here."""
        self._point: str | None = None
        self.killed_at: dict[str, int] = {}

    def notify(self, point: str) -> None:
        """Something happened; a kill may have waited for it."""
        if point == self._point:
            self._point = None
            self._kill(point)

    def _kill(self, why: str) -> None:
        if self._victim is not None and self._victim.kill():
            self.kills += 1
            self.killed_at[why] = self.killed_at.get(why, 0) + 1

    async def run(self, clients: CuttingProxy, agents: CuttingProxy) -> None:
        """Until both numbers are reached; the gateway runs at the end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut_agents, agents)
            nursery.start_soon(self._steer, clients)
            if len(self.gateways) > 1:
                nursery.start_soon(self._pause_some)
            if self.redis is not None:
                nursery.start_soon(self._restart_redis, self.redis)
            if self.redis_link is not None:
                nursery.start_soon(self._cut_redis, self.redis_link)
            while self.kills < self.kills_wanted or clients.cuts < self.cuts_wanted:
                if self._is_behind(clients):
                    await trio.sleep(0.05)
                else:
                    async with self._starting:
                        await self._kill_once()
            nursery.cancel_scope.cancel()
        clients.mean_bytes = agents.mean_bytes = None

    def _is_behind(self, clients: CuttingProxy) -> bool:
        """Whether the cuts have to catch up: kills and cuts are to fall together to the end."""
        if self.kills >= self.kills_wanted:
            return True
        return clients.cuts < self.cuts_wanted * (self.kills / max(1, self.kills_wanted) - 0.05)

    async def _kill_once(self) -> None:
        gateway = self._victim = self._random.choice(self.gateways)
        if self._random.random() < STOPS:
            await gateway.wait_listening()
            await trio.sleep(self._random.expovariate(1 / self._mean_uptime))
            code = await gateway.stop()
            if code != 0:
                raise GatewayFailed(f"SIGTERM ended it with {code}: {gateway.log_tail()}")
            self.stops += 1
            await gateway.begin()
            return
        if self._random.random() < 0.05:
            await trio.sleep(self._random.uniform(0, 0.1))
            self._kill("start")
        else:
            await gateway.wait_listening()
            await trio.sleep(self._random.expovariate(1 / self._mean_uptime))
            if self._random.random() < 0.5:
                self._point = self._random.choice(POINTS)
                with trio.move_on_after(1.0):
                    await gateway.wake.wait()
                self._point = None
            self._kill("time")
        code = await gateway.reap()
        if code != -9:
            raise GatewayFailed(f"It ended by itself with {code}: {gateway.log_tail()}")
        await gateway.begin()

    async def _cut_agents(self, agents: CuttingProxy) -> None:
        """Now and then every connection to the runtime at once, as if it had been killed."""
        while True:
            await trio.sleep(self._random.expovariate(0.5))
            agents.cut_all()

    async def _pause_some(self) -> None:
        """Now and then a gateway that wakes up and finds its sessions with others."""
        while True:
            await trio.sleep(self._random.expovariate(0.4))
            gateway = self._random.choice(self.gateways)
            async with self._starting:
                # One that starts would find Redis too slow to begin with, and end: right, and not looked for.
                await gateway.wait_listening()
                is_paused = gateway.send(signal.SIGSTOP)
            if is_paused:
                self.pauses += 1
                try:
                    await trio.sleep(self._random.uniform(0.2, 1.5))
                finally:
                    gateway.send(signal.SIGCONT)

    async def _restart_redis(self, server: RedisServer) -> None:
        """Now and then it is away for a moment; its log keeps everything."""
        while True:
            await trio.sleep(self._random.expovariate(0.2))
            async with self._starting:
                for gateway in self.gateways:
                    await gateway.wait_listening()
                server.kill()
                self.redis_kills += 1
                try:
                    await trio.sleep(self._random.uniform(0, 1))
                finally:
                    server.start()

    async def _cut_redis(self, link: CuttingProxy) -> None:
        """Now and then every connection to it at once, in the middle of whatever is on its way."""
        while True:
            await trio.sleep(self._random.expovariate(0.4))
            async with self._starting:
                for gateway in self.gateways:
                    await gateway.wait_listening()
                link.cut_all()

    async def _steer(self, clients: CuttingProxy) -> None:
        """Keep the cuts in step with the kills."""
        while True:
            await trio.sleep(0.5)
            done = self.kills / self.kills_wanted if self.kills_wanted else 1.0
            late = clients.cuts < self.cuts_wanted * done
            mean = clients.mean_bytes or 4000.0
            clients.mean_bytes = min(200_000.0, max(600.0, mean * (0.8 if late else 1.25)))
