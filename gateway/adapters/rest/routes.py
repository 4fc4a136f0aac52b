"""The REST routes that are passed on to the Agent Runtime (protocol.md section 1), as data."""

from __future__ import annotations

import enum

from attrs import frozen

from gateway.core.identity import SCOPE_READ, SCOPE_WRITE

API_PREFIX = "/api/v1"
"""Before every route here; the Agent Runtime has the same paths without it."""


class Visibility(enum.Enum):
    """How a route is kept to the caller's own sessions. The internal key is under none of it."""

    EVERYBODY = "everybody"
    """Says nothing about a single session."""
    ONE_SESSION = "one session"
    """About the session in the path: 403 when it is another subject's."""
    OWN_SESSIONS = "own sessions"
    """A list of sessions: others are left out."""
    OWN_ENTRIES = "own entries"
    """A list of entries with a ``session_id`` each: others are left out, except for ``api:admin``."""
    CREATES = "creates"
    """Makes a session, which then belongs to the caller."""


@frozen
class ProxyRoute:
    """One route: what the caller asks for and what it needs for it."""

    method: str
    path: str
    """With ``{session_id}`` where that stands."""
    summary: str
    visibility: Visibility = Visibility.EVERYBODY

    @property
    def scope(self) -> str:
        """The scope that a token must carry (protocol.md section 7)."""
        return SCOPE_WRITE if self.method == "POST" else SCOPE_READ

    @property
    def public_path(self) -> str:
        """The path at the gateway."""
        return API_PREFIX + self.path


PROXY_ROUTES: tuple[ProxyRoute, ...] = (
    ProxyRoute("GET", "/agents", "The agents that can answer."),
    ProxyRoute(
        "GET",
        "/agents/{session_id}/current",
        "The agent that a session is with now.",
        Visibility.ONE_SESSION,
    ),
    ProxyRoute("GET", "/sessions", "The caller's sessions.", Visibility.OWN_SESSIONS),
    ProxyRoute("POST", "/sessions", "Create a session; it belongs to the caller.", Visibility.CREATES),
    ProxyRoute(
        "GET", "/sessions/{session_id}/history", "What was said in a session.", Visibility.ONE_SESSION
    ),
    ProxyRoute(
        "GET",
        "/sessions/{session_id}/pending-approvals",
        "Tool calls of a session that wait for a decision.",
        Visibility.ONE_SESSION,
    ),
    ProxyRoute("GET", "/events/metrics", "Figures of the Agent Runtime over all sessions."),
    ProxyRoute("GET", "/events/metrics/sessions", "Figures by session.", Visibility.OWN_SESSIONS),
    ProxyRoute(
        "GET", "/events/metrics/session/{session_id}", "Figures of one session.", Visibility.ONE_SESSION
    ),
    ProxyRoute("GET", "/events/stats", "How many events of each type there were."),
    ProxyRoute("GET", "/events/audit-log", "What happened, in order.", Visibility.OWN_ENTRIES),
)
