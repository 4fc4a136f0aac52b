"""``gateway bench``: what a gateway costs on this machine, and what else one could run costs beside it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from gateway.bench.plot import panels_of, svg
from gateway.bench.process_figures import CannotMeasure, check_platform
from gateway.bench.report import as_json, table
from gateway.bench.runner import Outcome, Runner
from gateway.bench.scenarios import BY_DEFAULT, SCENARIOS, Step
from gateway.bench.soak import Soak, run_soak
from gateway.bench.soak_report import read_soak, soak_json, soak_svg, soak_table
from gateway.bench.socket_client import DIALECTS, BenchError
from gateway.bench.subjects import (
    SOCKET_PATH,
    Launch,
    Subject,
    gateway_launch,
    peer_launch,
    running_emitter,
    running_launch,
)
from gateway.bench.targets import markdown, rows_of, run_targets
from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.parsers import add_command

TARGETS, SOAK = "targets", "soak"
_PEER_SUFFIXES = {"node": (".mjs", ".js"), "fastapi": (".py",)}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        summary="measure what a gateway costs on this machine",
        description="""
        Start a gateway, an Agent Runtime that only emits, and clients, each in a process of its own; measure
        the gateway from outside: CPU per token, added latency, memory per socket. Linux only.

          paced   100 sessions, a token each 20 ms        resume  reconnect with 1 000 events missed
          burst   20 sessions, as fast as it goes         ramp    10 to 1 000 sessions, 5 000 tokens/s in all
          idle    1 000 sockets, nothing said             soak    an hour of sessions that come and go
          fairness  50 sessions beside a burst            targets the table of docs/performance.md
          stalled   100 sessions beside clients that never read

        Without a scenario: the first five. All of them take 8 minutes on both stores, `--rounds 1` two.
        With --url and --pid a gateway that runs already is measured; its AGENT_URL must be the URL of
        `python -m gateway.bench.emitter`. Peers take turns with the gateway, round by round.
        """,
        example="""
        gateway bench paced --rounds 1
        gateway bench paced burst --dialect v1 --dialect v2-json --json figures.json --plot figures.svg
        gateway bench paced burst --peer-script node_relay.mjs
        gateway bench soak --minutes 60 --plot soak.svg
        gateway bench targets --peer-script node_relay.mjs --peer-script fastapi_relay.py
        """,
    )
    parser.add_argument(
        "scenario", nargs="*", choices=[*SCENARIOS, SOAK, TARGETS, []], help="what to measure"
    )
    parser.add_argument(
        "--store",
        action="append",
        choices=("memory://", "sqlite"),
        help="the gateway's store; may be given twice (default: both)",
    )
    parser.add_argument(
        "--dialect", action="append", choices=list(DIALECTS), help="what clients speak (v1); may be repeated"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=_at_least_one, default=5, help="how often (%(default)s)"
    )
    parser.add_argument("--sessions", metavar="N", type=_at_least_one, help="instead of the scenario's own")
    parser.add_argument(
        "--tokens", metavar="N", type=_at_least_one, help="per session, instead of the scenario's"
    )
    parser.add_argument("--pace", metavar="SECONDS", type=float, help="paced, soak: from token to token")
    parser.add_argument(
        "--minutes", metavar="N", type=float, default=Soak().minutes, help="soak: how long (%(default)g)"
    )
    parser.add_argument("--soak", type=Path, metavar="FILE", help="targets: the JSON of a soak, for its row")
    running = parser.add_argument_group("what runs already")
    running.add_argument("--url", help="a gateway, instead of starting one")
    running.add_argument("--pid", type=int, help="its process")
    running.add_argument("--path", default=SOCKET_PATH, help="of its sockets, %%d for a number (%(default)s)")
    running.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="sent with its upgrades"
    )
    peers = parser.add_argument_group("peers")
    peers.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="URL|node|fastapi",
        help="one that runs already on --peer-pid, or the kind of a --peer-script",
    )
    peers.add_argument("--peer-pid", action="append", default=[], type=int, metavar="PID")
    peers.add_argument(
        "--peer-script",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a relay to start: NAME.mjs, called with its port and the agent's; or NAME.py, a FastAPI `app` "
        "that is told AGENT_PORT",
    )
    peers.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="the Python that has FastAPI and uvicorn",
    )
    output = parser.add_argument_group("output, besides the tables")
    output.add_argument("--json", type=Path, metavar="FILE", help="every round and the medians")
    output.add_argument("--plot", type=Path, metavar="FILE.svg", help="a chart")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and say what came out."""
    # As Ctrl-C: what was started has to be ended, or it would go on as a load for good.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    alone = {TARGETS, SOAK} & set(arguments.scenario)
    if alone and len(arguments.scenario) > 1:
        raise CommandFailed(f"`{min(alone)}` stands alone.", ExitCode.USAGE)
    if TARGETS in alone and arguments.url:
        raise CommandFailed("`targets` starts its own gateways.", ExitCode.USAGE)
    if (arguments.url is None) != (arguments.pid is None):
        raise CommandFailed("--url and --pid go together: CPU and memory are the process's.", ExitCode.USAGE)
    if arguments.plot is not None and arguments.plot.suffix != ".svg":
        raise CommandFailed(f"--plot draws SVG: call it {arguments.plot.stem}.svg.", ExitCode.USAGE)
    try:
        check_platform()
        soaked = read_soak(arguments.soak.read_bytes()) if arguments.soak else None
        with running_emitter() as agent_url:
            if SOAK in alone:
                shown, data, chart = _soaked(arguments, agent_url)
            else:
                outcomes = (
                    _targets(arguments, agent_url) if TARGETS in alone else _scenarios(arguments, agent_url)
                )
                shown = markdown(rows_of(outcomes, soaked)) if TARGETS in alone else table(outcomes)
                data, chart = as_json(outcomes), svg(panels_of(outcomes))
    except (BenchError, CannotMeasure, OSError) as error:
        raise CommandFailed(str(error)) from None
    if arguments.json is not None:
        arguments.json.write_bytes(data)
    if arguments.plot is not None:
        arguments.plot.write_text(chart, "utf-8")
    sys.stdout.write(shown)
    return ExitCode.OK


def _soaked(arguments: argparse.Namespace, agent_url: str) -> tuple[str, bytes, str]:
    soak = evolve(
        Soak(minutes=arguments.minutes),
        **{name: value for name in ("sessions", "pace") if (value := getattr(arguments, name))},
    )
    launches = _launches(arguments, agent_url, soak.settings)
    subjects = [
        Subject(launch.name, launch, path=arguments.path, headers=tuple(arguments.header))
        for launch in launches
    ]
    outcomes = run_soak(soak, subjects, _say)
    return soak_table(soak, outcomes), soak_json(soak, outcomes), soak_svg(soak, outcomes)


def _targets(arguments: argparse.Namespace, agent_url: str) -> list[Outcome]:
    return run_targets(
        Runner(_say),
        memory=gateway_launch("memory://", agent_url),
        sqlite=gateway_launch("sqlite", agent_url),
        peers=_peers(arguments, agent_url),
        rounds=arguments.rounds,
    )


def _scenarios(arguments: argparse.Namespace, agent_url: str) -> list[Outcome]:
    names: Sequence[str] = arguments.scenario or BY_DEFAULT
    steps = [_adjusted(step, arguments) for name in dict.fromkeys(names) for step in SCENARIOS[name]]
    dialects = list(dict.fromkeys(arguments.dialect or ["v1"]))
    launches = _launches(arguments, agent_url, {})
    subjects = [
        Subject(
            f"{launch.name} {dialect}",
            launch,
            dialect=dialect,
            # A session for each dialect: what is kept for one client is not the other's load.
            path=arguments.path.replace("%d", f"{dialect}-%d"),
            headers=tuple(arguments.header),
        )
        for launch in launches
        for dialect in dialects
    ]
    return Runner(_say).run(steps, [*subjects, *_peers(arguments, agent_url)], arguments.rounds)


def _launches(arguments: argparse.Namespace, agent_url: str, settings: Mapping[str, str]) -> list[Launch]:
    if arguments.url is not None:
        return [running_launch("gateway", arguments.url, arguments.pid)]
    stores = dict.fromkeys(arguments.store or ["memory://", "sqlite"])
    return [gateway_launch(store, agent_url, settings) for store in stores]


def _adjusted(step: Step, arguments: argparse.Namespace) -> Step:
    changes: dict[str, Any] = {}
    if arguments.sessions and step.sessions and step.scenario != "ramp":
        changes["sessions"] = arguments.sessions
    if arguments.tokens and step.tokens and step.scenario != "ramp":
        changes["tokens"] = arguments.tokens
    if arguments.pace and step.scenario == "paced":
        changes["pace"] = arguments.pace
    return evolve(step, **changes)


def _peers(arguments: argparse.Namespace, agent_url: str) -> list[Subject]:
    urls = [peer for peer in arguments.peer if peer not in _PEER_SUFFIXES]
    if len(urls) != len(arguments.peer_pid):
        raise CommandFailed("every --peer URL needs its --peer-pid.", ExitCode.USAGE)
    launches = [running_launch(url, url, pid) for url, pid in zip(urls, arguments.peer_pid, strict=True)]
    for kind in (peer for peer in arguments.peer if peer in _PEER_SUFFIXES):
        if not any(script.suffix in _PEER_SUFFIXES[kind] for script in arguments.peer_script):
            raise CommandFailed(f"--peer {kind} needs its --peer-script FILE.", ExitCode.USAGE)
    launches += [peer_launch(script, agent_url, arguments.peer_python) for script in arguments.peer_script]
    return [Subject(launch.name, launch, is_peer=True) for launch in launches]


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
