"""What every connection to Redis needs before it is used: is this the right server, and is it fit for use."""

from __future__ import annotations

from typing import cast

from attrs import frozen
from coredis.connection import TCPConnection
from coredis.exceptions import RedisError

from gateway.adapters.stores.redis_keys import Library
from gateway.adapters.stores.redis_location import Topology
from gateway.core.errors import StoreUnavailable

_OLDEST_VERSION = (7, 0)
_WAITAOF_VERSION = (7, 2)


@frozen
class ServerFacts:
    """What is known of a server that is fit for use."""

    run_id: str
    """Of the process: another one after each start."""
    uptime: float
    """Seconds that it has run for, at least."""
    waits_for_disk: bool
    """Whether each commit has to ask for the disk."""


@frozen
class Preparation:
    """Makes fresh connections fit for use."""

    library: Library
    topology: Topology
    full_sync: bool
    """Whether what was acknowledged has to be on the disk."""

    async def prepare(self, connection: TCPConnection) -> ServerFacts:
        """Load the functions. Raises ``StoreUnavailable`` when the server cannot serve a store."""
        info = await _info(connection)
        self._check(info, connection.server_version)
        version = _version(connection.server_version)
        waits_for_disk = self.full_sync and await _must_wait_for_disk(connection, version)
        try:
            await connection.create_request(b"FUNCTION LOAD", self.library.code)
        except RedisError as error:
            if "already exists" not in str(error):
                raise
        return ServerFacts(info["run_id"], float(info["uptime_in_seconds"]), waits_for_disk)

    def _check(self, info: dict[str, str], version: str | None) -> None:
        if info.get("redis_mode", info.get("server_mode")) == "sentinel":
            raise StoreUnavailable(
                "The session store cannot be opened: this is a sentinel and not a Redis with data. Write "
                "STORE_URL as redis+sentinel://HOST:PORT/SERVICE, or name the Redis itself."
            )
        if _version(version) < _OLDEST_VERSION:
            raise StoreUnavailable(f"The session store needs Redis 7.0 or newer; this one is {version}.")
        is_cluster = info.get("cluster_enabled") == "1"
        if is_cluster != (self.topology is Topology.CLUSTER):
            wanted = "redis+cluster://" if is_cluster else "redis:// or redis+sentinel://"
            raise StoreUnavailable(
                f"The session store cannot be opened: this Redis is {'' if is_cluster else 'not '}a node of "
                f"a cluster. Write STORE_URL as {wanted}"
            )
        if info.get("role") != "master":
            raise StoreUnavailable(
                "The session store cannot be opened: this Redis is a replica and takes no writes. Name the "
                "master in STORE_URL, or let sentinels say which it is: redis+sentinel://HOST:PORT/SERVICE"
            )


async def _info(connection: TCPConnection) -> dict[str, str]:
    text = cast("bytes", await connection.create_request(b"INFO", b"server", b"replication", b"cluster"))
    lines = (line.partition(":") for line in text.decode().splitlines())
    return {name: value for name, _, value in lines}


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0").split(".")[:2])


async def _must_wait_for_disk(connection: TCPConnection, version: tuple[int, ...]) -> bool:
    reply = cast("dict[bytes, bytes]", await connection.create_request(b"CONFIG GET", b"append*"))
    if reply.get(b"appendonly") != b"yes":
        raise StoreUnavailable("STORE_SYNC=full needs a Redis that keeps a log: set appendonly yes in it.")
    if reply.get(b"appendfsync") == b"always":
        return False
    if version < _WAITAOF_VERSION:
        raise StoreUnavailable(
            "STORE_SYNC=full needs to know when Redis has written to its disk: set appendfsync always in it, "
            "or use Redis 7.2 or newer, which can be asked (WAITAOF). Or set STORE_SYNC=normal."
        )
    return True
