"""The bounds that the session and its sockets live within, as one value made from the settings."""

from __future__ import annotations

from attrs import evolve, frozen


@frozen
class Limits:
    """Sizes are bytes, times are seconds."""

    max_message_bytes: int = 1 << 20
    max_queued_messages: int = 64
    """Waiting ``user_message``s per session; continuations (tool results, decisions) have as many again."""
    max_pending_calls: int = 256
    replay_events: int = 10_000
    replay_bytes: int = 64 << 20
    replay_total_bytes: int = 1 << 30
    """Events held in memory by all sessions together."""
    replay_retention: float = 600.0
    """How long a detached session's events are kept."""
    dedupe_window: float = 86_400.0
    merge_bytes: int = 64 << 10
    """First mark: from so much waiting for a v2 socket on, its waiting tokens are merged."""
    unacked_bytes: int = 512 << 10
    """Second mark: at so much unacknowledged by the fastest socket, the upstream is not read."""
    detach_grace: float = 120.0
    heartbeat_interval: float = 20.0
    pong_timeout: float = 10.0
    close_timeout: float = 5.0
    send_timeout: float = 10.0
    queue_timeout: float = 30.0
    max_concurrent_turns: int = 100
    max_sockets: int = 20_000
    max_sessions: int = 20_000
    max_sockets_per_subject: int = 50
    drain_timeout: float = 10.0

    @property
    def kept_in_memory(self) -> float:
        """How long a detached session that lives in one process only is kept: while it may be resumed."""
        return max(self.detach_grace, self.replay_retention)

    def of_one_process(self) -> Limits:
        """The bounds where nothing is stored: ids are forgotten with their session, no more is promised."""
        return evolve(self, dedupe_window=min(self.dedupe_window, self.kept_in_memory))
