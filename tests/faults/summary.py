"""What a run says at its end."""

from __future__ import annotations

from collections import Counter

from tests.faults.run import Result

SHOWN_PER_SESSION = 5
"""One cause has many consequences; the rest is in the record that ``--keep`` leaves."""


def describe(result: Result) -> str:
    """The numbers, and the broken promises with the seed that showed them."""
    killed = ", ".join(f"{why} {count}" for why, count in sorted(result.killed_at.items()))
    lines = [
        f"seed {result.seed}, {result.seconds:.0f} s",
        f"kills      {result.kills} ({killed or 'none'}); starts took {result.start_seconds:.2f} s",
        f"drains     {result.stops}",
        f"pauses     {result.pauses} of gateways",
        f"Redis      killed {result.redis_kills} times, {result.redis_cuts} connections to it cut",
        f"cuts       {result.cuts} of {result.connections} connections; {result.upstream_cuts} upstream",
        f"sessions   {result.sessions}",
        f"messages   {result.messages}, {result.repeats} of them repeated, {result.posts} POSTs",
        f"turns      {result.turns.total()} ({_counts(result.turns)})",
        f"events     {result.events} received",
        f"joins      {_counts(result.joins)}",
        f"refusals   {_counts(result.refusals)}",
        f"violations {len(result.violations)}",
    ]
    shown: Counter[str] = Counter()
    for rule, session_id, who, what in result.violations:
        shown[session_id] += 1
        if shown[session_id] <= SHOWN_PER_SESSION:
            lines.append(f"  {rule}: session {session_id}, {who}: {what}")
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counter.most_common()) or "none"
