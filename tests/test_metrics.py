"""Metrics from a whole conversation, and what reads them: the Grafana dashboard and the alert rules."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.adapters.telemetry import StructlogTelemetry
from gateway.core.flow import EVENTS_PER_SAMPLE, TOTALS, Flow
from gateway.core.identity import Identity
from gateway.core.metrics import METRICS, MetricKind
from gateway.core.websocket_protocol import Dialect
from gateway.engine.pulse import _PUBLISHED, Pulse
from gateway.engine.turn import TurnRunner
from gateway.ports import Admission, ResumePoint
from tests.end_to_end.requirements import need_program
from tests.engine.fakes import Bench, DurableMemoryStore, FakeConnection

DOCS = Path(__file__).parent.parent / "docs"
DASHBOARD = DOCS / "grafana" / "gateway.json"
ALERTS = DOCS / "alerts.yml"
KINDS = {metric.name: metric for metric in METRICS}


def exported() -> dict[str, set[str]]:
    """The names of all time series, and the labels of each."""
    found: dict[str, set[str]] = {}
    for metric in METRICS:
        labels = set(metric.labels)
        if metric.kind is MetricKind.HISTOGRAM:
            found[f"{metric.name}_bucket"] = labels | {"le"}
            found[f"{metric.name}_sum"] = found[f"{metric.name}_count"] = labels
        else:
            found[metric.name] = labels
    return found


def expressions(value: Any) -> Iterator[str]:
    """All PromQL in the dashboard or the rules."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("expr", "definition") and isinstance(item, str):
                yield item
            else:
                yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


def check_names(expression: str) -> set[str]:
    """The metrics of ours in it; each exists with the labels that are asked of it."""
    series = exported()
    used = set()
    for name, selector in re.findall(r"\b(gateway_\w+)(?:\{([^}]*)\})?", expression):
        assert name in series, f"{name} is no metric of the gateway: {expression}"
        for label in re.findall(r"(\w+)\s*[=!]", selector):
            assert label in series[name] | {"instance", "job"}, f"{name} has no label {label}"
        used.add(name)
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        for label in re.split(r"\s*,\s*", labels):
            assert label == "instance" or any(label in series[name] for name in used), expression
    return used


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Every panel's query names metrics of the gateway with labels that they have."""
    used = set().union(*map(check_names, expressions(json.loads(DASHBOARD.read_text("utf-8")))))

    for metric in METRICS:
        shown = f"{metric.name}_bucket" if metric.kind is MetricKind.HISTOGRAM else metric.name
        optional = {"gateway_info", "gateway_rest_seconds_bucket"}
        assert shown in used | optional, f"{metric.name} is on no panel"


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    """Panels have ids of their own and lie beside each other, and the data source can be chosen."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))

    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}


def test_the_alerts_ask_for_metrics_that_exist() -> None:
    """Every rule names metrics of the gateway, and says what to do."""
    rules = [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]

    for rule in rules:
        assert check_names(rule["expr"]) or "up{" in rule["expr"]
        assert set(rule["annotations"]) == {"summary", "action"}
    assert len({rule["alert"] for rule in rules}) == len(rules)


def promtool(*arguments: str, text: bytes | None = None) -> None:
    """Run promtool, which has to be content."""
    program = need_program("promtool", "apt-get install prometheus")
    done = subprocess.run([program, *arguments], input=text, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_promtool_accepts_the_alerts() -> None:
    """Prometheus would load them."""
    promtool("check", "rules", str(ALERTS))


def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """A refusing store, failing turns, a late event loop and lost spans are told; a quiet gateway is not."""
    bad, good = 'instance="bad",job="gateway"', 'instance="good",job="gateway"'
    series = {
        f"gateway_store_failures_total{{{bad}}}": "0+3x20",
        f"gateway_store_failures_total{{{good}}}": "0x20",
        f'gateway_turns_total{{{bad},outcome="failed"}}': "0+30x20",
        f'gateway_turns_total{{{bad},outcome="completed"}}': "0+60x20",
        f'gateway_turns_total{{{good},outcome="completed"}}': "0+60x20",
        f'gateway_spans_exported_total{{{bad},outcome="lost"}}': "0+5x20",
        f'gateway_spans_exported_total{{{good},outcome="exported"}}': "0+5x20",
        f'gateway_spans_exported_total{{{good},outcome="lost"}}': "0x20",
        f'gateway_event_loop_lag_seconds_bucket{{{bad},le="0.25"}}': "0x20",
        f'gateway_event_loop_lag_seconds_bucket{{{bad},le="0.5"}}': "0+240x20",
        f'gateway_event_loop_lag_seconds_bucket{{{bad},le="+Inf"}}': "0+240x20",
        f'gateway_event_loop_lag_seconds_bucket{{{good},le="0.0005"}}': "0+240x20",
        f'gateway_event_loop_lag_seconds_bucket{{{good},le="+Inf"}}': "0+240x20",
    }
    names = {
        "GatewayStoreRefuses": "critical",
        "GatewayTurnsFail": "warning",
        "GatewayLoopLags": "warning",
        "GatewaySpansLost": "warning",
        "GatewayCrashContained": None,
    }
    expected = []
    for name, severity in names.items():
        labels = {"severity": severity, "instance": "bad"}
        if name == "GatewayStoreRefuses":
            labels["job"] = "gateway"
        alerts = [] if severity is None else [{"exp_labels": labels}]
        expected.append({"eval_time": "15m", "alertname": name, "exp_alerts": alerts})
    rules = yaml.safe_load(ALERTS.read_text("utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]  # compared literally, and templated
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), "utf-8")
    tests = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": expected,
            }
        ],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests), "utf-8")

    promtool("test", "rules", str(tmp_path / "tests.yml"))


def test_promtool_accepts_the_metrics() -> None:
    """Names, help texts and units follow the conventions."""
    telemetry = StructlogTelemetry(io.StringIO())
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        if metric.kind is MetricKind.HISTOGRAM:
            telemetry.observe(metric.name, 0.5, **labels)
        elif metric.kind is MetricKind.COUNTER:
            telemetry.count(metric.name, 1, **labels)
        else:
            telemetry.set_gauge(metric.name, 1, **labels)

    promtool("check", "metrics", text=telemetry.render())


def test_every_total_of_the_hot_path_is_published() -> None:
    """What is counted as a plain integer becomes a counter that is declared."""
    assert set(_PUBLISHED) == set(TOTALS) == set(Flow().totals())
    assert all(KINDS[name].kind is MetricKind.COUNTER for name in _PUBLISHED.values())


def test_one_event_in_so_many_is_timed() -> None:
    """Batches count as what they hold."""
    flow = Flow()

    taken = [flow.takes_sample(2) for _ in range(EVENTS_PER_SAMPLE)]

    assert taken.count(True) == 2
    assert taken[EVENTS_PER_SAMPLE // 2 - 1]


def test_frames_are_counted_by_their_bytes() -> None:
    """Text counts as what it is on the wire, and not in characters."""
    flow = Flow()
    for frame in ("abc", "\u00e9", b"\x00\x01"):
        flow.note_received(frame)

    assert (flow.frames_received, flow.bytes_received) == (3, 7)


class Measured:
    """A hub whose telemetry is the real one."""

    def __init__(self, bench: Bench, telemetry: StructlogTelemetry) -> None:
        turns = bench.hub._run_turn
        assert isinstance(turns, TurnRunner)
        self.bench = bench
        self.pulse = Pulse(bench.hub, turns, telemetry, bench.clock, "1.0")
        self._telemetry = telemetry

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All time series as a scrape would see them now."""
        self.pulse.publish()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self._telemetry.render().decode())
            for sample in family.samples
        }


def measured(nursery: trio.Nursery, *, durable: bool = False) -> Measured:
    """A hub with fakes around it, and real telemetry."""
    telemetry = StructlogTelemetry(io.StringIO())
    store = DurableMemoryStore() if durable else None
    return Measured(Bench(nursery, store=store, telemetry=telemetry), telemetry)


def message(number: int) -> dict[str, object]:
    """A message of a v2 client."""
    return {"type": "user_message", "id": f"m{number}", "content": "hi"}


async def test_a_conversation_is_counted(nursery: trio.Nursery, autojump_clock: Any) -> None:
    """Tokens, events, frames, bytes and what the gateway adds agree with what the client saw."""
    subject = measured(nursery, durable=True)
    await subject.bench.store.claim("s", "anonymous", 0)
    await subject.bench.start()
    client = subject.bench.connect(dialect=Dialect.V2_JSON)
    client.say(message(1))
    stream = await subject.bench.agent.stream(0)
    for number in range(200):
        stream.token(f"{number} ")
        await trio.sleep(0.01)
    stream.emit({"type": "tool_call", "call_id": "c", "tool_name": "x", "arguments": {}})
    stream.emit({"type": "agent_switched", "to_agent": "coder", "from_agent": "ask", "reason": "because"})
    stream.emit({"type": "made up by the runtime"})
    stream.token("the last", final=True)
    stream.done()
    await client.wait_for("turn_ended")
    client.say({"type": "ack", "seq": 50})
    await trio.sleep(1)

    now = subject.samples()

    assert now["gateway_tokens_total", ()] == 201
    assert now["gateway_events_total", ()] == 204
    assert ("gateway_agent_events_total", (("type", "assistant_message"),)) not in now
    for kind in ("tool_call", "agent_switched", "other"):
        assert now["gateway_agent_events_total", (("type", kind),)] == 1
    assert now["gateway_socket_frames_sent_total", ()] == len(client.frames)
    assert now["gateway_socket_bytes_sent_total", ()] == sum(map(len, client.frames))
    assert now["gateway_socket_frames_received_total", ()] == 2
    assert now["gateway_acks_received_total", ()] == 1
    assert now["gateway_messages_received_total", (("type", "user_message"),)] == 1
    assert now["gateway_sockets_open", (("dialect", "codelab.v2.json"),)] == 1
    assert now["gateway_turns_total", (("outcome", "completed"),)] == 1
    assert now["gateway_first_event_added_seconds_count", ()] == 1
    assert now["gateway_event_added_seconds_count", ()] == 200 // EVENTS_PER_SAMPLE
    assert now["gateway_agent_head_seconds_count", ()] == 1
    assert now["gateway_store_batch_events_count", ()] == now["gateway_store_commit_seconds_count", ()] > 0
    assert now["gateway_store_batch_events_sum", ()] >= 204
    assert subject.bench.hub.runners["s"].agent == "coder"


async def test_what_the_gateway_adds_is_the_store(nursery: trio.Nursery, autojump_clock: Any) -> None:
    """An event waits for its commit; that time, and no more, is what is reported as added."""
    subject = measured(nursery, durable=True)
    await subject.bench.store.claim("s", "anonymous", 0)
    assert isinstance(subject.bench.store, DurableMemoryStore)
    await subject.bench.start()
    client = subject.bench.connect(dialect=Dialect.V2_JSON)
    await client.wait_for("welcome")
    client.say(message(1))
    stream = await subject.bench.agent.stream(0)
    await trio.sleep(1)
    subject.bench.store.latency = 0.04
    stream.token("x")
    await client.wait_for("assistant_message")

    now = subject.samples()

    assert now["gateway_first_event_added_seconds_count", ()] == 1
    assert now["gateway_first_event_added_seconds_sum", ()] == pytest.approx(0.04)


async def miss(subject: Measured, tokens: int) -> None:
    """Lose the socket of a turn, and come back for so many tokens."""
    await subject.bench.start()
    client = subject.bench.connect(dialect=Dialect.V2_JSON)
    epoch = (await client.wait_for("welcome"))["epoch"]
    client.say(message(1))
    stream = await subject.bench.agent.stream(0)
    await client.wait_for("turn_started")
    client.drop()
    await trio.sleep(1)
    for _ in range(tokens):
        stream.token("x")
    await trio.sleep(30)
    again = subject.bench.connect(dialect=Dialect.V2_JSON, resume=ResumePoint(epoch, 1))
    await again.wait_for("assistant_message")


async def test_nobody_s_absence_is_timed(nursery: trio.Nursery, autojump_clock: Any) -> None:
    """Events that a client comes back for count as replayed, and not as slow."""
    subject = measured(nursery)
    await miss(subject, EVENTS_PER_SAMPLE + 1)

    now = subject.samples()

    assert now["gateway_replayed_events_total", ()] == EVENTS_PER_SAMPLE + 1
    assert now["gateway_first_event_added_seconds_count", ()] == 0
    assert now["gateway_event_added_seconds_count", ()] == 0
    assert now["gateway_resumes_total", (("outcome", "resumed"),)] == 1


async def test_the_pulse_keeps_samples_and_surveys_sockets(
    nursery: trio.Nursery, autojump_clock: Any
) -> None:
    """Once a second a sample; every five seconds the unacknowledged bytes of all sockets."""
    subject = measured(nursery)
    await subject.bench.start()
    nursery.start_soon(subject.pulse.run)
    client = subject.bench.connect(dialect=Dialect.V2_JSON, connection=FakeConnection())
    client.say(message(1))
    stream = await subject.bench.agent.stream(0)
    for _ in range(10):
        stream.token("x" * 100)
    await trio.sleep(10.1)

    samples = subject.pulse.samples
    now = subject.samples()

    assert len(samples) == 10
    assert (samples[-1].tokens, samples[-1].sockets, samples[-1].turns_running) == (10, 1, 1)
    assert sum(len(sample.added) for sample in samples) == 1
    assert now["gateway_socket_unacked_bytes", ()] > 1000
    assert now["gateway_event_loop_lag_seconds_count", ()] == 40
    assert now["gateway_turns_running", ()] == 1
    assert now["gateway_info", (("version", "1.0"),)] == 1


async def test_a_multiplexed_socket_is_counted(nursery: trio.Nursery, autojump_clock: Any) -> None:
    """One socket for many sessions counts once, and what it says counts like any other's."""
    subject = measured(nursery)
    await subject.bench.start()
    client = FakeConnection()
    admission = Admission(None, Identity("anonymous"), Dialect.V2_JSON, None, "203.0.113.1", "req")
    nursery.start_soon(subject.bench.hub.serve, client, admission)
    for session_id in ("a", "b"):
        client.say({"type": "attach", "id": session_id, "session_id": session_id})
    await client.wait_for("welcome", times=2)
    client.say(message(1) | {"session_id": "a"})
    stream = await subject.bench.agent.stream(0)
    stream.token("x")
    stream.done()
    await client.wait_for("turn_ended")

    now = subject.samples()

    assert now["gateway_sockets_open", (("dialect", "codelab.v2.json"),)] == 1
    assert now["gateway_sessions_live", ()] == 2
    assert now["gateway_socket_frames_received_total", ()] == 3
    assert now["gateway_socket_frames_sent_total", ()] == len(client.frames)
    assert now["gateway_socket_bytes_sent_total", ()] == sum(map(len, client.frames))
    assert now["gateway_messages_received_total", (("type", "attach"),)] == 2


@pytest.mark.parametrize("missed", [1, 3])
async def test_replayed_events_are_counted(nursery: trio.Nursery, autojump_clock: Any, missed: int) -> None:
    """However few they are."""
    subject = measured(nursery)
    await miss(subject, missed)

    assert subject.samples()["gateway_replayed_events_total", ()] == missed
