"""``gateway demo``: everything at once, to see what it is."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import secrets
import shlex
import sys
from pathlib import Path

import trio

from gateway.chat import ChatOptions, run_chat
from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_bind, add_command
from gateway.commands.running import expected_failure, explain_start_failure, run_until_stopped
from gateway.config import ConfigError
from gateway.core.errors import StoreUnavailable
from gateway.demo import DEFAULT_BIND, Chat, DemoOptions, run_demo
from gateway.reference_agent.log_output import log_to_stderr


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        summary="run a gateway and an agent, and talk to it",
        description="""
        Run the gateway and the reference Agent Runtime in one process, on this machine only, with
        sessions in a SQLite file; on a terminal, talk to it at once. The agent is a script: it needs no
        network and no key. It asks before it changes files, and it changes them in --workspace only.

        GATEWAY__* settings do not apply, but for the internal key and the log settings; databases are in
        a temporary folder unless --data names one.
        """,
        example="""
        gateway demo
        gateway demo --no-chat --bind 127.0.0.1:0 --data demo-data
        """,
    )
    add_bind(parser, default=DEFAULT_BIND, meaning="where to listen (%(default)s); port 0 takes a free one")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="keep both databases there, and go on with them next time"
    )
    parser.add_argument(
        "--workspace",
        metavar="DIR",
        type=Path,
        default=Path("demo-workspace"),
        help="the folder that the chat's tools may read and change (%(default)s)",
    )
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="talk to it here, also when standard input is no terminal",
    )
    chat.add_argument("--no-chat", action="store_false", dest="chat", help="run the servers only")


def run(arguments: argparse.Namespace) -> int:
    """Serve, and chat when there is somebody to chat with."""
    called = Path(sys.argv[0])
    options = DemoOptions(
        bind=arguments.bind,
        data=arguments.data,
        workspace=arguments.workspace,
        program=shlex.quote(str(called)) if called.name == "gateway" else "gateway",
    )
    chats = sys.stdin.isatty() if arguments.chat is None else arguments.chat
    log_to_stderr(logging.WARNING)
    return trio.run(
        run_until_stopped, functools.partial(_work, options, _make_chat(options) if chats else None)
    )


async def _work(options: DemoOptions, chat: Chat | None, stop: trio.Event) -> int:
    try:
        return await run_demo(options, environment=os.environ, out=sys.stdout, stop=stop, chat=chat)
    except Exception as error:
        reason = expected_failure(error, (ConfigError, StoreUnavailable, OSError))
        if reason is None:
            raise
        if isinstance(reason, ConfigError):
            raise CommandFailed(str(reason), ExitCode.CONFIG) from None
        raise CommandFailed(explain_start_failure(reason)) from None


def _make_chat(options: DemoOptions) -> Chat:
    async def chat(url: str, internal_key: str) -> int:
        options.workspace.mkdir(parents=True, exist_ok=True)
        chat_options = ChatOptions(
            url=url,
            session_id=f"demo-{secrets.token_hex(4)}",
            folder=options.workspace,
            internal_key=internal_key,
        )
        return await run_chat(chat_options, stdin=sys.stdin, stdout=sys.stdout)

    return chat
