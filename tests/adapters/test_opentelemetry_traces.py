"""Spans on OpenTelemetry: what is in them, that nothing waits for a collector, and what a stop leaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pytest
import trio
import trio.testing
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from gateway.adapters.opentelemetry_traces import FLUSH_SECONDS, OpenTelemetryTracing, open_tracing
from tests.engine.fakes import RecordingTelemetry
from tests.tracing_fake import CALLER

EXPORTED = ("gateway_spans_exported_total", (("outcome", "exported"),))
LOST = ("gateway_spans_exported_total", (("outcome", "lost"),))


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where spans of ``tracing`` go."""
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> OpenTelemetryTracing:
    """Spans that are exported as they end."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetryTracing(provider.get_tracer("test"), secrets=["hunter2-hunter2"])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests counts."""
    for name in ("OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


class Steered(SpanExporter):
    """An exporter that the test holds up, or lets fail."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.result = SpanExportResult.SUCCESS
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.threads: set[threading.Thread] = set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Keep."""
        self.threads.add(threading.current_thread())
        self.entered.set()
        self.free.wait(30)
        self.spans += spans
        return self.result

    def shutdown(self) -> None:
        """Give up."""
        self.free.set()


@pytest.fixture
def steered() -> Iterator[Steered]:
    """It lets go at the end, whatever the test did."""
    steered = Steered()
    yield steered
    steered.free.set()
    for thread in steered.threads:
        thread.join(5)


# --------------------------------------------------------------------------- spans


def test_a_span_continues_its_caller_s_trace(
    tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    """Below the caller's span, with what others put into tracestate."""
    span = tracing.begin("turn", CALLER, {"session.id": "s"})
    span.event("tool_call", {"gateway.requires_approval": True})
    span.end({"gateway.turn.outcome": "completed"})
    (ended,) = exporter.get_finished_spans()

    assert ended.parent is not None
    assert ended.context is not None
    assert f"{ended.context.trace_id:032x}" == CALLER.traceparent.split("-")[1]
    assert f"{ended.parent.span_id:016x}" == CALLER.traceparent.split("-")[2]
    assert (ended.name, ended.kind, ended.status.status_code) == ("turn", SpanKind.SERVER, StatusCode.UNSET)
    assert dict(ended.attributes or {}) == {"session.id": "s", "gateway.turn.outcome": "completed"}
    assert [(event.name, dict(event.attributes or {})) for event in ended.events] == [
        ("tool_call", {"gateway.requires_approval": True})
    ]


def test_what_is_sent_on_is_the_span(tracing: OpenTelemetryTracing) -> None:
    """Its id in the caller's trace, and the log has the same ids."""
    span = tracing.begin("turn", CALLER, {})
    assert span.context is not None
    version, trace_id, span_id, flags = span.context.traceparent.split("-")

    assert (version, trace_id, flags) == ("00", CALLER.traceparent.split("-")[1], "01")
    assert span_id != CALLER.traceparent.split("-")[2]
    assert span.context.tracestate == CALLER.tracestate
    assert span.log_fields == {"trace_id": trace_id, "span_id": span_id}


def test_without_a_caller_s_trace_one_begins(
    tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    """Each span its own."""
    for _ in range(2):
        tracing.begin("turn", None, {}).end({})
    first, second = exporter.get_finished_spans()

    assert first.parent is None
    assert first.context is not None
    assert second.context is not None
    assert first.context.trace_id != second.context.trace_id


def test_an_unsampled_trace_stays_so(tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    """The caller decided; nothing is recorded, and the runtime is told the same."""
    parent = CALLER.traceparent.removesuffix("01") + "00"
    span = tracing.begin("turn", type(CALLER)(parent), {})
    span.end({})
    assert span.context is not None

    assert span.context.traceparent.endswith("-00")
    assert exporter.get_finished_spans() == ()


def test_a_failure_is_an_error_with_its_code(
    tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    """As status, and as ``error.type``."""
    tracing.begin("turn", None, {}).end({}, error="AGENT_TIMEOUT")
    (ended,) = exporter.get_finished_spans()

    assert (ended.status.status_code, ended.status.description) == (StatusCode.ERROR, "AGENT_TIMEOUT")
    assert ended.attributes is not None
    assert ended.attributes["error.type"] == "AGENT_TIMEOUT"


def test_secrets_are_masked(tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    """The gateway's own by value, tokens by their shape, wherever a caller put them."""
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln"
    span = tracing.begin("turn", None, {"session.id": "hunter2-hunter2"})
    span.event("e", {"x": token})
    span.end({"y": f"Bearer {token}"})
    (ended,) = exporter.get_finished_spans()

    assert "hunter2" not in ended.to_json()
    assert "eyJ" not in ended.to_json()


# --------------------------------------------------------------------------- export


async def test_what_is_left_is_exported_at_the_end(steered: Steered) -> None:
    """Before the block is left, and counted; by another thread than Trio's."""
    telemetry = RecordingTelemetry()
    async with open_tracing("1", telemetry, secrets=[], exporter=steered) as tracing:
        assert tracing is not None
        tracing.begin("turn", None, {}).end({})

    assert [span.name for span in steered.spans] == ["turn"]
    assert telemetry.counts == {EXPORTED: 1, LOST: 0}
    assert threading.current_thread() not in steered.threads


async def test_a_span_says_which_service_and_version(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And which process of it; an operator's own names go before."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=mine,deployment.environment=test")
    async with open_tracing("1.2.3", RecordingTelemetry(), secrets=[], exporter=steered) as tracing:
        assert tracing is not None
        tracing.begin("turn", None, {}).end({})
    attributes = steered.spans[0].resource.attributes

    assert attributes["service.name"] == "codelab-gateway"
    assert len(str(attributes["service.instance.id"])) == 36
    assert (attributes["service.version"], attributes["deployment.environment"]) == ("mine", "test")


async def test_nobody_waits_for_a_collector_that_does_not_answer(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans begin and end while an export hangs; those over the queue's bound are dropped."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    steered.free.clear()
    async with open_tracing("1", RecordingTelemetry(), secrets=[], exporter=steered) as tracing:
        assert tracing is not None
        for _ in range(4):
            tracing.begin("turn", None, {}).end({})
        await trio.to_thread.run_sync(steered.entered.wait, 5)
        for _ in range(100):
            tracing.begin("turn", None, {}).end({})
        steered.free.set()

    assert len(steered.spans) == 4 + 8


async def test_a_stop_waits_a_bounded_time(steered: Steered, mock_clock: trio.testing.MockClock) -> None:
    """For a collector that does not answer; and says that something was left."""
    telemetry = RecordingTelemetry()
    steered.free.clear()
    steered.shutdown = lambda: None  # type: ignore[method-assign]  # it hangs on
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            async with open_tracing("1", telemetry, secrets=[], exporter=steered) as tracing:
                assert tracing is not None
                tracing.begin("turn", None, {}).end({})

        await trio.to_thread.run_sync(steered.entered.wait, 5)
        mock_clock.jump(FLUSH_SECONDS + 0.001)

    assert telemetry.events() == ["traces_left_unexported"]


async def test_a_cancelled_stop_does_not_wait(steered: Steered) -> None:
    """Somebody wants this process to end now."""
    steered.free.clear()
    with trio.CancelScope() as scope:
        async with open_tracing("1", RecordingTelemetry(), secrets=[], exporter=steered) as tracing:
            assert tracing is not None
            tracing.begin("turn", None, {}).end({})
            scope.cancel()

    assert scope.cancel_called
    assert steered.free.is_set(), "its thread is told to give up"


async def test_trouble_is_reported_once_until_it_is_over(
    steered: Steered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the exporter tries, and its end is reported, too; losses are counted."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    telemetry = RecordingTelemetry()
    logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    async with open_tracing("1", telemetry, secrets=[], exporter=steered) as tracing:
        assert tracing is not None

        async def export(result: SpanExportResult) -> None:
            steered.result = result
            steered.entered.clear()
            tracing.begin("turn", None, {}).end({})
            await trio.to_thread.run_sync(steered.entered.wait, 5)
            if result is SpanExportResult.FAILURE:
                logger.error("Failed to export %s batch", "spans")

        for result in (SpanExportResult.FAILURE, SpanExportResult.FAILURE, SpanExportResult.SUCCESS):
            await export(result)
        await export(SpanExportResult.FAILURE)

    assert [record.getMessage() for record in caplog.records] == ["Failed to export spans batch"] * 2
    assert telemetry.events() == ["traces_exported_again"]
    assert telemetry.counts == {EXPORTED: 1, LOST: 3}


async def test_the_sdk_s_own_switch_turns_it_off(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """``OTEL_SDK_DISABLED=true``, as everywhere."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    telemetry = RecordingTelemetry()
    async with open_tracing("1", telemetry, secrets=[], exporter=steered) as tracing:
        assert tracing is None

    assert telemetry.events() == ["traces_disabled"]


async def test_a_variable_that_cannot_be_used_is_an_error_in_the_log(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which names it; the gateway serves without traces."""
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
    telemetry = RecordingTelemetry()
    async with open_tracing("1", telemetry, secrets=[], exporter=steered) as tracing:
        assert tracing is None

    (error,) = telemetry.errors()
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in str(error["reason"])


async def test_another_protocol_is_pointed_out(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """OTLP by gRPC is not there: spans go by HTTP all the same."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    telemetry = RecordingTelemetry()
    async with open_tracing("1", telemetry, secrets=[], exporter=steered):
        pass

    assert telemetry.events() == ["traces_protocol_unknown"]
