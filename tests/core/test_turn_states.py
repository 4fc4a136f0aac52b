"""The one table of transitions, and the signal that open calls give."""

from __future__ import annotations

from itertools import product

import pytest

from gateway.core.storage import PendingCall, TurnState
from gateway.core.turn_states import TRANSITIONS, Signal, mermaid, signal_at_rest

PENDING_STATES = {
    Signal.NOTHING_PENDING: TurnState.IDLE,
    Signal.TOOL_PENDING: TurnState.AWAITING_TOOL,
    Signal.APPROVAL_PENDING: TurnState.AWAITING_APPROVAL,
}


@pytest.mark.parametrize(("state", "signal"), list(product(TurnState, Signal)))
def test_each_transition_leads_where_its_signal_says(state: TurnState, signal: Signal) -> None:
    """START leads to running and the others to the state of that name, wherever they are possible."""
    after = TRANSITIONS.get((state, signal))
    if after is not None:
        assert after is PENDING_STATES.get(signal, TurnState.RUNNING)


def test_what_can_never_happen_is_not_in_the_table() -> None:
    """No second turn beside one that runs, and no new call while none runs."""
    missing = set(product(TurnState, Signal)) - set(TRANSITIONS)
    assert missing == {
        (TurnState.RUNNING, Signal.START),
        (TurnState.IDLE, Signal.TOOL_PENDING),
        (TurnState.IDLE, Signal.APPROVAL_PENDING),
        (TurnState.AWAITING_TOOL, Signal.APPROVAL_PENDING),
    }


def test_a_decision_outranks_a_result() -> None:
    """One call that waits for a person makes the session wait for the person."""
    tool = PendingCall("a", False, b"{}")
    approval = PendingCall("b", True, b"{}")
    assert signal_at_rest([]) is Signal.NOTHING_PENDING
    assert signal_at_rest([tool]) is Signal.TOOL_PENDING
    assert signal_at_rest([tool, approval, tool]) is Signal.APPROVAL_PENDING


def test_the_diagram_has_every_transition_that_changes_the_state() -> None:
    """Generated from the table, one line each."""
    lines = mermaid().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> idle"]
    assert len(lines) - 2 == sum(before is not after for (before, _), after in TRANSITIONS.items())
    assert "    running --> awaiting_approval: approval pending" in lines
