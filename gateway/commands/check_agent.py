"""``gateway check-agent``: does an Agent Runtime meet the contract?"""

from __future__ import annotations

import argparse
import functools
import sys

import trio

from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_command
from gateway.commands.running import read_configuration
from gateway.reference_agent.conformance import (
    FAILED,
    AgentUnreachableError,
    CheckResult,
    check_agent,
    summarize,
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check-agent",
        run,
        summary="check an Agent Runtime against the contract",
        description="""
        Drive the Agent Runtime at URL through the contract (docs/agent-runtime.md) and say, one line per
        requirement, what it meets, what it does not and how that was seen. It holds conversations in
        sessions of its own and asks for an LLM's answers where the runtime has one.

        GATEWAY__INTERNAL_API_KEY (or ..._FILE) is sent when it is set. The exit code is 1 when a
        requirement is not met.
        """,
        example="gateway check-agent http://127.0.0.1:8001",
    )
    parser.add_argument("url", metavar="URL", help="where the Agent Runtime is")
    parser.add_argument(
        "--only", metavar="CHECK", action="append", help="make only this check; may be given several times"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="bound on each answer (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print each result as it is made."""
    configuration = read_configuration(bind="127.0.0.1:0")
    is_own_key = configuration.sources["internal_api_key"] != "default"
    check = functools.partial(
        check_agent,
        arguments.url,
        key=configuration.settings.internal_api_key if is_own_key else None,
        timeout=arguments.timeout,
        only=arguments.only,
        on_result=_show,
    )
    try:
        results = trio.run(check)
    except AgentUnreachableError as error:
        raise CommandFailed(str(error)) from None
    except ValueError as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
    sys.stdout.write(f"{summarize(results)}\n")
    return ExitCode.FAILURE if any(result.outcome == FAILED for result in results) else ExitCode.OK


def _show(result: CheckResult) -> None:
    sys.stdout.write(f"{result}\n")
    sys.stdout.flush()
