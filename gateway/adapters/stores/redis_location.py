"""Where a Redis is, read from its URL. Imports no Redis client: a wrong setting is found without one."""

from __future__ import annotations

import re
from enum import Enum
from urllib.parse import parse_qsl, unquote

from attrs import field, frozen

_CREDENTIALS = "[[USER]:PASSWORD@]"
_FORMS = {
    "redis": f"redis://{_CREDENTIALS}HOST[:PORT][/DATABASE]",
    "redis+sentinel": f"redis+sentinel://{_CREDENTIALS}SENTINEL[:PORT],…/SERVICE[/DATABASE]"
    "[?sentinel_username=USER&sentinel_password=PASSWORD]",
    "redis+cluster": f"redis+cluster://{_CREDENTIALS}HOST[:PORT],…",
}
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@,]+)(?::(?P<port>\d{1,5}))?\Z")


class Topology(Enum):
    """How the servers of a Redis belong together."""

    SERVER = "redis"
    """One server, or one address behind which somebody else looks after several."""
    SENTINEL = "redis+sentinel"
    """A master with replicas; sentinels say which one is the master."""
    CLUSTER = "redis+cluster"
    """Several masters, each with its share of the hash slots."""


@frozen
class RedisAddress:
    """One server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@frozen
class RedisLocation:
    """What a ``STORE_URL`` of Redis stands for."""

    addresses: tuple[RedisAddress, ...]
    """The server; or the sentinels; or some nodes of the cluster, which know the others."""
    topology: Topology = Topology.SERVER
    service: str = ""
    """What the sentinels call the master."""
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False


def is_redis_scheme(scheme: str) -> bool:
    """Whether URLs of that scheme are for ``parse_redis_url``."""
    return scheme.replace("rediss", "redis", 1) in _FORMS


def parse_redis_url(url: str) -> RedisLocation:
    """Understand a URL of Redis; see ``_FORMS``. Raises ``ValueError`` with how it is written.

    User, password and service are percent-decoded. The error repeats nothing of the URL: it may hold a
    password.
    """
    scheme, _, rest = url.partition("://")
    plain_scheme = scheme.replace("rediss", "redis", 1)
    topology = Topology(plain_scheme)
    wrong = ValueError(f"STORE_URL is written {_FORMS[plain_scheme]}, with {_with_tls(plain_scheme)} for TLS")
    if "#" in rest:
        raise wrong
    rest, has_options, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    username, colon, password = credentials.partition(":")
    if at and not colon:
        raise wrong
    is_sentinel = topology is Topology.SENTINEL
    options = dict(parse_qsl(query, keep_blank_values=True))
    if has_options and not (is_sentinel and options.keys() <= {"sentinel_username", "sentinel_password"}):
        raise wrong
    service, _, database = path.partition("/") if is_sentinel else ("", "", path)
    database = database.rstrip("/")
    if (is_sentinel and not service) or not (database == "" or database.isdecimal()):
        raise wrong
    addresses = _addresses(hosts, 26379 if is_sentinel else 6379)
    if not addresses or (len(addresses) > 1 and topology is Topology.SERVER):
        raise wrong
    if topology is Topology.CLUSTER and database.strip("0"):
        raise ValueError("STORE_URL names a database, and a Redis Cluster has only database 0: leave it out")
    return RedisLocation(
        addresses=addresses,
        topology=topology,
        service=unquote(service),
        database=int(database or "0"),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_username=options.get("sentinel_username") or None,
        sentinel_password=options.get("sentinel_password") or None,
        tls=scheme != plain_scheme,
    )


def _with_tls(scheme: str) -> str:
    return scheme.replace("redis", "rediss", 1) + "://"


def _addresses(hosts: str, default_port: int) -> tuple[RedisAddress, ...]:
    """The addresses in a list; none when one of them is wrong."""
    addresses = []
    for text in hosts.split(","):
        found = _HOST.match(text)
        port = int((found and found["port"]) or default_port)
        if found is None or not 0 < port < 65536:
            return ()
        addresses.append(RedisAddress(found["host"].strip("[]"), port))
    return tuple(addresses)
