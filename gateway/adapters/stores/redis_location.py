"""Where a Redis is, read from its URL. Imports no Redis client: a wrong setting is found without one."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from attrs import field, frozen


@frozen
class RedisLocation:
    """What a ``redis://`` or ``rediss://`` URL stands for."""

    host: str
    port: int = 6379
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False


def parse_redis_url(url: str) -> RedisLocation:
    """Understand ``redis[s]://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]``. Raises ``ValueError``.

    User and password are percent-decoded. The error repeats nothing of the URL: it may hold a password.
    """
    form = "STORE_URL is written redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], with rediss:// for TLS"
    try:
        parts = urlsplit(url)
        host, port, database = parts.hostname, parts.port or 6379, parts.path.strip("/")
    except ValueError:
        raise ValueError(form) from None
    if not host or parts.query or parts.fragment or not (database == "" or database.isdecimal()):
        raise ValueError(form)
    return RedisLocation(
        host=host,
        port=port,
        database=int(database or "0"),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme == "rediss",
    )
