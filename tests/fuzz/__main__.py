"""``python -m tests.fuzz --minutes 10 --seed 1``; 1 when anything happened that must not.

With ``--only TARGET:NUMBER`` one case is sent again: the same seed makes the same input, though what it meets
depends on what went before.
"""

from __future__ import annotations

import argparse
import sys

import trio

from tests.fuzz.campaign import TARGETS, run


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which inputs (%(default)s)")
    parser.add_argument("--only", metavar="TARGET:NUMBER", help=f"one case of {', '.join(TARGETS)}")
    arguments = parser.parse_args()
    only = None
    if arguments.only:
        target, _, number = arguments.only.partition(":")
        only = (target, int(number))
    outcome = trio.run(run, arguments.minutes * 60, arguments.seed, only, _say)
    cases = ", ".join(f"{name} {count}" for name, count in sorted(outcome.cases.items()))
    _say(f"{outcome.seconds:.0f} s, {outcome.cases.total()} cases ({cases})")
    _say(f"bystanders got {outcome.answers} answers, and had {outcome.unanswered} turns fail at the agent")
    for broken in outcome.broken:
        _say(f"BROKEN {broken}")
    _say(
        "nothing broke"
        if not outcome.broken
        else f"{len(outcome.broken)} broken; the log is in fuzz-gateway.log"
    )
    return 1 if outcome.broken else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
