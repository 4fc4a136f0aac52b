"""``gateway check-config``: what is in force, and where it came from."""

from __future__ import annotations

import argparse
import sys

from gateway.commands.exit_codes import ExitCode
from gateway.commands.parsers import add_bind, add_command
from gateway.commands.running import read_configuration
from gateway.config import describe


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check-config",
        run,
        summary="show the settings in force, or all that is wrong with them",
        description="""
        Read the settings as `gateway serve` would, and print each with its value and where it came from.
        Secrets are masked. If something is wrong, everything that is wrong is printed to standard error,
        and the exit code is 78.
        """,
        example="""
        gateway check-config
        GATEWAY__LOG_LEVEL=LOUD gateway check-config || echo "not like this"
        """,
    )
    add_bind(parser, default=None, meaning="check with this address, as `gateway serve --bind` would")


def run(arguments: argparse.Namespace) -> int:
    """Print the settings."""
    configuration = read_configuration(bind=arguments.bind)
    rows = describe(configuration)
    name_width = max(len(row.name) for row in rows)
    value_width = max(len(row.value) for row in rows)
    lines = [f"{row.name:<{name_width}}  {row.value:<{value_width}}  {row.source}" for row in rows]
    who = "nobody has to prove who they are" if configuration.anonymous_sockets else "credentials are needed"
    lines += [
        "",
        f"Listens on {', '.join(configuration.binds)}; on sockets {who}.",
        "The configuration can be used.",
    ]
    sys.stdout.write("\n".join(line.rstrip() for line in lines) + "\n")
    return ExitCode.OK
