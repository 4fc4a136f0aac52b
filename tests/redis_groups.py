"""Several real Redis servers as one: a master with a replica and sentinels, and a cluster.

Their timeouts are short, so that a failover takes a second and not half a minute.
"""

from __future__ import annotations

import signal
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
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
_SYNC = ("--repl-diskless-sync-delay", "0")
"""A master waits 5 s otherwise, for more replicas to come."""


class Sentinel(RedisServer):
    """One ``redis-server --sentinel``."""

    def __init__(
        self,
        directory: Path,
        master_port: int,
        quorum: int,
        options: Sequence[str] = (),
        ports: Sequence[int] = PORTS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(directory, ports=ports, tls=tls)
        self._config = directory / f"sentinel-{self.port}.conf"
        self._config.write_text(
            f"sentinel monitor {SERVICE} 127.0.0.1 {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_MILLISECONDS}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n" + "".join(f"{option}\n" for option in options)
        )

    def _arguments(self) -> list[str]:
        ports = (
            ["--port", str(self.port)] if self._tls is None else ["--port", "0", "--tls-port", str(self.port)]
        )
        return [str(self._config), "--sentinel", *ports]

    @property
    def master_port(self) -> int:
        """Where it believes the master is."""
        facts = self.ask("INFO sentinel").split(f"name={SERVICE},")[1]
        return int(facts.split("address=127.0.0.1:")[1].split(",")[0])


class SentinelGroup:
    """A master, a replica of it, and three sentinels."""

    def __init__(self, directory: Path) -> None:
        ports = _different_ports()
        self.servers = [RedisServer(directory / name, *_SYNC, ports=[next(ports)]) for name in ("one", "two")]
        for name in ("one", "two"):
            (directory / name).mkdir()
        master, replica = self.servers
        replica.options += ("--replicaof", f"127.0.0.1 {master.port}")
        self.sentinels = [Sentinel(directory, master.port, quorum=2, ports=[next(ports)]) for _ in range(3)]

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

    @property
    def is_settled(self) -> bool:
        """Whether the replica has all that the master wrote, and ran long before anything happens to that.

        One that has not may have been restarted from a copy of any age.
        """
        uptimes = (server.ask("INFO server").split("uptime_in_seconds:")[1] for server in self.servers)
        return self.is_replicated and min(int(uptime.split()[0]) for uptime in uptimes) >= 2

    @property
    def is_replicated(self) -> bool:
        """Whether the replica has all that the master wrote."""
        return _is_replicated(self.master)

    def start(self) -> None:
        """Start all, and return when the sentinels know of each other and of the replica."""
        with _undone_by(self.kill):
            for server in (*self.servers, *self.sentinels):
                server.start()
            for sentinel in self.sentinels:
                # What they do every few seconds otherwise, to find each other.
                assert sentinel.ask("SENTINEL DEBUG info-period 200 publish-period 200") == "+OK"
            for sentinel in self.sentinels:
                wait_until(partial(sentinel.says, "INFO sentinel", "slaves=1,sentinels=3"))
            wait_until(partial(self.servers[1].says, "INFO replication", "master_link_status:up"))

    def ask(self, command: str) -> str:
        """What the master answers."""
        return self.master.ask(command)

    def signal(self, number: signal.Signals) -> None:
        """Send both servers a signal; not the sentinels."""
        for server in self.servers:
            server.signal(number)

    def empty(self) -> None:
        """Drop all data and all functions."""
        self.master.empty()

    def kill(self) -> None:
        """``kill -9`` all."""
        for server in (*self.sentinels, *self.servers):
            server.kill()


class ClusterGroup:
    """Masters that share the slots evenly, and then a replica for each of the first ``replicas``."""

    def __init__(
        self,
        directory: Path,
        masters: int = 3,
        replicas: int = 0,
        *options: str,
        tls: ssl.SSLContext | None = None,
        program: str | None = None,
    ) -> None:
        self.servers: list[RedisServer] = []
        self._directory = directory
        self._options = options
        self._tls = tls
        self._program = program
        self._masters = masters
        self._buses: dict[RedisServer, int] = {}
        self._ports = _different_ports()
        for _ in range(masters + replicas):
            self._make_server()

    def _make_server(self) -> RedisServer:
        directory = self._directory / str(len(self.servers))
        directory.mkdir()
        bus = next(self._ports)
        server = RedisServer(
            directory,
            *("--cluster-enabled", "yes", "--cluster-port", str(bus)),
            *("--cluster-node-timeout", str(2 * _DOWN_MILLISECONDS)),
            *("--cluster-replica-validity-factor", "0"),
            *_SYNC,
            *self._options,
            ports=[next(self._ports)],
            tls=self._tls,
            program=self._program,
        )
        self._buses[server] = bus
        self.servers.append(server)
        return server

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
                    self._meet(server, other)
            for server in self.servers:
                wait_until(partial(self._knows_all, server))
            for number, replica in enumerate(self.servers[self._masters :]):
                assert replica.ask(f"CLUSTER REPLICATE {self.servers[number].ask('CLUSTER MYID')}") == "+OK"
                wait_until(partial(replica.says, "INFO replication", "master_link_status:up"))
            for server in self.servers:
                wait_until(partial(server.says, "CLUSTER INFO", "cluster_state:ok"))

    def add(self) -> RedisServer:
        """One more master, which has no slots yet."""
        new = self._make_server()
        new.start()
        for other in self.servers[:-1]:
            self._meet(new, other)
        for server in self.servers:
            wait_until(partial(self._knows_all, server))
        wait_until(partial(new.says, "CLUSTER INFO", "cluster_state:ok"))
        return new

    def moving(self, slot: int, source: RedisServer, target: RedisServer) -> tuple[Callable[[], None], ...]:
        """The steps of moving a slot: say so, move the keys one by one, say that it is done."""
        ids = [server.ask("CLUSTER MYID") for server in (source, target)]

        def begin() -> None:
            assert target.ask(f"CLUSTER SETSLOT {slot} IMPORTING {ids[0]}") == "+OK"
            assert source.ask(f"CLUSTER SETSLOT {slot} MIGRATING {ids[1]}") == "+OK"

        def move_keys() -> None:
            while key := source.first_key(slot):
                answer = source.ask(f"MIGRATE 127.0.0.1 {target.port} {key} 0 5000")
                assert answer in ("+OK", "+NOKEY"), answer
                time.sleep(0.02)

        def end() -> None:
            for server in (target, source):
                assert server.ask(f"CLUSTER SETSLOT {slot} NODE {ids[1]}") == "+OK"

        return begin, move_keys, end

    def give(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Make a slot another master's, without its keys."""
        target_id = target.ask("CLUSTER MYID")
        assert target.ask(f"CLUSTER SETSLOT {slot} IMPORTING {source.ask('CLUSTER MYID')}") == "+OK"
        assert target.ask(f"CLUSTER SETSLOT {slot} NODE {target_id}") == "+OK"

    def is_replicated(self, master: RedisServer) -> bool:
        """Whether its replica has all that a master wrote."""
        return _is_replicated(master)

    def agree_on(self, master: RedisServer) -> bool:
        """Whether the other masters that run know of one that took over."""
        return all(
            any(
                f":{master.port}@" in line and "master" in line
                for line in server.ask("CLUSTER NODES").splitlines()
            )
            for server in self.servers[1 : self._masters]
        )

    def _meet(self, server: RedisServer, other: RedisServer) -> None:
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
        """What the server answers that has the key in a command; of one about clients, what the last says."""
        name, argument, *_ = command.split()
        if name == "CLIENT":
            return [server.ask(command) for server in self.servers][-1]
        return self.master_of(argument).ask(command)

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


def _is_replicated(master: RedisServer) -> bool:
    facts = master.ask("INFO replication")
    offset = facts.split("master_repl_offset:")[1].split()[0]
    return f"offset={offset}," in facts


def _different_ports() -> Iterator[int]:
    """Ports that are free when they are asked for, each another one: none of them is used at once."""
    given: set[int] = set()
    while True:
        port = free_port(PORTS)
        if port not in given:
            given.add(port)
            yield port


AnyRedis = RedisServer | ClusterGroup | SentinelGroup
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
