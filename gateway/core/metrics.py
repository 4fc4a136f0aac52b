"""The names of all metrics: kind, help text and labels, in one place.

Adapters export them; the engine names them. Labels are bounded: never a session id, a subject or an address.
"""

from __future__ import annotations

import enum

from attrs import frozen


class MetricKind(enum.Enum):
    """How Prometheus treats the values."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@frozen
class Metric:
    """One metric: its name (Prometheus conventions, base units), meaning and label names."""

    name: str
    kind: MetricKind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in its base unit."""


SECONDS_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SECONDS_LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

METRICS: tuple[Metric, ...] = (
    Metric("gateway_sockets_open", MetricKind.GAUGE, "Open WebSockets.", ("dialect",)),
    Metric("gateway_sockets_closed_total", MetricKind.COUNTER, "WebSockets ended, by close code.", ("code",)),
    Metric("gateway_sessions_live", MetricKind.GAUGE, "Sessions held in memory."),
    Metric("gateway_turns_running", MetricKind.GAUGE, "Turns with an open stream to the Agent Runtime."),
    Metric("gateway_turns_waiting", MetricKind.GAUGE, "Turns that wait for a place among the running ones."),
    Metric("gateway_turns_total", MetricKind.COUNTER, "Turns that ended, by outcome.", ("outcome",)),
    Metric("gateway_turn_seconds", MetricKind.HISTOGRAM, "From a turn's start to its end.", (), SECONDS_LONG),
    Metric(
        "gateway_first_event_seconds",
        MetricKind.HISTOGRAM,
        "From the POST to the runtime's first event.",
        (),
        SECONDS_LONG,
    ),
    Metric("gateway_messages_received_total", MetricKind.COUNTER, "Client messages by type.", ("type",)),
    Metric("gateway_events_total", MetricKind.COUNTER, "Events of the Agent Runtime put into logs."),
    Metric("gateway_agent_events_skipped_total", MetricKind.COUNTER, "Bad events skipped.", ("reason",)),
    Metric("gateway_errors_total", MetricKind.COUNTER, "Errors told to clients, by code.", ("code",)),
    Metric("gateway_resumes_total", MetricKind.COUNTER, "Returning sockets by outcome.", ("outcome",)),
    Metric("gateway_heartbeat_rtt_seconds", MetricKind.HISTOGRAM, "Ping to pong.", (), SECONDS_SHORT),
    Metric("gateway_store_commit_seconds", MetricKind.HISTOGRAM, "Group commit time.", (), SECONDS_SHORT),
    Metric("gateway_store_failures_total", MetricKind.COUNTER, "Commits or reads that the store refused."),
    Metric("gateway_auth_refusals_total", MetricKind.COUNTER, "Callers turned away, by code.", ("code",)),
    Metric("gateway_rate_limited_total", MetricKind.COUNTER, "Refused for speed, by what.", ("what",)),
    Metric("gateway_jwks_fetches_total", MetricKind.COUNTER, "JWKS fetches by outcome.", ("outcome",)),
    Metric("gateway_rest_requests_total", MetricKind.COUNTER, "REST calls.", ("method", "route", "status")),
    Metric("gateway_rest_seconds", MetricKind.HISTOGRAM, "REST call time.", ("route",), SECONDS_SHORT),
    Metric("gateway_bulkhead_catches_total", MetricKind.COUNTER, "Crashes contained, by where.", ("where",)),
    Metric("gateway_front_door_refusals_total", MetricKind.COUNTER, "Heads refused.", ("reason",)),
)
