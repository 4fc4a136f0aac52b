"""``gateway demo``: a gateway and an Agent Runtime in one process, on loopback, with durable sessions.

Everything is the real thing: what listens here is what ``gateway serve`` and ``gateway agent`` run.
"""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import trio
from attrs import frozen

from gateway import app
from gateway.config import Configuration, load_configuration
from gateway.reference_agent.server import serve_agent
from gateway.reference_agent.settings import AgentSettings
from gateway.settings import PREFIX

KEPT_SETTINGS = ("INTERNAL_API_KEY", "INTERNAL_API_KEY_FILE", "LOG_LEVEL", "LOG_FORMAT")
"""What the demo takes from the environment; all else of a real set-up would only break it."""

DEFAULT_BIND = "127.0.0.1:8000"


@frozen
class DemoOptions:
    """What ``gateway demo`` was asked for."""

    bind: str = DEFAULT_BIND
    data: Path | None = None
    """Folder for both databases; None takes one that is removed at the end."""
    workspace: Path = Path("demo-workspace")
    """Folder whose files the chat reads and writes."""
    program: str = "gateway"
    """How this program is called, for the line to paste."""


Chat = Callable[[str, str], Awaitable[int]]
"""Holds a conversation with the gateway at a URL, with its internal key; returns an exit code."""


async def run_demo(
    options: DemoOptions,
    *,
    environment: Mapping[str, str],
    out: TextIO,
    stop: trio.Event,
    chat: Chat | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until ``stop``, or until ``chat`` has ended; returns the chat's exit code, else 0.

    Started with the gateway's URL once everything listens and is written to ``out``. Raises what
    ``load_configuration``, ``app.serve`` and ``serve_agent`` raise, possibly inside groups.
    """
    with ExitStack() as resources:
        if options.data is None:
            data = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="gateway-demo-")))
        else:
            data = options.data.absolute()
            data.mkdir(parents=True, exist_ok=True)
        # Checked before anything is started; AGENT_URL is known only once the agent listens.
        key = _configure(options, environment, data, "http://127.0.0.1:1").settings.internal_api_key
        agent = AgentSettings(bind="127.0.0.1:0", internal_key=key, db=str(data / "agent.sqlite3"))
        code = 0
        async with trio.open_nursery() as nursery:
            agent_url = await nursery.start(_start_agent, agent)
            configuration = _configure(options, environment, data, agent_url)

            async def serve_gateway(*, task_status: trio.TaskStatus[Sequence[str]]) -> None:
                await app.serve(configuration, announce=_say_nothing, stop=stop, task_status=task_status)
                nursery.cancel_scope.cancel()

            url = (await nursery.start(serve_gateway))[0]
            out.write(introduction(options, configuration, url, agent_url, chatting=chat is not None))
            out.flush()
            task_status.started(url)
            if chat is not None:
                code = await _until_stopped(stop, functools.partial(chat, url, key))
                stop.set()
            await trio.sleep_forever()
        return code


def introduction(
    options: DemoOptions, configuration: Configuration, url: str, agent_url: str, *, chatting: bool
) -> str:
    """What somebody who sees this for the first time can do next."""
    key = configuration.settings.internal_api_key
    is_default = configuration.sources["internal_api_key"] == "default"
    shown_key = shlex.quote(f"X-Internal-Auth: {key}") if is_default else '"X-Internal-Auth: $KEY"'
    socket = url.replace("http://", "ws://")
    lines = [
        f"Listening on {url}",
        "",
        f"  playground     {url}/playground   (in a browser: see it stream, approve, and resume)",
        f"  dashboard      {url}/dashboard   (its key: {key if is_default else 'the internal key'})",
        f"  agent runtime  {agent_url}   (scripted: no network, no LLM)",
        f"  socket         {socket}/api/v1/ws/my-session",
        f"  REST           curl -H {shown_key} {url}/api/v1/agents",
        f"  another chat   {options.program} chat {url} --folder {shlex.quote(str(options.workspace))}",
        "",
    ]
    if chatting:
        lines += [f"You are talking to it now; its tools work in {options.workspace}/."]
        lines += ['Try "create hello.py that prints hello", then "edit hello.py: replace hello with bye".']
    else:
        lines += ["Stop it with Ctrl-C."]
    return "\n".join(lines) + "\n\n"


def _configure(
    options: DemoOptions, environment: Mapping[str, str], data: Path, agent_url: str
) -> Configuration:
    kept = {
        PREFIX + name: environment[PREFIX + name] for name in KEPT_SETTINGS if PREFIX + name in environment
    }
    settings = {
        f"{PREFIX}LOG_LEVEL": "WARNING",
        f"{PREFIX}LOG_FORMAT": "console",
        **kept,
        f"{PREFIX}AGENT_URL": agent_url,
        f"{PREFIX}PLAYGROUND": "true",
        f"{PREFIX}STORE_URL": f"sqlite:///{data / 'gateway.sqlite3'}",
    }
    return load_configuration(settings, dotenv=None, bind=options.bind)


async def _start_agent(settings: AgentSettings, *, task_status: trio.TaskStatus[str]) -> None:
    await serve_agent(settings, task_status=task_status)


async def _until_stopped(stop: trio.Event, chat: Callable[[], Awaitable[int]]) -> int:
    """The chat's exit code; 0 when it was cut short by a stop."""
    code = 0
    async with trio.open_nursery() as nursery:

        async def cancel_on_stop() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel_on_stop)
        code = await chat()
        nursery.cancel_scope.cancel()
    return code


def _say_nothing(_: Sequence[str]) -> None:
    """The introduction says where the gateway listens, when the agent does too."""
