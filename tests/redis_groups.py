"""Several real Redis servers as one: a master with a replica and sentinels, and a cluster.

Their timeouts are short, so that a failover takes a second and not half a minute.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.redis_server import RedisServer, free_port

PORTS = range(21000, 21800)
SERVICE = "main"
_DOWN_MILLISECONDS = 500
_SECONDS = 20.0
"""For a group to come up, or to fail over."""
_SLOTS = 16384


class Sentinel(RedisServer):
    """One ``redis-server --sentinel``."""

    def __init__(self, directory: Path, master_port: int, quorum: int) -> None:
        super().__init__(directory, ports=PORTS)
        self._config = directory / f"sentinel-{self.port}.conf"
        self._config.write_text(
            f"sentinel monitor {SERVICE} 127.0.0.1 {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_MILLISECONDS}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )

    def _arguments(self) -> list[str]:
        return [str(self._config), "--sentinel", "--port", str(self.port)]

    @property
    def master_port(self) -> int:
        """Where it believes the master is."""
        facts = self.ask("INFO sentinel").split(f"name={SERVICE},")[1]
        return int(facts.split("address=127.0.0.1:")[1].split(",")[0])


class SentinelGroup:
    """A master, a replica of it, and three sentinels."""

    def __init__(self, directory: Path) -> None:
        self.servers = [RedisServer(directory / name, ports=PORTS) for name in ("one", "two")]
        for name in ("one", "two"):
            (directory / name).mkdir()
        master, replica = self.servers
        replica.options += ("--replicaof", f"127.0.0.1 {master.port}")
        self.sentinels = [Sentinel(directory, master.port, quorum=2) for _ in range(3)]

    @property
    def url(self) -> str:
        """What a gateway's ``STORE_URL`` is."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    @property
    def master(self) -> RedisServer:
        """The server that most sentinels take for the master."""
        ports = sorted(sentinel.master_port for sentinel in self.sentinels)
        return next(server for server in self.servers if server.port == ports[1])

    def start(self) -> None:
        """Start all, and return when the sentinels know of each other and of the replica."""
        with _undone_by(self.kill):
            for server in (*self.servers, *self.sentinels):
                server.start()
            for sentinel in self.sentinels:
                wait_until(partial(sentinel.says, "INFO sentinel", "slaves=1,sentinels=3"))
            wait_until(partial(self.servers[1].says, "INFO replication", "master_link_status:up"))

    def empty(self) -> None:
        """Drop all data and all functions."""
        self.master.empty()

    def kill(self) -> None:
        """``kill -9`` all."""
        for server in (*self.sentinels, *self.servers):
            server.kill()


class ClusterGroup:
    """Masters that share the slots evenly, and then a replica for each of the first ``replicas``."""

    def __init__(self, directory: Path, masters: int = 3, replicas: int = 0, *options: str) -> None:
        self.servers = []
        self._masters = masters
        self._buses: dict[RedisServer, int] = {}
        for number in range(masters + replicas):
            (directory / str(number)).mkdir()
            bus = free_port(PORTS)
            server = RedisServer(
                directory / str(number),
                *("--cluster-enabled", "yes", "--cluster-port", str(bus)),
                *(
                    "--cluster-node-timeout",
                    str(2 * _DOWN_MILLISECONDS),
                    "--cluster-replica-validity-factor",
                    "0",
                ),
                *options,
                ports=PORTS,
            )
            self._buses[server] = bus
            self.servers.append(server)

    @property
    def url(self) -> str:
        """What a gateway's ``STORE_URL`` is: two of the nodes, which know the others."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:2])

    def start(self) -> None:
        """Start all, and return when all agree on who has what."""
        with _undone_by(self.kill):
            for server in self.servers:
                server.start()
            share = -(-_SLOTS // self._masters)
            for number, server in enumerate(self.servers):
                if number < self._masters:
                    last = min(_SLOTS, share * (number + 1)) - 1
                    assert server.ask(f"CLUSTER ADDSLOTSRANGE {share * number} {last}") == "+OK"
                assert server.ask(f"CLUSTER SET-CONFIG-EPOCH {number + 1}") == "+OK"
                for other in self.servers[:number]:
                    self.meet(server, other)
            for server in self.servers:
                wait_until(partial(self._knows_all, server))
            for number, replica in enumerate(self.servers[self._masters :]):
                assert replica.ask(f"CLUSTER REPLICATE {self.servers[number].ask('CLUSTER MYID')}") == "+OK"
                wait_until(partial(replica.says, "INFO replication", "master_link_status:up"))
            for server in self.servers:
                wait_until(partial(server.says, "CLUSTER INFO", "cluster_state:ok"))

    def meet(self, server: RedisServer, other: RedisServer) -> None:
        """Make two nodes know each other."""
        assert server.ask(f"CLUSTER MEET 127.0.0.1 {other.port} {self._buses[other]}") == "+OK"

    def _knows_all(self, server: RedisServer) -> bool:
        lines = server.ask("CLUSTER NODES").splitlines()
        known = sum(" connected" in line and "handshake" not in line for line in lines)
        return known == len(self.servers)

    def master_of(self, key: str) -> RedisServer:
        """The server that has the slot of a key."""
        slot = int(self.servers[0].ask(f"CLUSTER KEYSLOT {key}")[1:])
        for server in self.servers:
            lines = server.ask("CLUSTER NODES").splitlines()
            mine = next(line for line in lines if "myself" in line).split()
            if "master" not in mine[2]:
                continue
            for part in mine[8:]:
                first, _, last = part.partition("-")
                if first.isdecimal() and int(first) <= slot <= int(last or first):
                    return server
        raise AssertionError(f"no server has the slot of {key}")

    def ask(self, command: str) -> str:
        """What the server answers that has the key in a command."""
        return self.master_of(command.split()[1]).ask(command)

    def signal(self, number: signal.Signals) -> None:
        """Send all of them a signal."""
        for server in self.servers:
            server.signal(number)

    def empty(self) -> None:
        """Drop all data and all functions."""
        for server in self.servers[: self._masters]:
            server.empty()

    def kill(self) -> None:
        """``kill -9`` all."""
        for server in self.servers:
            server.kill()


AnyRedis = RedisServer | ClusterGroup
"""What a test can run on either of."""


@contextmanager
def _undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """Undo when the block fails."""
    try:
        yield
    except BaseException:
        undo()
        raise


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask again and again; blocks."""
    end = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)
