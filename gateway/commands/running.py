"""Running servers until they are told to stop, and saying where they listen."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.config import ConfigError, Configuration, load_configuration


def read_configuration(*, bind: str | None = None, workers: str | None = None) -> Configuration:
    """The configuration of this folder and environment. Raises ``CommandFailed`` with all its problems."""
    try:
        return load_configuration(os.environ, dotenv=Path(".env"), bind=bind, workers=workers)
    except ConfigError as error:
        raise CommandFailed(str(error), ExitCode.CONFIG) from None


def announce(urls: Sequence[str]) -> None:
    """Say where somebody can connect, for people and for scripts that started us on port 0."""
    for url in urls:
        sys.stdout.write(f"Listening on {url}\n")
    sys.stdout.flush()


def settle_start_up() -> None:
    """Spare garbage collections what start-up made, which stays.

    A full collection, which the first sessions bring about, would go through all of it while every token
    waits: 50 ms of CPU for nothing.
    """
    gc.collect()
    gc.freeze()


async def run_until_stopped(work: Callable[[trio.Event], Awaitable[int]]) -> int:
    """Run ``work`` until it returns, and set its event on the first SIGTERM or SIGINT.

    A second signal cancels it: whoever presses Ctrl-C twice does not want to wait for the drain. Signals
    count from the start on, so that a stop during start-up is a clean one too. ``CommandFailed`` leaves as
    it is, and not in a group.
    """
    stop = trio.Event()
    result: int = ExitCode.FAILURE
    failure: CommandFailed | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    if stop.is_set():
                        sys.stderr.write("gateway: stopped without waiting for the drain\n")
                        nursery.cancel_scope.cancel()
                    stop.set()

            nursery.start_soon(watch)
            try:
                result = await work(stop)
            except CommandFailed as failed:
                failure = failed
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


def expected_failure(
    error: BaseException, kinds: type[Exception] | tuple[type[Exception], ...]
) -> Exception | None:
    """The one exception inside ``error``, however many groups are around it, if it is of ``kinds``."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, kinds) and not isinstance(error, BaseExceptionGroup) else None


def explain_start_failure(reason: Exception) -> str:
    """What prevented a gateway from starting, and what to do."""
    if isinstance(reason, OSError):
        text = reason.args[1] if len(reason.args) > 1 else str(reason)
        return f"{text}. Free it, or choose another with --bind HOST:PORT (port 0 takes a free one)."
    return str(reason)
