"""The Telemetry port on structlog and prometheus-client."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, TextIO

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from gateway.core.metrics import METRICS, Metric, MetricKind
from gateway.core.overview import JournalEntry
from gateway.core.redaction import Redactor, one_line

MAX_LABEL_SETS = 100
"""Label combinations kept per metric; further ones are counted as ``other``. Labels are meant to be bounded
(``core/metrics.py``); this holds when one turns out to be a caller's choice."""

JOURNAL_ENTRIES = 4096
"""Log entries kept for ``StructlogTelemetry.entries``: 2 MB, and some minutes of a busy gateway."""

_MAX_TRACEBACK = 16_000
_TROUBLES = frozenset({"warning", "error"})
_RESERVED = frozenset({"timestamp", "level", "event", "exception"})


class StructlogTelemetry:
    """Logs to a text stream, one line per event, and metrics in a registry of its own.

    Nothing raises: a line that cannot be written is dropped, a metric that is not declared is reported once.
    ``log_format`` is ``json`` or ``console``; in the latter a traceback follows its line, indented.
    ``secrets`` are masked wherever they turn up; ``bound`` fields are on every line.
    For the thread that runs Trio; logging of dependencies may come from any thread.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        log_level: str = "INFO",
        log_format: str = "json",
        secrets: Iterable[str] = (),
        bound: Mapping[str, object] = MappingProxyType({}),
        metrics: Sequence[Metric] = METRICS,
    ) -> None:
        self._redactor = Redactor(secrets)
        self._bound = bound
        self._level = logging.getLevelNamesMapping()[log_level]
        self._logger = structlog.wrap_logger(
            structlog.WriteLogger(stream),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                self._redact,
                _to_console(stream) if log_format == "console" else _to_json(),
            ],
            wrapper_class=structlog.BoundLogger,
            context_class=dict,
            cache_logger_on_first_use=True,
        )
        self._metrics = _MetricStore(metrics)
        self._reported: set[str] = set()
        self._journal: deque[tuple[int, float, str, str, Mapping[str, object]]] = deque(
            maxlen=JOURNAL_ENTRIES
        )
        self._number = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._metrics)
        ProcessCollector(registry=self._registry)

    # ---- logs

    def debug(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self._keep("debug", event, fields)
        if self._level <= logging.DEBUG:
            self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self._keep("info", event, fields)
        if self._level <= logging.INFO:
            self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        self._keep("warning", event, fields)
        if self._level <= logging.WARNING:
            self._write("warning", event, fields)

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """See ``ports.Telemetry``."""
        # Its traceback holds frames, and with them whatever they hold: only the name is kept.
        self._keep("error", event, fields if cause is None else {**fields, "cause": type(cause).__name__})
        self._write("error", event, fields, cause)

    def _keep(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        self._number += 1
        self._journal.append((self._number, time.time(), level, event, fields))

    def entries(
        self, *, session_id: str | None = None, troubles_only: bool = False, after: int = 0, limit: int = 100
    ) -> Sequence[JournalEntry]:
        """See ``operator_ports.Journal``; the last ``JOURNAL_ENTRIES`` are kept."""
        found: list[JournalEntry] = []
        for number, at, level, event, fields in reversed(self._journal):
            if number <= after or len(found) >= limit:
                break
            if troubles_only and level not in _TROUBLES:
                continue
            if session_id is not None and fields.get("session_id") != session_id:
                continue
            safe = {name: self._redactor.field(name, value) for name, value in fields.items()}
            found.append(JournalEntry(number, at, level, one_line(self._redactor.text(event)), safe))
        found.reverse()
        return found

    def _write(
        self, level: str, event: str, fields: Mapping[str, object], cause: BaseException | None = None
    ) -> None:
        # A closed or full pipe, or an object whose str() fails, must not end what was being logged.
        with contextlib.suppress(Exception):
            self._logger._proxy_to_logger("msg", event, level=level, fields=fields, cause=cause)

    def _redact(self, _logger: object, _method: str, entry: MutableMapping[str, Any]) -> dict[str, Any]:
        safe: dict[str, Any] = {
            "timestamp": entry["timestamp"],
            "level": entry["level"],
            "event": one_line(self._redactor.text(str(entry["event"]))),
        }
        for name, value in {**self._bound, **entry["fields"]}.items():
            safe[f"{name}_" if name in _RESERVED else name] = self._redactor.field(name, value)
        if entry["cause"] is not None:
            lines = "".join(traceback.format_exception(entry["cause"])).rstrip("\n")
            safe["exception"] = self._redactor.text(lines, _MAX_TRACEBACK)
        return safe

    # ---- metrics

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """See ``ports.Telemetry``."""
        cell = self._metrics.cell(metric, labels, MetricKind.COUNTER)
        if cell is not None and amount >= 0:
            cell.value += amount
        else:
            self._report(metric)

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """See ``ports.Telemetry``."""
        cell = self._metrics.cell(metric, labels, MetricKind.HISTOGRAM)
        if cell is None:
            self._report(metric)
            return
        cell.value += value
        for index, bound in enumerate(cell.bounds):
            if value <= bound:
                cell.buckets[index] += 1
                return

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """See ``ports.Telemetry``."""
        cell = self._metrics.cell(metric, labels, MetricKind.GAUGE)
        if cell is not None:
            cell.value = value
        else:
            self._report(metric)

    def render(self) -> bytes:
        """All metrics as Prometheus text."""
        return generate_latest(self._registry)

    def _report(self, metric: str) -> None:
        if metric not in self._reported and len(self._reported) < MAX_LABEL_SETS:
            self._reported.add(metric)
            self.error("metric is not declared so, or its amount is negative", metric=metric)

    # ---- dependencies

    @contextlib.contextmanager
    def route_standard_logging(self, *, dedicated: Sequence[str] = ("hypercorn.error",)) -> Iterator[None]:
        """While this lasts, warnings and worse of dependencies that use ``logging`` are written here.

        Handlers that the root logger and the ``dedicated`` loggers have are set aside and put back after.
        """
        handler = _StandardLogHandler(self)
        saved = []
        for name in ("", *dedicated):
            logger = logging.getLogger(name)
            saved.append((logger, logger.handlers, logger.level, logger.propagate))
            logger.handlers = [handler] if not name else []
            logger.setLevel(logging.WARNING)
            logger.propagate = True
        try:
            yield
        finally:
            for logger, handlers, level, propagate in saved:
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)


class _StandardLogHandler(logging.Handler):
    def __init__(self, telemetry: StructlogTelemetry) -> None:
        super().__init__(logging.WARNING)
        self._telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            if record.levelno >= logging.ERROR:
                cause = record.exc_info[1] if record.exc_info else None
                self._telemetry.error(record.getMessage(), cause=cause, logger=record.name)
            else:
                self._telemetry.warning(record.getMessage(), logger=record.name)


def _to_json() -> structlog.typing.Processor:
    def write_line(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> str:
        return json.dumps(entry, ensure_ascii=True, default=str)

    return write_line


def _to_console(stream: TextIO) -> structlog.typing.Processor:
    render = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), sort_keys=False, pad_event_to=0, exception_formatter=lambda *_: None
    )

    def write_lines(logger: Any, method: str, entry: MutableMapping[str, Any]) -> str:
        # Indented and without control characters, so that no exception text can pass for a line of ours.
        trace = entry.pop("exception", "")
        lines = "".join(f"\n    | {one_line(line)}" for line in trace.splitlines())
        return f"{render(logger, method, entry)}{lines}"

    return write_lines


class _Cell:
    """One time series."""

    __slots__ = ("bounds", "buckets", "value")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.value = 0.0
        self.bounds = bounds
        self.buckets = [0] * len(bounds)


class _MetricStore(Collector):
    """Holds the numbers; prometheus-client asks for them at each scrape.

    prometheus-client's own instruments take a lock per increment and export a creation time per series.
    One thread counts here, so a dict lookup and an addition do.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = {metric.name: metric for metric in metrics}
        self._cells: dict[str, dict[tuple[str, ...], _Cell]] = {metric.name: {} for metric in metrics}
        self._cache: dict[tuple[object, ...], _Cell] = {}
        for metric in metrics:
            if not metric.labels:
                self.cell(metric.name, {}, metric.kind)

    def cell(self, name: str, labels: dict[str, str], kind: MetricKind) -> _Cell | None:
        """The series of these labels, made when it is new; None when the metric is not declared so."""
        key = (kind, name, *labels, *labels.values()) if labels else (kind, name)
        cell = self._cache.get(key)
        return cell if cell is not None else self._make(name, labels, kind, key)

    def _make(
        self, name: str, labels: dict[str, str], kind: MetricKind, key: tuple[object, ...]
    ) -> _Cell | None:
        metric = self._metrics.get(name)
        if metric is None or metric.kind is not kind or set(labels) != set(metric.labels):
            return None
        cells = self._cells[name]
        values = tuple(labels[label] for label in metric.labels)
        if values not in cells and len(cells) >= MAX_LABEL_SETS:
            # Not cached either: the cache must not grow with a caller's imagination.
            return cells.setdefault(("other",) * len(values), _Cell(_bounds(metric)))
        cell = cells.setdefault(values, _Cell(_bounds(metric)))
        self._cache[key] = cell
        return cell

    def collect(self) -> Iterator[Family]:
        """All series in prometheus-client's form."""
        for metric in self._metrics.values():
            yield _family(metric, self._cells[metric.name])


def _bounds(metric: Metric) -> tuple[float, ...]:
    return (*metric.buckets, float("inf")) if metric.kind is MetricKind.HISTOGRAM else ()


def _family(metric: Metric, cells: Mapping[tuple[str, ...], _Cell]) -> Family:
    if metric.kind is MetricKind.HISTOGRAM:
        histogram = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for values, cell in cells.items():
            buckets: list[tuple[str, float]] = []
            total = 0
            for bound, number in zip(cell.bounds, cell.buckets, strict=True):
                total += number
                buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
            histogram.add_metric(values, buckets, cell.value)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind is MetricKind.COUNTER:
        family = CounterMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    else:
        family = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for values, cell in cells.items():
        family.add_metric(values, cell.value)
    return family
