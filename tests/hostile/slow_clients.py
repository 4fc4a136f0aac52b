"""``python -m tests.hostile.slow_clients``: a thousand connections that are as slow as they can be, at once.

A third never finish their request head, a third never finish a body, a third never read the answer. Meanwhile
a healthy client asks on. Judged are its 99th percentile against before, and how long the slow ones last.
"""

from __future__ import annotations

import argparse
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio
from attrs import define, field

from tests.hostile.servers import Request, answer
from tests.hostile.surroundings import INTERNAL_KEY, Surroundings, open_surroundings

CUT_WITHIN = 10.0
"""Seconds that a slow connection may last."""
ARRIVAL = 0.003
"""Seconds between the arrivals of two of them: a thousand at the very same moment would be another attack."""
SLACK = 1.5
"""Seconds that scheduling of this many clients in one process may add to what is seen."""
LARGE = b"[" + b'"' + b"x" * (512 * 2**10) + b'"' + b"]"
_KEY = f"X-Internal-Auth: {INTERNAL_KEY}\r\n".encode()


@define
class Result:
    """What was seen."""

    quiet: list[float] = field(factory=list)
    """Seconds of each healthy call before …"""
    attacked: list[float] = field(factory=list)
    """… and while the slow ones are there."""
    lasted: dict[str, list[float]] = field(factory=dict)
    """Seconds that the slow ones lasted, by kind."""
    failed: int = 0
    """Healthy calls that failed."""


def percentile_99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


async def agent(request: Request, stream: trio.SocketStream) -> None:
    """A large answer for readers that do not read, a small one for everybody else."""
    await stream.send_all(answer(LARGE if "large" in request.target else b"{}"))


async def _until_closed(stream: trio.SocketStream, dribble: bytes) -> None:
    """Send a byte a second until the other side has enough of it."""
    try:
        while True:
            with trio.move_on_after(1):
                if not await stream.receive_some(4096):
                    return
                continue
            if dribble:
                await stream.send_all(dribble)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def slow_head(stream: trio.SocketStream) -> None:
    """A head that goes on and on."""
    await stream.send_all(b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: ")
    await _until_closed(stream, b"a")


async def slow_body(stream: trio.SocketStream) -> None:
    """A body that goes on and on."""
    head = b"POST /api/v1/sessions HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n"
    await stream.send_all(head + _KEY + b"\r\n{")
    await _until_closed(stream, b" ")


async def slow_reader(stream: trio.SocketStream) -> None:
    """An answer that is not read. What the kernel holds would hide the end: the gateway's side tells."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await stream.send_all(b"GET /api/v1/sessions/large/history HTTP/1.1\r\nHost: a\r\n" + _KEY + b"\r\n")
    await trio.sleep_forever()


KINDS: tuple[Callable[[trio.SocketStream], Awaitable[None]], ...] = (slow_head, slow_body, slow_reader)


async def _one(world: Surroundings, number: int, result: Result) -> None:
    kind = KINDS[number % len(KINDS)]
    stream = await trio.open_tcp_stream("127.0.0.1", world.port)
    started = time.monotonic()
    async with stream:
        with suppress(trio.BrokenResourceError):
            await kind(stream)
    result.lasted.setdefault(kind.__name__, []).append(time.monotonic() - started)


async def _until_cut(world: Surroundings, before: int, result: Result) -> None:
    """Wait until the gateway holds no more connections than before."""
    started = time.monotonic()
    seen = False
    while time.monotonic() < started + 3 * CUT_WITHIN:
        held = world.gateway.open_descriptors() > before + 20
        if seen and not held:
            break
        seen = seen or held
        await trio.sleep(0.1)
    result.lasted["all, as the gateway sees it"] = [time.monotonic() - started]


async def _healthy(world: Surroundings, times: list[float], result: Result) -> None:
    while True:
        started = time.monotonic()
        received = await world.exchange(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        times.append(time.monotonic() - started)
        result.failed += not received.startswith(b"HTTP/1.1 200")
        await trio.sleep(0.02)


async def measure(count: int, quiet_seconds: float) -> Result:
    """Measure with ``count`` slow connections."""
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        async with open_surroundings(
            Path(folder), agent, RATE_REST_PER_MINUTE="0", MAX_CONCURRENT_REQUESTS="1000"
        ) as world:
            with trio.move_on_after(quiet_seconds):
                await _healthy(world, result.quiet, result)
            async with trio.open_nursery() as nursery:
                before = world.gateway.open_descriptors()
                for number in range(count):
                    nursery.start_soon(_one, world, number, result)
                    await trio.sleep(ARRIVAL)
                # Their arrival is work like anybody's; what they cost by staying is the question.
                nursery.start_soon(_healthy, world, result.attacked, result)
                await _until_cut(world, before, result)
                nursery.cancel_scope.cancel()
            if (crashes := await world.crashes()) > 0:
                result.failed += int(crashes)
    return result


def main() -> int:
    """Run as the command line says; 1 when a bound was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.slow_clients", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="slow connections (%(default)s)")
    parser.add_argument("--quiet", type=float, default=10, help="seconds to measure before (%(default)s)")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    result = trio.run(measure, arguments.count, arguments.quiet)
    before, during = percentile_99(result.quiet), percentile_99(result.attacked)
    worst = {kind: max(times) for kind, times in result.lasted.items()}
    compared = f"{before * 1e3:.1f} ms before, {during * 1e3:.1f} ms during ({during / before:.2f} times)"
    lines = [f"healthy p99: {compared}"]
    for kind, seconds in worst.items():
        lines.append(f"{kind}: the longest of {len(result.lasted[kind])} lasted {seconds:.1f} s")
    lines.append(f"{result.failed} healthy calls failed")
    sys.stdout.write("\n".join(lines) + "\n")
    late = [kind for kind, seconds in worst.items() if seconds > CUT_WITHIN + SLACK]
    return int(bool(late) or result.failed > 0 or during > 2 * before)


if __name__ == "__main__":
    sys.exit(main())
