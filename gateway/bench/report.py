"""Outcomes as tables for people, and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence

import msgspec

from gateway.bench.load import Measurement
from gateway.bench.percentiles import median
from gateway.bench.runner import Outcome

_BESIDE: Mapping[str, Callable[[Measurement], float | None]] = {
    "token p50": lambda measured: (measured.token_ms or {}).get("p50"),
    "p99": lambda measured: (measured.token_ms or {}).get("p99"),
    "p99 of a second": lambda measured: measured.second_p99_ms,
}


def table(outcomes: Sequence[Outcome]) -> str:
    """One block per step, medians over the rounds."""
    blocks = []
    for step in dict.fromkeys(outcome.step for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.step == step]
        rounds = len(mine[0].rounds)
        title = step.title if rounds == 1 else f"{step.title} (median of {rounds})"
        rows = [_cells(outcome.subject.name, outcome.median()) for outcome in mine]
        blocks.append(f"{title}\n{aligned(rows)}" + _ratios(mine))
    for scenario in dict.fromkeys(outcome.step.scenario for outcome in outcomes):
        blocks += _beside(scenario, outcomes)
    blocks.append("Three figures with strokes between them are p50 / p99 / p99.9.")
    return "\n\n".join(blocks) + "\n"


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows under their headings; columns that are empty everywhere are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    columns: list[list[str]] = []
    for name in names:
        cells = [name, *(row[name] or "-" for row in rows)]
        width = max(map(len, cells))
        # Names to the left, figures to the right, as tables are read.
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in cells])
    return "\n".join("  " + "  ".join(line).rstrip() for line in zip(*columns, strict=True))


def as_json(outcomes: Sequence[Outcome]) -> bytes:
    """Everything that was measured, each round and the medians."""
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "machine": machine(),
                "outcomes": [
                    {
                        "scenario": outcome.step.scenario,
                        "sessions": outcome.step.sessions,
                        "tokens": outcome.step.tokens,
                        "pace_s": outcome.step.pace,
                        "neighbours": outcome.step.neighbours and outcome.step.neighbours.title,
                        "subject": outcome.subject.name,
                        "dialect": outcome.subject.dialect,
                        "is_peer": outcome.subject.is_peer,
                        "median": outcome.median(),
                        "rounds": outcome.rounds,
                    }
                    for outcome in outcomes
                ],
            }
        ),
        indent=2,
    )


def ratios(outcome: Outcome, baseline: Outcome, figure: Callable[[Measurement], float | None]) -> list[float]:
    """What a figure is if the baseline's is 1, round by round, where both have it."""
    pairs = [
        (figure(mine), figure(theirs)) for mine, theirs in zip(outcome.rounds, baseline.rounds, strict=True)
    ]
    return [mine / theirs for mine, theirs in pairs if mine is not None and theirs]


def _beside(scenario: str, outcomes: Sequence[Outcome]) -> list[str]:
    """What neighbours do to the p99 of the others: medians over the rounds, each against its own baseline."""
    mine = [outcome for outcome in outcomes if outcome.step.scenario == scenario]
    mine = [outcome for outcome in mine if outcome.step.kind == "stream"]
    if not any(outcome.step.neighbours for outcome in mine):
        return []
    lines = []
    for subject in dict.fromkeys(outcome.subject for outcome in mine):
        baseline, *others = [outcome for outcome in mine if outcome.subject == subject]
        for outcome in others:
            assert outcome.step.neighbours is not None
            found = [
                f"{name} {median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                for name, figure in _BESIDE.items()
                if (values := ratios(outcome, baseline, figure))
            ]
            lines.append(f"  {subject.name}, beside {outcome.step.neighbours.title}: {', '.join(found)}")
    return ["\n".join([f"{scenario}: if that of {mine[0].step.title.partition(': ')[2]} is 1", *lines])]


def machine() -> dict[str, str]:
    """What it was measured on, as far as a reader may know."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }


def _cells(name: str, measured: Measurement) -> dict[str, str]:
    return {
        "": name,
        "tokens/s": "" if measured.tokens_per_s is None else f"{measured.tokens_per_s:,.0f}",
        "CPU µs/token": number(measured.cpu_us_per_token),
        "CPU %": number(measured.cpu_percent),
        "first token ms": spread(measured.first_token_ms),
        "token ms": spread(measured.token_ms),
        "resume ms": spread(measured.resume_ms),
        "beside tokens/s": ""
        if measured.neighbour_tokens_per_s is None
        else f"{measured.neighbour_tokens_per_s:,.0f}",
        "given up after s": number(measured.given_up_after_s),
        "closed after s": number(measured.closed_after_s),
        "not closed": "" if measured.still_open is None else str(measured.still_open),
        "KB/stalled": number(measured.kb_per_stalled),
        "KB/socket": number(measured.kb_per_socket) if measured.tokens == 0 else "",
        "resident MB": number(measured.resident_mb),
    }


def number(value: float | None) -> str:
    """With one decimal; empty for None."""
    return "" if value is None else f"{value:.1f}"


def spread(percentiles: Mapping[str, float] | None) -> str:
    """p50 / p99 / p99.9; empty for None."""
    if percentiles is None:
        return ""
    return " / ".join(f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in percentiles.values())


def _ratios(outcomes: Sequence[Outcome]) -> str:
    """How each compares with each peer."""
    figures: dict[str, Callable[[Measurement], float | None]] = {
        "CPU per token": lambda measured: measured.cpu_us_per_token
    }
    if outcomes[0].step.pace:  # In bursts latency is the queue's.
        figures["token p50"] = _BESIDE["token p50"]
        figures["token p99"] = _BESIDE["p99"]
    lines = []
    for peer in (outcome for outcome in outcomes if outcome.subject.is_peer):
        for name, figure in figures.items():
            theirs = figure(peer.median())
            found = [
                f"{outcome.subject.name} {ours / theirs:.2f}"
                for outcome in outcomes
                if theirs and not outcome.subject.is_peer and (ours := figure(outcome.median()))
            ]
            if found:
                lines.append(f"\n  {name}, {peer.subject.name} = 1: " + " · ".join(found))
    return "".join(lines)
