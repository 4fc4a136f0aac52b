"""``gateway version``."""

from __future__ import annotations

import argparse
import sys

import gateway
from gateway.commands.exit_codes import ExitCode
from gateway.commands.parsers import add_command


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    add_command(
        commands,
        "version",
        run,
        summary="print the version",
        description="Print the version of this gateway.",
        example="gateway version",
    )


def run(_: argparse.Namespace) -> int:
    """Print it."""
    sys.stdout.write(f"gateway {gateway.__version__}\n")
    return ExitCode.OK
