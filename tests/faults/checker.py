"""Judges a session by its record alone: what was said, received and asked. Knows nothing of the gateway."""

from __future__ import annotations

from collections.abc import Sequence

from tests.faults.agent_runtime import Execution, Post
from tests.faults.check_delivery import check_caught_up, check_v2_client, read_audit
from tests.faults.check_messages import check_decisions, check_messages
from tests.faults.check_state import check_state
from tests.faults.check_turns import Turn, check_turns, read_turns
from tests.faults.check_v1 import check_v1_client
from tests.faults.records import SessionRecord
from tests.faults.violations import Violation


def check_session(
    session: SessionRecord, posts: Sequence[Post], executions: Sequence[Execution]
) -> tuple[list[Violation], dict[str, Turn]]:
    """Every promise that was broken in this session; and its turns.

    ``posts`` are those of this session, ``executions`` the runtime's of all sessions.
    """
    session_id = session.session_id
    timeline, violations = read_audit(session)
    turns, disorder = read_turns(session_id, timeline)
    violations += disorder
    violations += check_turns(session, turns, posts, executions)
    violations += check_messages(session, turns, posts)
    violations += check_decisions(session, timeline, posts)
    last_seq = max(timeline, default=0)
    for client in session.clients:
        if client.is_v2:
            violations += check_v2_client(session, client, timeline)
            violations += check_state(session, client, timeline)
            violations += check_caught_up(session, client, last_seq)
        else:
            violations += check_v1_client(session, client, timeline)
    if session.final is not None:
        state, pending = session.final["turn"]["state"], session.final["pending"]
        if any(client.is_v2 for client in session.clients) and (state != "idle" or pending):
            text = f"all is answered, and yet the session is {state} with {len(pending)} calls open"
            violations.append(Violation("stuck", session_id, "welcome", text))
    return violations, turns
