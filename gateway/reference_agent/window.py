"""How much of a history an LLM is given.

The rule: the newest exchange (a user's entry and what followed it) is always kept. Older exchanges are
dropped whole, oldest first, until the estimate fits; entries of the role ``system`` in them stay. When the
newest exchange alone is too large, its longest tool results are shortened to their beginning and end. A tool
call is therefore never separated from its result, and the user's words are never cut.
"""

import attrs

from gateway.reference_agent.history import Entry

ENTRY_OVERHEAD = 8
"""Tokens an entry costs beside its text, as OpenAI's cookbook counts them, rounded up."""

SHORTENED_TO = 2_000
"""Characters that stay of a shortened tool result."""


def estimate_tokens(entry: Entry) -> int:
    """About how many tokens an entry costs: a token per four bytes of UTF-8, no tokenizer needed."""
    size = len(entry.content.encode())
    size += sum(len(call.tool_name) + len(str(call.arguments).encode()) for call in entry.tool_calls)
    return size // 4 + ENTRY_OVERHEAD


def window(history: tuple[Entry, ...], budget: int) -> tuple[Entry, ...]:
    """The part of ``history`` that fits into ``budget`` tokens by the rule of this module."""
    exchanges = _exchanges(history)
    total = sum(estimate_tokens(entry) for entry in history)
    kept: list[Entry] = []
    for exchange in exchanges[:-1]:
        if total <= budget:
            kept.extend(exchange)
            continue
        stays = [entry for entry in exchange if entry.role == "system"]
        total -= sum(estimate_tokens(entry) for entry in exchange if entry.role != "system")
        kept.extend(stays)
    newest = list(exchanges[-1]) if exchanges else []
    by_size = sorted(range(len(newest)), key=lambda index: len(newest[index].content), reverse=True)
    for index in by_size:
        if total <= budget:
            break
        entry = newest[index]
        if entry.role == "tool" and len(entry.content) > SHORTENED_TO:
            newest[index] = attrs.evolve(entry, content=_shorten(entry.content))
            total -= estimate_tokens(entry) - estimate_tokens(newest[index])
    return (*kept, *newest)


def _exchanges(history: tuple[Entry, ...]) -> list[list[Entry]]:
    exchanges: list[list[Entry]] = []
    for entry in history:
        if entry.role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(entry)
    return exchanges


def _shorten(text: str) -> str:
    half = SHORTENED_TO // 2
    return f"{text[:half]}\n(… {len(text) - 2 * half} characters left out …)\n{text[-half:]}"
