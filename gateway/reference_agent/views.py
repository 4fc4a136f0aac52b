"""The routes that show agents, sessions, histories, approvals, metrics and the audit log."""

from typing import Any

import attrs
from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from gateway import __version__
from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.history import entry_to_json
from gateway.reference_agent.json_http import SESSION_ID, ProblemError, json_response, read_object
from gateway.reference_agent.runtime import Runtime
from gateway.reference_agent.session import AWAITING_DECISION, RESOLVED, SessionState
from gateway.reference_agent.state import audit_to_json

MAX_PAGE = 1000


def add_views(app: QuartTrio, runtime: Runtime) -> None:
    """Add the reading routes, and ``POST /sessions``."""
    store = runtime.store

    async def known(session_id: str) -> SessionState:
        state = await store.session(session_id)
        if state is None:
            raise ProblemError(404, f"There is no session {session_id[:128]!r}.")
        return state

    @app.get("/health")
    async def health() -> TrioResponse:
        return json_response({"status": "healthy", "service": "reference-agent", "version": __version__})

    @app.get("/agents")
    async def agents() -> TrioResponse:
        return json_response({"agents": [agent_to_json(name) for name in AGENTS]})

    @app.get("/agents/<session_id>/current")
    async def current_agent(session_id: str) -> TrioResponse:
        state = await known(session_id)
        return json_response(
            {
                "session_id": session_id,
                "agent": state.agent,
                "current_agent": state.agent,
                "chosen_by_client": state.pinned,
                "description": AGENTS[state.agent].description,
                "switches": [attrs.asdict(switch) for switch in state.switches],
            }
        )

    @app.get("/sessions")
    async def sessions() -> TrioResponse:
        limit, offset = _page(MAX_PAGE)
        # Not by X-User-ID: who may see what the gateway knows, and some of its callers see all.
        found, total = await store.sessions(request.args.get("user_id"), limit, offset)
        return json_response({"sessions": [session_to_json(one) for one in found], "total": total})

    @app.post("/sessions")
    async def create_session() -> TrioResponse:
        body = await read_object() if await request.get_data() else {}
        session_id, title = body.get("session_id"), body.get("title")
        if session_id is not None and not (isinstance(session_id, str) and SESSION_ID.fullmatch(session_id)):
            raise ProblemError(422, "`session_id` must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        if title is not None and not isinstance(title, str):
            raise ProblemError(422, "`title` must be a string.")
        state, is_new = await runtime.create_session(
            session_id, title=title, user_id=request.headers.get("X-User-ID")
        )
        return json_response(session_to_json(state), 201 if is_new else 200)

    @app.get("/sessions/<session_id>/history")
    async def history(session_id: str) -> TrioResponse:
        state = await known(session_id)
        entries = [entry_to_json(entry) for entry in await store.history(session_id)]
        return json_response(
            {"session_id": session_id, "agent": state.agent, "messages": entries, "total": len(entries)}
        )

    @app.get("/sessions/<session_id>/pending-approvals")
    async def pending_approvals(session_id: str) -> TrioResponse:
        state = await known(session_id)
        pending = [
            {
                "call_id": call.call_id,
                "tool_name": call.tool_name,
                "arguments": call.arguments,
                "agent": call.agent,
                "reason": call.reason,
                "created_at": call.at,
            }
            for call in state.calls
            if call.status == AWAITING_DECISION
        ]
        return json_response({"session_id": session_id, "pending_approvals": pending, "total": len(pending)})

    @app.get("/events/metrics")
    async def metrics() -> TrioResponse:
        _, total = await store.sessions(None, 1, 0)
        return json_response(
            {
                "sessions": total,
                "running_turns": runtime.running_turns,
                "metrics": dict(await store.metric_totals()),
            }
        )

    @app.get("/events/metrics/sessions")
    async def metrics_of_sessions() -> TrioResponse:
        limit, offset = _page(MAX_PAGE)
        found, total = await store.sessions(request.args.get("user_id"), limit, offset)
        return json_response({"sessions": [metrics_to_json(one) for one in found], "total": total})

    @app.get("/events/metrics/session/<session_id>")
    async def metrics_of_session(session_id: str) -> TrioResponse:
        return json_response(metrics_to_json(await known(session_id)))

    @app.get("/events/stats")
    async def statistics() -> TrioResponse:
        counts = dict(await store.audit_counts())
        return json_response({"events_by_type": counts, "total": sum(counts.values())})

    @app.get("/events/audit-log")
    async def audit_log() -> TrioResponse:
        limit, offset = _page(100)
        found, total = await store.audit(
            request.args.get("session_id"), request.args.get("event_type"), limit, offset
        )
        return json_response({"events": [audit_to_json(one) for one in found], "total": total})


def agent_to_json(name: str) -> dict[str, Any]:
    """What ``GET /agents`` says of one agent."""
    agent = AGENTS[name]
    return {
        "name": agent.name,
        "type": agent.name,
        "title": agent.title,
        "description": agent.description,
        "tools": list(agent.tools),
        "writable": [] if not set(agent.tools) & {"write_file", "edit_file"} else list(agent.writable),
    }


def session_to_json(state: SessionState) -> dict[str, Any]:
    """What ``GET /sessions`` says of one session."""
    return {
        "session_id": state.session_id,
        "title": state.title,
        "user_id": state.user_id,
        "agent": state.agent,
        "created_at": state.created_at,
        "updated_at": state.updated_at,
        "message_count": state.entries,
        "open_calls": sum(call.status != RESOLVED for call in state.calls),
    }


def metrics_to_json(state: SessionState) -> dict[str, Any]:
    """What the metrics routes say of one session."""
    return {"session_id": state.session_id, "updated_at": state.updated_at, "metrics": dict(state.metrics)}


def _page(default: int) -> tuple[int, int]:
    def number(name: str, otherwise: int, most: int) -> int:
        given = request.args.get(name, str(otherwise))
        if not (given.isascii() and given.isdecimal() and len(given) < 10):
            raise ProblemError(422, f"`{name}` must be a whole number.")
        return min(int(given), most)

    return number("limit", default, MAX_PAGE), number("offset", 0, 10**9)
