"""``python -m gateway.worker FD``: one process of ``gateway serve --workers``, started by its supervisor.

    worker nursery
    ├── gateway           as ``gateway serve`` runs it, on sockets that the supervisor holds
    ├── channel           to the supervisor; that it ends means that the supervisor is gone
    └── signals           SIGTERM → drain; SIGINT is the supervisor's business

A supervisor that is killed takes nobody with it: its workers drain, tell their clients to come back and end.
"""

from __future__ import annotations

import signal
import socket
import sys
import traceback
from collections.abc import Sequence

import trio

from gateway import app
from gateway.commands.exit_codes import CommandFailed, ExitCode
from gateway.commands.running import expected_failure, explain_start_failure, settle_start_up
from gateway.core.errors import StoreUnavailable
from gateway.workers.channel import Channel, Leaving, Listening, Message, Setup
from gateway.workers.siblings import ChannelSiblings
from gateway.workers.worker_process import load_configuration


def main(arguments: Sequence[str]) -> int:
    """Run until the supervisor says so, or is gone; the exit code as of ``gateway serve``."""
    try:
        return trio.run(_work, _inherited(int(arguments[0])))
    except CommandFailed as failed:
        sys.stderr.write(f"gateway: {failed}\n")
        return failed.code
    except Exception:
        traceback.print_exc()
        return ExitCode.SOFTWARE


def _inherited(descriptor: int) -> socket.socket:
    plain = socket.socket(fileno=descriptor)
    plain.set_inheritable(False)
    return plain


async def _work(control: socket.socket) -> int:
    stop = trio.Event()
    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(control)))
    send, receive = trio.open_memory_channel[Setup](1)
    worker = _Worker(channel, stop, send)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch_signals() -> None:
                async for number in signals:
                    if number == signal.SIGTERM:
                        stop.set()

            async def listen_to_supervisor() -> None:
                await channel.run(worker.take)
                stop.set()
                await send.aclose()

            async def leave() -> None:
                await stop.wait()
                channel.post(Leaving())

            nursery.start_soon(watch_signals)
            nursery.start_soon(listen_to_supervisor)
            nursery.start_soon(leave)
            try:
                async for setup in receive:
                    await worker.serve(setup)
                    break
            except Exception as error:
                reason = expected_failure(error, (StoreUnavailable, OSError))
                if reason is None or worker.listens:
                    raise
                sys.stderr.write(f"gateway: {explain_start_failure(reason)}\n")
                return ExitCode.FAILURE
            finally:
                nursery.cancel_scope.cancel()
    return ExitCode.OK


class _Worker:
    def __init__(self, channel: Channel, stop: trio.Event, setup: trio.MemorySendChannel[Setup]) -> None:
        self._channel = channel
        self._stop = stop
        self._setup = setup
        self._siblings: ChannelSiblings | None = None
        self.listens = False

    def take(self, message: Message) -> None:
        if isinstance(message, Setup):
            self._setup.send_nowait(message)
        elif self._siblings is not None:
            self._siblings.take(message)

    async def serve(self, setup: Setup) -> None:
        configuration = load_configuration(setup.configuration)
        telemetry = app.make_telemetry(configuration.settings, worker=setup.number)
        self._siblings = ChannelSiblings(self._channel, telemetry, number=setup.number, count=setup.count)
        await app.serve(
            configuration,
            telemetry=telemetry,
            announce=self._announce,
            stop=self._stop,
            seat=app.Seat(
                siblings=self._siblings,
                sockets=[_inherited(each) for each in setup.sockets],
                metrics_sockets=[_inherited(each) for each in setup.metrics_sockets],
            ),
        )

    def _announce(self, urls: Sequence[str]) -> None:
        self.listens = True
        settle_start_up()
        self._channel.post(Listening(list(urls)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
