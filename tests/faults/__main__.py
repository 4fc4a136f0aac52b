"""``python -m tests.faults``: kill and cut a real gateway, and judge what its clients saw."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import trio

from tests.faults.run import Options, Result, run


SHOWN_PER_SESSION = 5
"""One cause has many consequences; the rest is in the record that ``--keep`` leaves."""


def main() -> int:
    """Run as the command line says; 1 when a promise was broken."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--kills", type=int, default=defaults.kills, help="kill -9 of the gateway (%(default)s)")
    parser.add_argument("--cuts", type=int, default=defaults.cuts, help="cuts of sockets (%(default)s)")
    parser.add_argument("--slots", type=int, default=defaults.slots, help="sessions at a time (%(default)s)")
    parser.add_argument(
        "--uptime",
        type=float,
        default=defaults.mean_uptime,
        help="seconds that a gateway lives on average once it listens (%(default)s)",
    )
    parser.add_argument("--cold", action="store_true", help="execute each gateway anew instead of forking it")
    parser.add_argument("--keep", type=Path, help="folder for store, log and records of broken promises")
    arguments = parser.parse_args()
    options = Options(
        seed=arguments.seed,
        kills=arguments.kills,
        cuts=arguments.cuts,
        slots=arguments.slots,
        mean_uptime=arguments.uptime,
        cold=arguments.cold,
        keep=arguments.keep.resolve() if arguments.keep else None,
    )
    result = trio.run(run, options, lambda line: print(line, file=sys.stderr, flush=True))
    print(describe(result))
    return 1 if result.violations else 0


def describe(result: Result) -> str:
    """The summary, and the broken promises with the seed that showed them."""
    killed = ", ".join(f"{why} {count}" for why, count in sorted(result.killed_at.items()))
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in result.turns.most_common())
    joins = ", ".join(f"{how} {count}" for how, count in result.joins.most_common())
    refusals = ", ".join(f"{code} {count}" for code, count in result.refusals.most_common())
    lines = [
        f"seed {result.seed}, {result.seconds:.0f} s",
        f"kills      {result.kills} ({killed}); from start to listening {result.start_seconds:.2f} s",
        f"cuts       {result.cuts} of {result.connections} connections; {result.upstream_cuts} upstream",
        f"sessions   {result.sessions}",
        f"messages   {result.messages}, {result.repeats} of them repeated, {result.posts} POSTs",
        f"turns      {result.turns.total()} ({outcomes})",
        f"events     {result.events} received",
        f"joins      {joins}",
        f"refusals   {refusals or 'none'}",
        f"violations {len(result.violations)}",
    ]
    shown: Counter[str] = Counter()
    for rule, session_id, who, what in result.violations:
        shown[session_id] += 1
        if shown[session_id] <= SHOWN_PER_SESSION:
            lines.append(f"  {rule}: session {session_id}, {who}: {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
