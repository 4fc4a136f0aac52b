"""Turn the text of a setting into its value, or say what is wrong with it.

Each function gives a converter: it takes text from the environment, or a value that already has its type
(a default, a test), and raises ``ValueError`` with a sentence that says what is allowed. The text itself is
never part of the message: it may be a secret.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SIZE_UNITS = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_REDIS_CREDENTIALS = r"(?:[^\s/?#]*:[^\s/?#]*@)?"
_REDIS_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@,]+)(?::\d{1,5})?"
_REDIS_URLS = (
    rf"rediss?://{_REDIS_CREDENTIALS}(?P<hosts>{_REDIS_HOST})(?:/\d*/?)?",
    rf"rediss?\+sentinel://{_REDIS_CREDENTIALS}(?P<hosts>{_REDIS_HOST}(?:,{_REDIS_HOST})*)/[^\s/?#]+(?:/\d*/?)?"
    r"(?:\?(?:sentinel_(?:username|password)=[^\s&#]*&?)+)?",
    rf"rediss?\+cluster://{_REDIS_CREDENTIALS}(?P<hosts>{_REDIS_HOST}(?:,{_REDIS_HOST})*)(?:/0*/?)?",
)
"""A server, sentinels and the name of what they watch, nodes of a cluster."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+\Z")


def boolean(value: str | bool) -> bool:
    """Strictly true or false, in the spellings people use."""
    if isinstance(value, bool):
        return value
    text = value.strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError("must be true or false")


def whole(minimum: int, maximum: int = 2**53) -> Callable[[str | int], int]:
    """A whole number within bounds."""

    def convert(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = minimum - 1
        if not minimum <= number <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return number

    return convert


def seconds(minimum: float = 0.001, maximum: float = 86_400 * 30) -> Callable[[str | float], float]:
    """A length of time in seconds, fractions allowed."""

    def convert(value: str | float) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not minimum <= number <= maximum:
            raise ValueError(f"must be a number of seconds from {minimum:g} to {maximum:g}")
        return number

    return convert


def size(minimum: int, maximum: int = 2**40) -> Callable[[str | int], int]:
    """A size in bytes: a whole number, or one with KiB, MiB or GiB."""

    def convert(value: str | int) -> int:
        match = re.fullmatch(r"\s*([0-9]{1,16})\s*([a-zA-Z]*)\s*", str(value))
        unit = _SIZE_UNITS.get(match[2].lower()) if match else None
        number = int(match[1]) * unit if match and unit else -1
        if not minimum <= number <= maximum:
            raise ValueError(f"must be a size from {minimum} to {maximum} bytes, such as 65536 or 64KiB")
        return number

    return convert


def choice(*allowed: str) -> Callable[[str], str]:
    """One of a few words, in any letter case."""

    def convert(value: str) -> str:
        for candidate in allowed:
            if candidate.lower() == value.strip().lower():
                return candidate
        raise ValueError("must be one of " + ", ".join(allowed))

    return convert


def text(value: str) -> str:
    """Printable text that is not empty."""
    if not value.strip() or not value.isprintable():
        raise ValueError("must be printable text and not empty")
    return value.strip()


def header_secret(value: str) -> str:
    """A secret that can be sent as a header: visible ASCII without spaces (RFC 9110 section 5.5)."""
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", value):
        raise ValueError("must be 1 to 4096 visible ASCII characters without spaces")
    return value


def http_url(value: str) -> str:
    """An http or https base URL, given back without a trailing slash."""
    problem = "must be http://HOST[:PORT] or https://…, without user name, query or fragment"
    try:
        parts = urlsplit(value.strip())
        port = parts.port
    except ValueError:
        raise ValueError(problem) from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or port == 0
        or parts.query
        or parts.fragment
        or not re.fullmatch(r"[\x21-\x7e]+", value.strip())
    ):
        raise ValueError(problem)
    return value.strip().rstrip("/")


def store_url(value: str) -> str:
    """Where sessions are kept."""
    stripped = value.strip()
    if stripped == "memory://" or re.match(r"(sqlite:///[^/\s]|sqlite:////\S)", stripped):
        return stripped
    if any(_is_redis_url(form, stripped) for form in _REDIS_URLS):
        return stripped
    raise ValueError(
        "must be memory://, sqlite:///FILE (sqlite:////FILE from the root), "
        "redis://[[USER]:PASSWORD@]HOST[:PORT][/N], "
        "redis+sentinel://[[USER]:PASSWORD@]SENTINEL[:PORT],…/SERVICE[/N] or "
        "redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],…; with rediss in place of redis for TLS"
    )


def _is_redis_url(form: str, text: str) -> bool:
    match = re.fullmatch(form, text)
    return match is not None and all(
        0 < int(port) < 65536 for port in re.findall(r":(\d+)(?=,|\Z)", match["hosts"])
    )


def words(*allowed: str) -> Callable[[str | tuple[str, ...]], tuple[str, ...]]:
    """A list, separated by commas, of at least one of a few words."""

    def convert(value: str | tuple[str, ...]) -> tuple[str, ...]:
        items = _items(value)
        if not items or not set(items) <= set(allowed):
            raise ValueError("must be one or more, separated by commas, of " + ", ".join(allowed))
        return items

    return convert


def origins(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Browser origins (RFC 6454), separated by commas; empty allows none. No wildcard."""
    items = tuple(item.lower().rstrip("/") for item in _items(value))
    if not all(_ORIGIN.match(item) for item in items):
        raise ValueError("must be origins separated by commas, such as https://ide.example; * is not one")
    return items


def networks(value: str | tuple[Network, ...]) -> tuple[Network, ...]:
    """IP addresses and networks, separated by commas."""
    if isinstance(value, tuple):
        return value
    try:
        return tuple(ipaddress.ip_network(item) for item in _items(value))
    except ValueError:
        raise ValueError(
            "must be IP addresses or networks separated by commas, such as 10.0.0.0/8,::1"
        ) from None


def binds(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Addresses to listen on, separated by commas; empty leaves them to ``hypercorn.toml``."""
    items = _items(value)
    for item in items:
        check_bind(item)
    return items


def check_bind(bind: str) -> None:
    """Raise ``ValueError`` unless ``bind`` is HOST:PORT, [IPv6]:PORT, unix:PATH or fd://N."""
    if re.fullmatch(r"unix:\S+|fd://\d+", bind):
        return
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", bind)
    if not match or int(match[2]) > 65_535:
        raise ValueError("must be HOST:PORT, [IPv6]:PORT or unix:PATH; port 0 takes any free port")


def is_loopback_bind(bind: str) -> bool:
    """Whether only this machine can reach ``bind``. What cannot be told counts as reachable."""
    if bind.startswith("unix:"):
        return True
    host = bind.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _items(value: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, tuple):
        return value
    return tuple(item.strip() for item in value.split(",") if item.strip())
