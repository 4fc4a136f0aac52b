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


SECONDS_ADDED = (
    *(0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
SECONDS_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SECONDS_LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
COUNTS = (1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0)

_COUNTER, _GAUGE, _HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM

OF_SUPERVISOR: tuple[Metric, ...] = (
    Metric("gateway_worker_up", _GAUGE, "1 when this worker answered, else 0.", ("worker",)),
    Metric("gateway_worker_restarts_total", _COUNTER, "Times that a worker was started again.", ("worker",)),
)
"""Of ``gateway serve --workers``: what the one process that serves nobody says of the others."""

METRICS: tuple[Metric, ...] = (
    *OF_SUPERVISOR,
    # ---- the process
    Metric("gateway_info", _GAUGE, "1, with the version that runs.", ("version",)),
    Metric("gateway_draining", _GAUGE, "1 while this node stops, else 0."),
    Metric(
        "gateway_event_loop_lag_seconds",
        _HISTOGRAM,
        "How late the event loop wakes a task that asked for a time: what every session waits for.",
        (),
        SECONDS_ADDED,
    ),
    Metric("gateway_bulkhead_catches_total", _COUNTER, "Crashes contained, by where.", ("where",)),
    Metric("gateway_errors_total", _COUNTER, "Errors told to clients, by code.", ("code",)),
    Metric("gateway_spans_exported_total", _COUNTER, "Spans exported, or lost on the way.", ("outcome",)),
    # ---- sockets
    Metric("gateway_sockets_open", _GAUGE, "Open WebSockets, by what they speak.", ("dialect",)),
    Metric("gateway_sockets_closed_total", _COUNTER, "WebSockets ended, by close code.", ("code",)),
    Metric("gateway_socket_frames_sent_total", _COUNTER, "Data frames given to sockets."),
    Metric("gateway_socket_bytes_sent_total", _COUNTER, "Payload given to sockets, before compression."),
    Metric("gateway_socket_frames_received_total", _COUNTER, "Data frames from sockets."),
    Metric("gateway_socket_bytes_received_total", _COUNTER, "Payload from sockets, decompressed."),
    Metric("gateway_socket_unacked_bytes", _GAUGE, "Memory of events sent to v2 sockets and not acked."),
    Metric("gateway_heartbeat_rtt_seconds", _HISTOGRAM, "Ping to pong.", (), SECONDS_SHORT),
    Metric("gateway_resumes_total", _COUNTER, "Sockets that joined a session, by outcome.", ("outcome",)),
    Metric("gateway_replayed_events_total", _COUNTER, "Events sent to sockets that came back for them."),
    Metric("gateway_messages_received_total", _COUNTER, "Client messages by type, but acks.", ("type",)),
    Metric("gateway_acks_received_total", _COUNTER, "Acknowledgements from v2 sockets."),
    # ---- sessions and turns
    Metric("gateway_sessions_live", _GAUGE, "Sessions held in memory."),
    Metric("gateway_replay_held_bytes", _GAUGE, "Memory of the events held for replay by all sessions."),
    Metric("gateway_turns_running", _GAUGE, "Turns with a place at the Agent Runtime."),
    Metric("gateway_turns_waiting", _GAUGE, "Turns that wait for a place among the running ones."),
    Metric("gateway_turns_total", _COUNTER, "Turns that ended, by outcome.", ("outcome",)),
    Metric("gateway_turn_seconds", _HISTOGRAM, "From a turn's start to its end.", (), SECONDS_LONG),
    Metric(
        "gateway_turn_resumes_total", _COUNTER, "Times that a turn's cut stream was asked to be continued."
    ),
    # ---- what comes from the Agent Runtime, and what the gateway adds
    Metric("gateway_tokens_total", _COUNTER, "Tokens of the Agent Runtime put into logs."),
    Metric("gateway_events_total", _COUNTER, "Events of the Agent Runtime put into logs, tokens included."),
    Metric("gateway_agent_events_total", _COUNTER, "Events that are no token, by type.", ("type",)),
    Metric("gateway_agent_events_skipped_total", _COUNTER, "Bad events skipped.", ("reason",)),
    Metric(
        "gateway_agent_head_seconds",
        _HISTOGRAM,
        "From the POST to the head of the runtime's answer.",
        (),
        SECONDS_SHORT,
    ),
    Metric(
        "gateway_first_event_seconds",
        _HISTOGRAM,
        "From the POST to the runtime's first event.",
        (),
        SECONDS_LONG,
    ),
    Metric(
        "gateway_first_event_added_seconds",
        _HISTOGRAM,
        "From the read of a turn's first event to the kernel of the first socket: what the gateway adds.",
        (),
        SECONDS_ADDED,
    ),
    Metric(
        "gateway_event_added_seconds",
        _HISTOGRAM,
        "The same for later events, one in 64, where no socket lags.",
        (),
        SECONDS_ADDED,
    ),
    # ---- the store
    Metric("gateway_store_commit_seconds", _HISTOGRAM, "Group commit time.", (), SECONDS_SHORT),
    Metric("gateway_store_batch_sessions", _HISTOGRAM, "Sessions in one group commit.", (), COUNTS),
    Metric("gateway_store_batch_events", _HISTOGRAM, "Events in one group commit.", (), COUNTS),
    Metric("gateway_store_failures_total", _COUNTER, "Commits or reads that the store refused."),
    # ---- callers
    Metric("gateway_auth_refusals_total", _COUNTER, "Callers turned away, by code.", ("code",)),
    Metric("gateway_rate_limited_total", _COUNTER, "Refused for speed, by what.", ("what",)),
    Metric("gateway_jwks_fetches_total", _COUNTER, "JWKS fetches by outcome.", ("outcome",)),
    Metric("gateway_rest_requests_total", _COUNTER, "REST calls.", ("method", "route", "status")),
    Metric("gateway_rest_seconds", _HISTOGRAM, "REST call time.", ("route",), SECONDS_SHORT),
    Metric("gateway_front_door_refusals_total", _COUNTER, "Heads refused.", ("reason",)),
)
