"""``gateway serve``: the gateway itself."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import trio

from gateway import app
from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_bind, add_command
from gateway.commands.running import (
    announce,
    expected_failure,
    explain_start_failure,
    read_configuration,
    run_until_stopped,
    settle_start_up,
)
from gateway.config import Configuration
from gateway.core.errors import StoreUnavailable
from gateway.core.metrics import OF_SUPERVISOR
from gateway.workers.supervisor import Supervisor


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve",
        run,
        summary="run the gateway",
        description="""
        Run the gateway: REST and WebSockets on one port, the Agent Runtime behind it.

        Settings come from GATEWAY__* variables, a file .env in this folder, and hypercorn.toml;
        `gateway check-config` shows them. It prints "Listening on http://..." once it does, logs to
        standard error, and stops on Ctrl-C or SIGTERM: sockets are told to reconnect, running REST calls
        are finished, what is left is stored. A second Ctrl-C does not wait for that.

        With --workers 4 it is four processes on that port, which share sessions through Redis, and one that
        starts them again when they end.
        """,
        example="""
        gateway agent &                                     # something to talk to, on port 8001
        gateway serve                                       # on http://127.0.0.1:8000
        GATEWAY__AGENT_URL=http://10.0.0.7:8001 gateway serve --bind 127.0.0.1:0
        GATEWAY__STORE_URL=redis://127.0.0.1/0 gateway serve --workers 4
        """,
    )
    add_bind(
        parser,
        default=None,
        meaning="where to listen, instead of GATEWAY__BIND and hypercorn.toml (127.0.0.1:8000); "
        "port 0 takes a free one",
    )
    parser.add_argument(
        "--workers", metavar="N", help="processes, instead of GATEWAY__WORKERS (1); more than 1 need Redis"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    configuration = read_configuration(bind=arguments.bind, workers=arguments.workers)

    async def work(stop: trio.Event) -> int:
        if configuration.settings.workers > 1:
            return await supervise(configuration, stop)
        await serve(configuration, stop)
        return ExitCode.OK

    return trio.run(run_until_stopped, work)


async def serve(configuration: Configuration, stop: trio.Event) -> None:
    """``app.serve``, with what prevents its start as ``CommandFailed``."""
    listening = False

    def listens(urls: Sequence[str]) -> None:
        nonlocal listening
        listening = True
        settle_start_up()
        announce(urls)

    try:
        await app.serve(configuration, announce=listens, stop=stop)
    except Exception as error:
        reason = expected_failure(error, (StoreUnavailable, OSError))
        if reason is None or listening:
            raise
        raise CommandFailed(explain_start_failure(reason)) from None


async def supervise(configuration: Configuration, stop: trio.Event) -> int:
    """Run the workers. Raises ``CommandFailed`` when the port cannot be had."""
    telemetry = app.make_telemetry(configuration.settings, metrics=OF_SUPERVISOR)
    supervisor = Supervisor(
        configuration,
        telemetry,
        render_metrics=telemetry.render,
        announce=announce,
        randomness=random.Random(),
    )
    try:
        return await supervisor.run(stop)
    except Exception as error:
        reason = expected_failure(error, OSError)
        if reason is None:
            raise
        raise CommandFailed(explain_start_failure(reason)) from None
