"""The ``Tracing`` port on OpenTelemetry, exported by OTLP. Imported only where traces are on.

How much is recorded and where it goes is said by OpenTelemetry's own environment variables
(``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``, …). Spans are exported by a thread of the SDK's,
from a bounded queue that takes without waiting: the event loop never waits for a collector.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.core.redaction import Redactor
from gateway.core.trace_context import TraceContext
from gateway.ports import Telemetry
from gateway.trace_ports import Attributes, Span, Tracing

FLUSH_SECONDS: Final = 3.0
"""How long a stop waits for the last spans to be exported."""
SERVICE_NAME: Final = "codelab-gateway"
_EXPORTED: Final = "gateway_spans_exported_total"
_LOGGERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)


@asynccontextmanager
async def open_tracing(
    version: str,
    telemetry: Telemetry,
    *,
    secrets: Iterable[str],
    exporter: SpanExporter | None = None,
) -> AsyncIterator[Tracing | None]:
    """Spans, exported by OTLP while the block lasts.

    None where ``OTEL_SDK_DISABLED`` says so, and where the SDK cannot use its variables: that is logged as an
    error, and no reason for a gateway not to serve.

    ``secrets`` are masked wherever they turn up in a span. Leaving exports what is left, for at most
    ``FLUSH_SECONDS``; when cancelled it does not wait at all.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        telemetry.info("traces_disabled", by="OTEL_SDK_DISABLED")
        yield None
        return
    protocol = _otlp_setting("PROTOCOL")
    if protocol not in ("", "http/protobuf"):
        telemetry.warning("traces_protocol_unknown", asked_for=protocol, used="http/protobuf")
    with _each_trouble_once() as recovered:
        try:
            watched = _Watched(OTLPSpanExporter() if exporter is None else exporter, telemetry, recovered)
            provider = TracerProvider(resource=_resource(version), shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(watched))
        except ValueError as error:
            telemetry.error("traces_misconfigured", reason=str(error), advice="correct the OTEL_ variables")
            yield None
            return
        try:
            yield OpenTelemetryTracing(provider.get_tracer("gateway", version), secrets=secrets)
        finally:
            try:
                with trio.move_on_after(FLUSH_SECONDS) as flushing:
                    await trio.to_thread.run_sync(provider.shutdown, abandon_on_cancel=True)
                if flushing.cancelled_caught:
                    telemetry.warning("traces_left_unexported", waited_s=FLUSH_SECONDS)
            finally:
                watched.shutdown()  # its thread gives up, if it still tries


class OpenTelemetryTracing(Tracing):
    """Begins spans with a tracer of OpenTelemetry's. ``secrets`` are masked wherever they turn up."""

    def __init__(self, tracer: Tracer, *, secrets: Iterable[str] = ()) -> None:
        self._tracer = tracer
        self._redactor = Redactor(secrets)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        """See ``trace_ports.Tracing``."""
        context = Context()
        if parent is not None:
            carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
            context = self._propagator.extract(carrier, context)
        span = self._tracer.start_span(
            name, context=context, kind=SpanKind.SERVER, attributes=self._safe(attributes)
        )
        return _Span(span, self._safe)

    def _safe(self, attributes: Attributes | None) -> dict[str, str | bool | int | float]:
        return {
            name: self._redactor.text(value) if isinstance(value, str) else value
            for name, value in (attributes or {}).items()
        }


class _Span(Span):
    """A span of OpenTelemetry's."""

    def __init__(
        self, span: OpenSpan, safe: Callable[[Attributes | None], dict[str, str | bool | int | float]]
    ) -> None:
        self._span = span
        self._safe = safe
        place = span.get_span_context()
        trace_id, span_id = f"{place.trace_id:032x}", f"{place.span_id:016x}"
        self._context = TraceContext(
            f"00-{trace_id}-{span_id}-{place.trace_flags:02x}", place.trace_state.to_header()
        )
        self._log_fields = {"trace_id": trace_id, "span_id": span_id}

    @property
    def context(self) -> TraceContext:
        """See ``trace_ports.Span``."""
        return self._context

    @property
    def log_fields(self) -> Mapping[str, str]:
        """See ``trace_ports.Span``."""
        return self._log_fields

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """See ``trace_ports.Span``."""
        self._span.add_event(name, self._safe(attributes))

    def end(self, attributes: Attributes, *, error: str = "") -> None:
        """See ``trace_ports.Span``."""
        self._span.set_attributes(self._safe(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class _Watched(SpanExporter):
    """An exporter whose results are counted; called by one thread, which is not Trio's."""

    def __init__(self, exporter: SpanExporter, telemetry: Telemetry, recovered: Callable[[], bool]) -> None:
        self._exporter = exporter
        self._telemetry = telemetry
        self._recovered = recovered
        self._is_shut_down = False
        for outcome in ("exported", "lost"):
            # Made here, so that the other thread only ever adds to what is there.
            telemetry.count(_EXPORTED, 0, outcome=outcome)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Pass on and count."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            is_success = result is SpanExportResult.SUCCESS
            self._telemetry.count(_EXPORTED, len(spans), outcome="exported" if is_success else "lost")
            if is_success and self._recovered():
                self._telemetry.info("traces_exported_again")
        return result

    def shutdown(self) -> None:
        """Give up what is being tried; idempotent."""
        if not self._is_shut_down:
            self._is_shut_down = True
            self._exporter.shutdown()


class _OncePerSpell(logging.Filter):
    """Lets each kind of trouble through once, until ``forget`` says that it is over.

    A collector that is away is tried several times a batch, for as long as it is away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reported: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is new in this spell."""
        is_new = str(record.msg) not in self._reported
        self._reported.add(str(record.msg))
        return is_new

    def forget(self) -> bool:
        """The spell is over; whether there was one."""
        had_any = bool(self._reported)
        self._reported.clear()
        return had_any


@contextmanager
def _each_trouble_once() -> Iterator[Callable[[], bool]]:
    """While this lasts, what the SDK logs of a failing export comes once per spell; gives what ends one."""
    once = _OncePerSpell()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(once)
    try:
        yield once.forget
    finally:
        for logger in loggers:
            logger.removeFilter(once)


def _resource(version: str) -> Resource:
    """What the spans are of; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` go before."""
    ours = {
        "service.name": SERVICE_NAME,
        "service.version": version,
        # One for each life of a process: nodes and workers are told apart by it.
        "service.instance.id": str(uuid.uuid4()),
    }
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    said = {item.partition("=")[0].strip() for item in given.split(",")}
    if os.environ.get("OTEL_SERVICE_NAME"):
        said.add("service.name")
    return Resource.create({name: value for name, value in ours.items() if name not in said})


def _otlp_setting(name: str) -> str:
    """A variable of the exporter, the one for traces first."""
    for prefix in ("OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"):
        if value := os.environ.get(prefix + name, "").strip():
            return value
    return ""
