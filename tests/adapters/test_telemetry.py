"""Logs and metrics as operators get them."""

from __future__ import annotations

import io
import json
import logging
import timeit
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.adapters.telemetry import MAX_LABEL_SETS, StructlogTelemetry
from gateway.core.metrics import METRICS, MetricKind
from gateway.ports import Telemetry

KEY = "planted-internal-key"


def _telemetry(stream: io.StringIO, **options: Any) -> StructlogTelemetry:
    return StructlogTelemetry(stream, secrets=[KEY], **options)


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


def _samples(telemetry: StructlogTelemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(telemetry.render().decode())
        for sample in family.samples
    }


def test_is_a_telemetry() -> None:
    """It satisfies the port."""
    port: Telemetry = _telemetry(io.StringIO())

    assert callable(port.count)


def test_writes_one_json_object_per_event() -> None:
    """A line has time, level, event and the fields; control characters in any of them end no line."""
    stream = io.StringIO()
    telemetry = _telemetry(stream)

    telemetry.info("socket\nopened", session_id="a\r\nb\u2028", rtt=0.5, level="x")

    (line,) = _lines(stream)
    assert list(line) == ["timestamp", "level", "event", "session_id", "rtt", "level_"]
    assert (line["level"], line["event"]) == ("info", "socket\\u000aopened")
    assert line["session_id"] == "a\\u000d\\u000ab\\u2028"
    assert line["timestamp"].endswith("Z")
    assert stream.getvalue().isascii()
    assert len(stream.getvalue().splitlines()) == 1


def test_says_of_every_line_whose_it_is() -> None:
    """Fields that are bound are on all lines, before the line's own, which win."""
    stream = io.StringIO()
    telemetry = _telemetry(stream, bound={"worker": 2})

    telemetry.info("a")
    telemetry.error("b", cause=ValueError("x"), code=1)
    telemetry.warning("c", worker=3)
    assert [line["worker"] for line in _lines(stream)] == [2, 2, 3]
    assert list(_lines(stream)[1])[3:5] == ["worker", "code"]


def test_logs_nothing_below_its_level() -> None:
    """LOG_LEVEL is the least important level that is written."""
    stream = io.StringIO()
    telemetry = _telemetry(stream, log_level="WARNING")

    telemetry.debug("a")
    telemetry.info("b")
    telemetry.warning("c")
    telemetry.error("d")

    assert [line["event"] for line in _lines(stream)] == ["c", "d"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_error_carries_the_traceback_of_its_cause(log_format: str) -> None:
    """The traceback says where it came from, groups included, and no secret of its text gets out."""
    stream = io.StringIO()
    telemetry = _telemetry(stream, log_format=log_format)

    try:
        raise ExceptionGroup("several", [ValueError(f"bad {KEY}\n2026-01-01 forged line")])
    except ExceptionGroup as error:
        telemetry.error("turn failed", cause=error, session_id="s")

    assert "ValueError" in stream.getvalue()
    assert "test_telemetry.py" in stream.getvalue()
    assert KEY not in stream.getvalue()
    assert not any(line.startswith("2026-01-01 forged") for line in stream.getvalue().splitlines())


def test_console_format_is_for_people() -> None:
    """The console format has one readable line per event, without colours when it is no terminal."""
    stream = io.StringIO()

    _telemetry(stream, log_format="console").info("socket opened", session_id="s-1", note="a\x1b[31mb\n")

    (line,) = stream.getvalue().splitlines()
    assert "socket opened" in line
    assert "session_id=s-1" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_never_writes_a_secret_or_content(log_format: str) -> None:
    """What was planted in event, fields, nested fields and causes is in none of the lines."""
    stream = io.StringIO()
    telemetry = _telemetry(stream, log_format=log_format, log_level="DEBUG")
    jwt = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"

    telemetry.debug(f"a {KEY}", authorization=f"Bearer {jwt}", note=jwt, content="my private question")
    telemetry.info("b", headers={"cookie": "sid=planted-cookie", "x": KEY}, items=[jwt, KEY])
    telemetry.warning("c", raw=b"my private question", token="planted-token")
    telemetry.error("d", cause=RuntimeError(f"{KEY} {jwt}"), url="https://u:planted-pass@host")

    for planted in (KEY, jwt, "planted", "private"):
        assert planted not in stream.getvalue()


def test_never_raises() -> None:
    """A closed stream, an object without text, odd metrics: the caller notices nothing."""

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    stream = io.StringIO()
    telemetry = _telemetry(stream)
    telemetry.info("a", thing=Unprintable())
    stream.close()

    telemetry.info("b")
    telemetry.error("c", cause=ValueError("x"))
    telemetry.count("gateway_no_such_metric")


def test_reports_an_undeclared_metric_once() -> None:
    """An unknown name, wrong labels, the wrong kind or a negative count is logged, once per name."""
    stream = io.StringIO()
    telemetry = _telemetry(stream)

    for _ in range(3):
        telemetry.count("gateway_no_such_metric")
        telemetry.count("gateway_errors_total", color="red")
        telemetry.observe("gateway_sessions_live", 1)
        telemetry.count("gateway_events_total", -1)

    assert [line["metric"] for line in _lines(stream)] == [
        "gateway_no_such_metric",
        "gateway_errors_total",
        "gateway_sessions_live",
        "gateway_events_total",
    ]


def test_renders_counters_gauges_and_histograms() -> None:
    """What was counted, set and observed is what Prometheus reads."""
    telemetry = _telemetry(io.StringIO())

    telemetry.count("gateway_rest_requests_total", method="GET", route="/sessions", status="200")
    telemetry.count("gateway_rest_requests_total", 2, status="200", route="/sessions", method="GET")
    telemetry.set_gauge("gateway_sockets_open", 7, dialect="v1")
    telemetry.set_gauge("gateway_sockets_open", 5, dialect="v1")
    for seconds in (0.001, 0.2, 60.0):
        telemetry.observe("gateway_rest_seconds", seconds, route="/sessions")

    samples = _samples(telemetry)
    route = ("route", "/sessions")
    call = (("method", "GET"), route, ("status", "200"))
    assert samples["gateway_rest_requests_total", call] == 3
    assert samples["gateway_sockets_open", (("dialect", "v1"),)] == 5
    assert samples["gateway_rest_seconds_bucket", (("le", "0.001"), route)] == 1
    assert samples["gateway_rest_seconds_bucket", (("le", "0.25"), route)] == 2
    assert samples["gateway_rest_seconds_bucket", (("le", "+Inf"), route)] == 3
    assert samples["gateway_rest_seconds_count", (route,)] == 3
    assert pytest.approx(samples["gateway_rest_seconds_sum", (route,)]) == 60.201


def test_exports_every_declared_metric() -> None:
    """Each metric of core/metrics.py is announced with its type from the start; unlabelled ones at zero."""
    telemetry = _telemetry(io.StringIO())

    text = telemetry.render().decode()
    samples = _samples(telemetry)

    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind.value}\n" in text
        if not metric.labels and metric.kind is not MetricKind.HISTOGRAM:
            assert samples[metric.name, ()] == 0
    assert ("process_resident_memory_bytes", ()) in samples


def test_labels_stay_bounded() -> None:
    """A caller who invents label values fills one series called other, not the memory."""
    telemetry = _telemetry(io.StringIO())

    for number in range(10_000):
        telemetry.count("gateway_messages_received_total", type=f"invented-{number}")

    series = [key for key in _samples(telemetry) if key[0] == "gateway_messages_received_total"]
    assert len(series) == MAX_LABEL_SETS + 1
    other = ("gateway_messages_received_total", (("type", "other"),))
    assert _samples(telemetry)[other] == 10_000 - MAX_LABEL_SETS


def test_two_telemetries_share_nothing() -> None:
    """Registries are per instance: counting in one changes nothing in another."""
    one, other = _telemetry(io.StringIO()), _telemetry(io.StringIO())

    one.count("gateway_events_total")

    assert _samples(other)["gateway_events_total", ()] == 0


def test_counting_is_cheap() -> None:
    """A count on the hot path stays far from what a token costs, also on a busy machine."""
    telemetry = _telemetry(io.StringIO())

    best = min(timeit.repeat(lambda: telemetry.count("gateway_events_total"), number=10_000, repeat=5))

    assert best / 10_000 < 5e-6


def test_routes_logging_of_dependencies() -> None:
    """Warnings and errors of libraries arrive as our lines, tracebacks and masking included."""
    stream = io.StringIO()
    telemetry = _telemetry(stream)
    library = logging.getLogger("hypercorn.error")
    before = (logging.getLogger().handlers, library.handlers, library.level)

    with telemetry.route_standard_logging():
        library.info("not this")
        library.warning("slow %s\nnext", KEY)
        try:
            raise ValueError("inside")
        except ValueError:
            logging.getLogger("trio-websocket").exception("handler failed")

    assert before == (logging.getLogger().handlers, library.handlers, library.level)
    first, second = _lines(stream)
    assert (
        first["level"],
        first["event"],
        first["logger"],
    ) == ("warning", "slow [redacted]\\u000anext", "hypercorn.error")
    assert (second["level"], second["event"]) == ("error", "handler failed")
    assert "ValueError: inside" in second["exception"]
