"""``gateway COMMAND``: understands the command line, runs the command, turns failures into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import gateway
from gateway.commands import agent, bench, chat, check_agent, check_config, demo, dev_token, serve, version
from gateway.commands.exit_codes import EXPLAINED, CommandFailed, ExitCode

COMMANDS = (demo, serve, agent, chat, check_config, check_agent, dev_token, bench, version)

_DESCRIPTION = """\
The piece between an AI-assisted IDE and its Agent Runtime: one WebSocket per session in,
Server-Sent Events out, nothing lost, nothing repeated.
"""
_EPILOG = f"""\
`gateway COMMAND --help` says more about a command and gives examples.

{EXPLAINED}"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="gateway",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gateway {gateway.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (``sys.argv`` by default) and return its exit code.

    Wrong usage and ``--help`` leave as ``SystemExit``, as argparse does it.
    """
    parsed = make_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except CommandFailed as failed:
        sys.stderr.write(f"gateway: {failed}\n")
        return failed.code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone: `gateway check-config | head -1`.
        # Python would complain when it flushes at the end.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception:
        traceback.print_exc()
        sys.stderr.write("gateway: internal error; please report the traceback above\n")
        return ExitCode.SOFTWARE
