"""What a gateway says of itself at /metrics, where it may be read."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence

SESSIONS_LIVE = "gateway_sessions_live"
SOCKETS_OPEN = "gateway_sockets_open"
HELD_BYTES = "gateway_replay_held_bytes"
_NAMES = (SESSIONS_LIVE, SOCKETS_OPEN, HELD_BYTES)
_WITHIN_SECONDS = 10.0


def read_gauges(host: str, port: int, headers: Sequence[str] = ()) -> dict[str, float]:
    """The gauges above, each summed over its labels; nothing where /metrics is not there or not for us.

    Blocks for up to 10 s.
    """
    request = urllib.request.Request(f"http://{host}:{port}/metrics")
    for header in headers:
        name, _, value = header.partition(":")
        request.add_header(name.strip(), value.strip())
    try:
        with urllib.request.urlopen(request, timeout=_WITHIN_SECONDS) as answer:
            return parse_gauges(answer.read().decode("utf-8", "replace"))
    except OSError:
        return {}


def parse_gauges(text: str) -> dict[str, float]:
    """The gauges above in Prometheus's text."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition(" ")[0].partition("{")[0]
        if name in _NAMES:
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found
