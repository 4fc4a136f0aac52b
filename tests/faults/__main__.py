"""``python -m tests.faults``: kill and cut a real gateway, and judge what its clients saw.

``python -m tests.faults resume``: how long a client waits for what it missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import trio

from tests.faults.resume_benchmark import describe as describe_rows
from tests.faults.resume_benchmark import measure
from tests.faults.run import Options, run
from tests.faults.summary import describe

RESUME_TARGET_MS = 50.0


def main() -> int:
    """Run as the command line says; 1 when a promise was broken."""
    arguments = _parser().parse_args()
    if arguments.command == "resume":
        rows = trio.run(measure, arguments.rounds, arguments.events, _say)
        sys.stdout.write(describe_rows(rows) + "\n")
        return int(any(row.p99 > RESUME_TARGET_MS for row in rows if not row.case.kills))
    options = Options(
        seed=arguments.seed,
        kills=arguments.kills,
        cuts=arguments.cuts,
        slots=arguments.slots,
        mean_uptime=arguments.uptime,
        cold=arguments.cold,
        nodes=arguments.nodes,
        redis=arguments.redis,
        keep=arguments.keep.resolve() if arguments.keep else None,
    )
    result = trio.run(run, options, _say)
    sys.stdout.write(describe(result) + "\n")
    return 1 if result.violations else 0


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        epilog="The same seed makes the same plan; what happens depends on the machine's scheduling too.",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--kills", type=int, default=defaults.kills, help="kills of the gateway (%(default)s)"
    )
    parser.add_argument("--cuts", type=int, default=defaults.cuts, help="cuts of sockets (%(default)s)")
    parser.add_argument("--slots", type=int, default=defaults.slots, help="sessions at a time (%(default)s)")
    parser.add_argument(
        "--uptime",
        type=float,
        default=defaults.mean_uptime,
        help="seconds that a gateway lives on average once it listens (%(default)s)",
    )
    parser.add_argument("--cold", action="store_true", help="execute each gateway anew instead of forking it")
    parser.add_argument("--nodes", type=int, default=1, help="gateways at a time, on Redis (%(default)s)")
    parser.add_argument("--redis", action="store_true", help="keep sessions in Redis, with one gateway too")
    parser.add_argument("--keep", type=Path, help="folder for store, log and records of broken promises")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    resume = commands.add_parser("resume", help="measure resumes instead")
    resume.add_argument("--rounds", type=int, default=200, help="resumes per case (%(default)s)")
    resume.add_argument("--events", type=int, default=1000, help="events missed (%(default)s)")
    return parser


def _say(line: str) -> None:
    """Progress, beside the result."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
