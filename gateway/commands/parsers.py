"""What the parsers of all commands have in common."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable

from gateway.commands.exit_codes import EXPLAINED, ExitCode

Run = Callable[[argparse.Namespace], int]


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Run,
    *,
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add one command; ``run`` gets the parsed arguments and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.dedent(description).strip(),
        epilog=f"example:\n{textwrap.indent(textwrap.dedent(example).strip(), '  ')}\n\n{EXPLAINED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def host_and_port(text: str) -> str:
    """``--bind``: the text as it is. Raises ``argparse.ArgumentTypeError``."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000")
    return text


def add_bind(parser: argparse.ArgumentParser, *, default: str | None, meaning: str) -> None:
    """Add ``--bind HOST:PORT``."""
    parser.add_argument("--bind", metavar="HOST:PORT", type=host_and_port, default=default, help=meaning)


__all__ = ["ExitCode", "Run", "add_bind", "add_command", "host_and_port"]
