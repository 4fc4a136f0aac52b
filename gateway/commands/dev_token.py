"""``gateway dev-token``: try JWT mode without an auth service."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import trio

from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_bind, add_command
from gateway.commands.running import expected_failure, run_until_stopped
from gateway.dev_token import DevTokenOptions, DevTokenRefused, run_dev_token

DIRECTORY = Path("~/.codelab-gateway")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "dev-token",
        run,
        summary="make a JWT to try JWT mode with, and serve its key on this machine",
        description="""
        Make a token, print what to paste into the shells of the gateway and of its client, and serve the
        public key where an auth service would, until Ctrl-C. For one machine: it listens on loopback only,
        and the private key stays in a file that only you can read.
        """,
        example="""
        gateway dev-token --subject alice
        eval "$(gateway dev-token --subject bob --no-serve)"    # another token while the first serves the key
        """,
    )
    add_bind(parser, default="127.0.0.1:8003", meaning="where to serve the key, loopback only (%(default)s)")
    parser.add_argument("--subject", default="developer", help="who the token is for (%(default)s)")
    parser.add_argument("--scope", default="api:read api:write", help="what it allows (%(default)s)")
    parser.add_argument(
        "--lifetime", metavar="SECONDS", type=float, default=3600.0, help="until it expires (%(default)s)"
    )
    parser.add_argument("--issuer", default="https://auth.codelab.local", help="its iss (%(default)s)")
    parser.add_argument("--audience", default="codelab-api", help="its aud (%(default)s)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=DIRECTORY,
        help="where the key pair is kept (%(default)s)",
    )
    parser.add_argument("--no-serve", action="store_true", help="print a token and end")


def run(arguments: argparse.Namespace) -> int:
    """Issue the token and serve its key."""
    options = DevTokenOptions(
        directory=arguments.directory.expanduser(),
        bind=arguments.bind,
        subject=arguments.subject,
        scope=arguments.scope,
        lifetime=arguments.lifetime,
        issuer=arguments.issuer,
        audience=arguments.audience,
        serve=not arguments.no_serve,
    )
    return trio.run(run_until_stopped, functools.partial(_work, options))


async def _work(options: DevTokenOptions, stop: trio.Event) -> int:
    try:
        async with trio.open_nursery() as nursery:

            async def issue() -> None:
                await run_dev_token(options, out=sys.stdout)
                nursery.cancel_scope.cancel()

            nursery.start_soon(issue)
            await stop.wait()
            nursery.cancel_scope.cancel()
    except Exception as error:
        reason = expected_failure(error, DevTokenRefused)
        if reason is None:
            raise
        raise CommandFailed(str(reason)) from None
    return ExitCode.OK
