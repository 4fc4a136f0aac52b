"""Under a load, three counts agree: the load's own, ``/metrics``, and what the dashboard is sent.

The load's own count is ``gateway bench``'s, and, for what that does not count, that of a proxy between it and
the gateway, which knows nothing but the wire. Nothing here depends on how long anything takes.
"""

from __future__ import annotations

import bisect
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from attrs import define
from prometheus_client.parser import text_string_to_metric_families
from trio_websocket import WebSocketConnection, open_websocket_url

from gateway.bench.emitter import Plan
from gateway.bench.load import Measurement
from gateway.bench.runner import Runner
from gateway.bench.scenarios import Step
from gateway.bench.subjects import Running, Subject, running_launch
from gateway.core.metrics import METRICS
from tests.counting_proxy import CountingProxy, Object
from tests.end_to_end.processes import Process, running_gateway, started
from tests.end_to_end.test_metrics_bind import logged

SESSIONS, TOKENS = 4, 150
STREAM = Step(scenario="stream", kind="stream", sessions=SESSIONS, tokens=TOKENS, pace=0.002)
BURST = Step(scenario="burst", kind="stream", sessions=SESSIONS, tokens=2_000)
RESUME = Step(scenario="resume", kind="resume", sessions=SESSIONS, tokens=TOKENS)
KEY = {"X-Internal-Auth": "change-me-internal-key"}
SHOWN_TOTALS = {
    "tokens": "gateway_tokens_total",
    "frames_sent": "gateway_socket_frames_sent_total",
    "bytes_sent": "gateway_socket_bytes_sent_total",
    "bytes_received": "gateway_socket_bytes_received_total",
}
"""The dashboard's totals, by the metric of each."""
ADDED = ("gateway_event_added_seconds", "gateway_first_event_added_seconds")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gateway bench is for Linux")


@define
class Figures:
    """What the gateway says of itself, at one time and in both places."""

    metrics: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    samples: list[dict[str, Any]]
    """Of the dashboard, all since the process began, oldest first."""
    sessions: dict[str, dict[str, Any]]
    found: int
    troubles: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The dashboard's newest sample."""
        return self.samples[-1]

    def metric(self, name: str, **labels: str) -> float:
        """One series; 0 when it is not there yet."""
        return self.metrics.get((name, tuple(sorted(labels.items()))), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """A metric by the values of its one label, without those that are 0."""
        return {
            dict(labels)[label]: value for (found, labels), value in self.metrics.items()
            if found == name and value
        }  # fmt: skip

    def buckets(self, *names: str) -> tuple[list[float], list[float]]:
        """Upper bounds, and how many observations each bucket holds, of histograms with the same bounds."""
        (bounds,) = {metric.buckets for metric in METRICS if metric.name in names}
        edges = [*map(str, bounds), "+Inf"]
        totals = [sum(self.metric(f"{name}_bucket", le=edge) for name in names) for edge in edges]
        counts = [after - before for before, after in zip([0.0, *totals], totals, strict=False)]
        return [*bounds, float("inf")], counts


@define
class Subjects:
    """Everything that runs."""

    emitter: Process
    gateway: Process
    metrics_url: str
    proxy: CountingProxy
    http: httpx.Client

    async def figures(self) -> Figures:
        """Both, when they agree: the dashboard is told once a second. After some seconds, as they are."""
        deadline = trio.current_time() + 5
        while True:
            metrics = await trio.to_thread.run_sync(self._metrics)
            pulse = await trio.to_thread.run_sync(self._pulse)
            figures = Figures(
                metrics,
                [dict(zip(pulse["columns"], row, strict=True)) for row in pulse["samples"]],
                {session["session_id"]: session for session in pulse["sessions"]},
                pulse["found"],
                pulse["troubles"],
            )
            shown = figures.samples[-1] if figures.samples else {}
            agrees = all(shown.get(name) == figures.metric(metric) for name, metric in SHOWN_TOTALS.items())
            if (agrees and shown["sockets"] == self.proxy.open) or trio.current_time() > deadline:
                return figures
            await trio.sleep(0.2)

    def _metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = self.http.get(f"{self.metrics_url}/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def _pulse(self) -> Any:
        with self.http.stream("GET", f"{self.gateway.url}/dashboard/events", headers=KEY) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    return json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without a pulse")

    async def bench(self, step: Step, dialect: str, name: str) -> Measurement:
        """One load of ``gateway bench``, in its process, through the proxy."""
        url = f"http://127.0.0.1:{self.proxy.port}"
        launch = running_launch("gateway", url, self.gateway.pid)
        subject = Subject("gateway", launch, dialect=dialect, path=f"/api/v1/ws/{name}-%d")
        running = Running("127.0.0.1", self.proxy.port, self.gateway.pid)
        return await trio.to_thread.run_sync(Runner(lambda _: None).load, step, subject, running)


@pytest.fixture
async def subjects(tmp_path: Path) -> AsyncIterator[Subjects]:
    """A gateway on SQLite between the bench's emitter and a counting proxy."""
    async with AsyncExitStack() as stack:
        command = [sys.executable, "-m", "gateway.bench.emitter"]
        emitter = stack.enter_context(started(command, tmp_path, name="emitter"))
        gateway = stack.enter_context(running_gateway(tmp_path, emitter.url, METRICS_BIND="127.0.0.1:0"))
        proxy = CountingProxy(int(gateway.url.rpartition(":")[2]))
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(proxy.run)
        entry = logged(gateway, "metrics_listening")
        assert entry is not None
        http = stack.enter_context(httpx.Client(trust_env=False, timeout=20))
        yield Subjects(emitter, gateway, entry["urls"][0], proxy, http)
        nursery.cancel_scope.cancel()


def tokens_in(objects: Sequence[Object]) -> int:
    """Tokens, those that came merged into one event counted one by one."""
    return sum(
        item["seq"] - item.get("first_seq", item["seq"]) + 1 if "seq" in item else 1
        for item in objects
        if item["type"] == "assistant_message" and "outcome" not in item
    )


def assert_the_wire_agrees(figures: Figures, proxy: CountingProxy) -> None:
    """What can be counted on the wire is what both places say."""
    received = proxy.up.types()
    acks = received.pop("ack", 0)
    assert (
        figures.metric("gateway_socket_frames_sent_total") == figures.last["frames_sent"] == proxy.down.frames
    )
    assert figures.metric("gateway_socket_bytes_sent_total") == figures.last["bytes_sent"] == proxy.down.size
    assert figures.metric("gateway_socket_frames_received_total") == proxy.up.frames
    assert (
        figures.metric("gateway_socket_bytes_received_total")
        == figures.last["bytes_received"]
        == proxy.up.size
    )
    assert figures.metric("gateway_acks_received_total") == acks
    assert figures.by("gateway_messages_received_total", "type") == received
    sockets = figures.by("gateway_sockets_open", "dialect")
    assert sum(sockets.values()) == figures.last["sockets"] == proxy.open
    assert figures.metric("gateway_sessions_live") == figures.last["sessions"] == figures.found
    assert figures.metric("gateway_turns_running") == figures.last["turns_running"] == 0
    assert figures.metric("gateway_turns_waiting") == figures.last["turns_waiting"] == 0


def assert_percentiles_agree(figures: Figures) -> None:
    """The histogram's p50 and p99 lie where the dashboard's of all seconds allow.

    What is counted in several seconds has its percentile between the least and the greatest of theirs.
    """
    bounds, counts = figures.buckets(*ADDED)
    total = int(sum(counts))
    for name, rank in (("added_p50", total // 2), ("added_p99", total * 99 // 100)):
        shown = [sample[name] for sample in figures.samples if sample[name] is not None]
        reached, bucket = 0.0, 0
        while (reached := reached + counts[bucket]) <= rank:
            bucket += 1
        least, greatest = (bisect.bisect_left(bounds, found(shown)) for found in (min, max))
        assert least <= bucket <= greatest, (name, shown, counts)


def first_bucket(figures: Figures, name: str, share: float) -> float:
    """The lower bound of the bucket that holds a percentile, in seconds."""
    bounds, counts = figures.buckets(name)
    reached, bucket = 0.0, 0
    while (reached := reached + counts[bucket]) <= int(sum(counts) * share):
        bucket += 1
    return bounds[bucket - 1] if bucket else 0.0


async def test_a_bench_is_counted_alike_in_all_places(subjects: Subjects) -> None:
    """Tokens, frames, bytes, messages, acks, sockets, sessions, turns, resumes and latencies."""
    measured = {
        dialect: await subjects.bench(STREAM, dialect, dialect) for dialect in ("v1", "v2-json", "v2-msgpack")
    }
    figures = await subjects.figures()
    proxy = subjects.proxy
    count = sum(one.tokens for one in measured.values())

    assert count == 3 * SESSIONS * TOKENS
    assert (
        figures.metric("gateway_tokens_total")
        == figures.last["tokens"]
        == tokens_in(proxy.down.objects)
        == count
    )
    assert figures.metric("gateway_events_total") == count
    assert figures.by("gateway_agent_events_total", "type") == {}
    assert figures.by("gateway_turns_total", "outcome") == {"completed": 3 * SESSIONS}
    assert figures.metric("gateway_turn_seconds_count") == 3 * SESSIONS
    assert figures.metric("gateway_first_event_seconds_count") == 3 * SESSIONS
    assert figures.metric("gateway_agent_head_seconds_count") == 3 * SESSIONS
    assert figures.by("gateway_resumes_total", "outcome") == {"new": 3 * SESSIONS}
    assert figures.by("gateway_errors_total", "code") == {}
    assert figures.found == sum(one.sessions for one in measured.values())
    assert_the_wire_agrees(figures, proxy)
    assert_percentiles_agree(figures)

    # Each first token is on its way for at least as long as the gateway adds to it.
    assert figures.metric("gateway_first_event_added_seconds_count") == 3 * SESSIONS
    slowest = max(one.first_token_ms["p99"] for one in measured.values() if one.first_token_ms)
    assert first_bucket(figures, "gateway_first_event_added_seconds", 0.99) * 1000 <= slowest

    for dialect in ("v1", "v2-msgpack"):
        count += (await subjects.bench(BURST, dialect, f"burst-{dialect}")).tokens
    resumed = await subjects.bench(RESUME, "v2-json", "resume")
    figures = await subjects.figures()

    # The first token of each session came before its cut.
    assert (
        figures.metric("gateway_tokens_total") == figures.last["tokens"] == count + resumed.tokens + SESSIONS
    )
    assert figures.by("gateway_turns_total", "outcome") == {"completed": 6 * SESSIONS}
    assert figures.by("gateway_resumes_total", "outcome") == {"new": 6 * SESSIONS, "resumed": SESSIONS}
    assert figures.metric("gateway_replayed_events_total") >= resumed.tokens
    assert sum(figures.by("gateway_sockets_closed_total", "code").values()) == 7 * SESSIONS
    assert_the_wire_agrees(figures, proxy)
    assert_percentiles_agree(figures)


class Talker:
    """A client that reads to the end of what it asked for."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self._connection = connection
        self.seen: list[Object] = []

    async def say(self, fields: Object | str) -> None:
        """Send one message."""
        await self._connection.send_message(fields if isinstance(fields, str) else json.dumps(fields))

    async def until(self, **wanted: object) -> Object:
        """Read up to the next object with these fields."""
        with trio.fail_after(20):
            while True:
                value = json.loads(await self._connection.get_message())
                for item in value if isinstance(value, list) else [value]:
                    self.seen.append(item)
                if found := [item for item in self.seen[-1:] if wanted.items() <= item.items()]:
                    return found[0]

    async def first_token(self) -> None:
        """Read up to a token."""
        with trio.fail_after(20):
            while not self.seen or self.seen[-1]["type"] != "assistant_message":
                self.seen.append(json.loads(await self._connection.get_message()))


@asynccontextmanager
async def talking(subjects: Subjects, path: str, *subprotocols: str) -> AsyncIterator[Talker]:
    """A socket through the proxy, closed with 1000 at the end."""
    url = f"ws://127.0.0.1:{subjects.proxy.port}/api/v1/ws{path}"
    async with open_websocket_url(url, subprotocols=subprotocols) as connection:
        yield Talker(connection)


async def test_everything_that_goes_wrong_is_counted_alike(subjects: Subjects) -> None:
    """Outcomes, errors and refusals, over sockets that are still open, one of them with many sessions."""
    short, long = str(Plan(5)), str(Plan(100_000, 0.01))
    async with (
        talking(subjects, "/one") as one,
        talking(subjects, "/two", "codelab.v2.json") as two,
        talking(subjects, "", "codelab.v2.json") as many,
    ):
        await one.say({"type": "user_message", "content": short})
        await one.until(is_final=True)
        for name in ("three", "four"):
            await many.say({"type": "attach", "session_id": name})
            await many.say({"type": "user_message", "id": name, "session_id": name, "content": short})
            await many.until(type="turn_ended", session_id=name)
        await one.say("no JSON")
        await one.until(code="INVALID_MESSAGE")
        await one.say({"type": "user_message", "content": long})
        one.seen.clear()
        await one.first_token()
        await one.say({"type": "cancel"})
        await one.until(outcome="cancelled")
        await two.say({"type": "user_message", "id": "m", "content": long})
        await two.first_token()
        subjects.emitter.signal(signal.SIGKILL)
        await two.until(type="turn_ended", outcome="interrupted")
        await two.say({"type": "ack", "seq": two.seen[-1]["seq"]})
        await one.say({"type": "user_message", "content": short})
        await one.until(code="AGENT_UNAVAILABLE")
        figures = await subjects.figures()
        proxy = subjects.proxy

        outcomes = Counter({"completed": 3, "cancelled": 1, "interrupted": 1, "failed": 1})
        assert figures.by("gateway_turns_total", "outcome") == outcomes
        told = Counter(item["code"] for item in proxy.down.objects if item["type"] == "error")
        assert set(told) == {"INVALID_MESSAGE", "AGENT_STREAM_INTERRUPTED", "AGENT_UNAVAILABLE"}
        assert figures.by("gateway_errors_total", "code") == told
        failed = Counter(
            item["fields"]["code"] for item in figures.troubles if item["event"] == "turn_failed"
        )
        assert failed == told - Counter(["INVALID_MESSAGE"])
        assert figures.metric("gateway_tokens_total") == figures.last["tokens"]
        assert figures.last["tokens"] >= tokens_in(proxy.down.objects)
        assert figures.by("gateway_sockets_open", "dialect") == {"v1": 1, "codelab.v2.json": 2}
        assert set(figures.sessions) == {"one", "two", "three", "four"}
        assert figures.sessions["two"]["last_seq"] == two.seen[-1]["seq"]
        assert figures.sessions["two"]["unacked_bytes"] == 0 < figures.sessions["three"]["unacked_bytes"]
        assert figures.sessions["one"]["last_error"] == "AGENT_UNAVAILABLE"
        assert figures.sessions["three"]["dialects"] == ["codelab.v2.json"]
        # What is no message has no type to be counted by; it is among the frames.
        assert_the_wire_agrees(figures, proxy)
    figures = await subjects.figures()

    assert figures.by("gateway_sockets_closed_total", "code") == {"1000": 3}
    assert figures.metric("gateway_sessions_live") == figures.last["sessions"] == 4
    assert_the_wire_agrees(figures, proxy)
