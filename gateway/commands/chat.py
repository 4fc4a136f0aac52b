"""``gateway chat``: talk to an agent from a terminal."""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import sys
from pathlib import Path

import trio

from gateway.chat import ChatOptions, run_chat
from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_command
from gateway.config_files import UnreadableFile, read_secret

TOKEN_VARIABLE = "TOKEN"
KEY_VARIABLE = "GATEWAY__INTERNAL_API_KEY"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "chat",
        run,
        summary="talk to an agent through a gateway",
        description=f"""
        Hold a conversation: the answer is shown as it is written, tools read and change files in --folder,
        and you are asked before anything is changed. When the connection is lost it is made again, and the
        conversation goes on where it was. /help says what else can be typed.

        Without a terminal, lines are read from standard input: a message each, or the answer to a question.
        A token is taken from the variable {TOKEN_VARIABLE} (or --token-file), the internal key from
        {KEY_VARIABLE}.
        """,
        example="""
        gateway chat http://127.0.0.1:8000 --folder demo-workspace
        gateway chat wss://gateway.example.com --session my-session --token-file token.txt
        """,
    )
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        default="http://127.0.0.1:8000",
        help="where the gateway is (%(default)s)",
    )
    parser.add_argument(
        "--session", metavar="ID", help="the session to begin or to go on with (default: a new one)"
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="the folder that tools may read and change (the current one)",
    )
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="a file with a JWT")
    parser.add_argument(
        "--encoding", choices=("json", "msgpack"), default="json", help="of the messages (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Chat until the user leaves."""
    token = os.environ.get(TOKEN_VARIABLE) or None
    if arguments.token_file is not None:
        try:
            token = read_secret(arguments.token_file)
        except UnreadableFile as error:
            raise CommandFailed(f"--token-file {error}", ExitCode.USAGE) from None
    options = ChatOptions(
        url=arguments.url,
        session_id=arguments.session or f"chat-{secrets.token_hex(4)}",
        folder=arguments.folder,
        token=token,
        internal_key=os.environ.get(KEY_VARIABLE) or None,
        encoding=arguments.encoding,
    )
    return trio.run(functools.partial(run_chat, options, stdin=sys.stdin, stdout=sys.stdout))
