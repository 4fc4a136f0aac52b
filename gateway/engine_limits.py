"""What the engine is bounded by, taken from the settings."""

from __future__ import annotations

from gateway.core.limits import Limits
from gateway.settings import Settings


def limits_of(settings: Settings) -> Limits:
    """The engine's bounds, from the settings."""
    return Limits(
        max_message_bytes=settings.max_message_bytes,
        max_queued_messages=settings.max_queued_messages,
        replay_events=settings.replay_events,
        replay_bytes=settings.replay_bytes,
        replay_total_bytes=settings.replay_total_bytes,
        replay_retention=settings.replay_retention,
        dedupe_window=settings.dedupe_window,
        merge_bytes=settings.ws_merge_bytes,
        unacked_bytes=settings.ws_unacked_bytes,
        detach_grace=settings.detach_grace,
        heartbeat_interval=settings.ws_heartbeat_interval,
        pong_timeout=settings.ws_pong_timeout,
        close_timeout=settings.ws_close_timeout,
        send_timeout=settings.ws_send_timeout,
        queue_timeout=settings.queue_timeout,
        max_concurrent_turns=settings.max_concurrent_requests,
        max_sockets=settings.max_sockets,
        max_sessions=settings.max_sessions,
        max_sockets_per_subject=settings.max_sockets_per_subject,
        drain_timeout=settings.drain_timeout,
    )
