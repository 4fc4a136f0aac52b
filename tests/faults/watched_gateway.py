"""``python -m tests.faults.watched_gateway serve …``: ``gateway serve …`` that tells how many tasks it has.

On SIGUSR1 it prints ``tasks N`` on standard output: Trio's tasks, its own few included.
"""

from __future__ import annotations

import signal
import sys

import trio

from gateway import cli


def tell(_number: int, _frame: object) -> None:
    """Print it."""
    sys.stdout.write(f"tasks {trio.lowlevel.current_statistics().tasks_living}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(cli.main(sys.argv[1:]))
