"""What is left of a history that is too long."""

from gateway.reference_agent.history import Entry, RequestedCall
from gateway.reference_agent.window import SHORTENED_TO, estimate_tokens, window

AT = "2026-01-01T00:00:00Z"


def exchange(name: str, size: int = 400) -> tuple[Entry, ...]:
    """A question, a call, its result and an answer."""
    return (
        Entry("user", f"{name}?", AT),
        Entry("assistant", "", AT, tool_calls=(RequestedCall(name, "read_file", {}),)),
        Entry("tool", "x" * size, AT, call_id=name),
        Entry("assistant", f"{name}!", AT),
    )


def cost(*entries: Entry) -> int:
    """The estimate for all entries."""
    return sum(estimate_tokens(entry) for entry in entries)


def test_what_fits_is_left_alone() -> None:
    """To the token."""
    history = exchange("a") + exchange("b")
    assert window(history, cost(*history)) == history


def test_whole_exchanges_are_dropped_oldest_first() -> None:
    """A call never loses its result; context given by the IDE stays."""
    context = Entry("system", "a monorepo", AT)
    history = (*exchange("a"), context, *exchange("b"), *exchange("c"))
    assert window(history, cost(*history) - 1) == (context, *exchange("b"), *exchange("c"))
    assert window(history, 1) == (context, *exchange("c"))


def test_the_newest_exchange_has_its_longest_results_shortened() -> None:
    """Beginning and end stay, the user's words are never cut."""
    question = Entry("user", "y" * 50_000, AT)
    history = (question, *exchange("a", 9_000)[1:], *exchange("b", 90_000)[1:])
    kept = window(history, cost(*history) - 20_000)
    assert kept[0] == question
    assert (len(kept[2].content), len(kept[5].content)) == (9_000, SHORTENED_TO + 33)
    assert "88000 characters left out" in kept[5].content
    assert len(window(history, 1)[2].content) < 9_000


def test_an_empty_history_is_fine() -> None:
    """Nothing in, nothing out."""
    assert window((), 10) == ()
