"""``gateway agent``: the reference Agent Runtime."""

from __future__ import annotations

import argparse
import os

import trio

from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_bind, add_command
from gateway.commands.running import announce, expected_failure, read_configuration, run_until_stopped
from gateway.reference_agent.log_output import log_to_stderr
from gateway.reference_agent.server import serve_agent
from gateway.reference_agent.settings import LLM_KEY_VARIABLE, AgentSettings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    defaults = AgentSettings()
    parser = add_command(
        commands,
        "agent",
        run,
        summary="run the reference Agent Runtime",
        description=f"""
        Run the reference Agent Runtime: five agents that talk, ask for tools and switch to each other.
        By default a script answers, without a network and always the same; --llm openai asks anything
        that speaks /v1/chat/completions.

        Keys come from the environment: {LLM_KEY_VARIABLE} for the LLM, and GATEWAY__INTERNAL_API_KEY (or
        ..._FILE), which callers then have to send. Without it only this machine may be listened to.
        """,
        example="""
        gateway agent
        gateway agent --llm openai --llm-url http://127.0.0.1:4000 --model gpt-4o-mini --db agent.sqlite3
        curl -N http://127.0.0.1:8001/agent/message/stream -H 'Content-Type: application/json' \\
          -d '{"session_id":"s1","message":{"type":"user_message","content":"hello"}}'
        """,
    )
    add_bind(parser, default=defaults.bind, meaning="where to listen (%(default)s); port 0 takes a free one")
    parser.add_argument(
        "--llm", choices=("scripted", "openai"), default=defaults.llm, help="who answers (%(default)s)"
    )
    parser.add_argument(
        "--llm-url", metavar="URL", default=defaults.llm_url, help="OpenAI-compatible API (%(default)s)"
    )
    parser.add_argument("--model", default=defaults.model, help="the model to ask for (%(default)s)")
    parser.add_argument(
        "--history-tokens",
        metavar="N",
        type=int,
        default=defaults.history_tokens,
        help="most history sent to the LLM at each step, in tokens (%(default)s)",
    )
    parser.add_argument(
        "--token-delay",
        metavar="SECONDS",
        type=float,
        default=defaults.token_delay,
        help="the script's pause before each token (%(default)s)",
    )
    parser.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=float,
        default=defaults.heartbeat_interval,
        help="silence on a stream after which a comment is sent (%(default)s)",
    )
    parser.add_argument(
        "--resume-grace",
        metavar="SECONDS",
        type=float,
        default=defaults.resume_grace,
        help="how long a resumable answer goes on with nobody listening (%(default)s)",
    )
    parser.add_argument(
        "--db", metavar="FILE", help="SQLite file that keeps all state (default: memory, until it stops)"
    )
    parser.add_argument(
        "--llm-keep",
        metavar="SECONDS",
        type=float,
        default=defaults.llm_keep,
        help="with --db, how long an LLM's answer outlives a killed runtime (%(default)s); 0: it does not",
    )
    parser.add_argument(
        "--approvals", metavar="FILE", help="TOML file with the approval policy (default: the built-in one)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    settings = _settings(arguments)
    log_to_stderr()

    async def work(stop: trio.Event) -> int:
        await serve(settings, stop)
        return ExitCode.OK

    return trio.run(run_until_stopped, work)


async def serve(settings: AgentSettings, stop: trio.Event) -> None:
    """``serve_agent`` until ``stop``, with what prevents its start as ``CommandFailed``."""
    listening = False
    try:
        async with trio.open_nursery() as nursery:
            url = await nursery.start(lambda task_status: serve_agent(settings, task_status=task_status))
            listening = True
            announce([url])
            await stop.wait()
            nursery.cancel_scope.cancel()
    except Exception as error:
        reason = expected_failure(error, (OSError, ValueError))
        if reason is None or listening:
            raise
        if isinstance(reason, OSError):
            why = f"Cannot listen on {settings.bind}: {reason.strerror or reason}. Choose another --bind."
            raise CommandFailed(why) from None
        raise CommandFailed(str(reason), ExitCode.CONFIG) from None


def _settings(arguments: argparse.Namespace) -> AgentSettings:
    # The same place, and the same refusal of the default key in front of a network, as for `serve`.
    configuration = read_configuration(bind=arguments.bind)
    is_own_key = configuration.sources["internal_api_key"] != "default"
    try:
        return AgentSettings(
            bind=arguments.bind,
            internal_key=configuration.settings.internal_api_key if is_own_key else None,
            token_delay=arguments.token_delay,
            llm=arguments.llm,
            llm_url=arguments.llm_url,
            model=arguments.model,
            llm_key=os.environ.get(LLM_KEY_VARIABLE) or None,
            history_tokens=arguments.history_tokens,
            db=arguments.db,
            approvals=arguments.approvals,
            heartbeat_interval=arguments.heartbeat,
            resume_grace=arguments.resume_grace,
            llm_keep=arguments.llm_keep,
        )
    except ValueError as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
