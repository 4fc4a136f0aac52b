"""The LLM spool as a process: ``python -m gateway.reference_agent.llm_spool_process``.

The runtime starts it. It is no command for people: it takes and says nothing, and ends by itself.
"""

import argparse
import os
import random
import socket
from contextlib import suppress

import trio

from gateway.reference_agent.llm_client import open_llm_client
from gateway.reference_agent.llm_spool import LlmSpool
from gateway.reference_agent.llm_spool_place import SpoolPlace, only_one, place_of
from gateway.reference_agent.llm_spool_protocol import identity
from gateway.reference_agent.llm_spool_server import SpoolServer
from gateway.reference_agent.log_output import log_to_stderr
from gateway.reference_agent.settings import LLM_KEY_VARIABLE

BACKLOG = 128
STDERR = 2


def main() -> None:
    """Serve the spool of one database, unless another process does already; then leave at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", required=True)
    parser.add_argument("--llm-url", required=True)
    parser.add_argument("--keep", type=float, required=True)
    arguments = parser.parse_args()
    key = os.environ.get(LLM_KEY_VARIABLE) or None
    log_to_stderr()
    place = place_of(arguments.db)
    with only_one(place) as alone:
        if alone:
            trio.run(serve_spool, place, arguments.llm_url, key, arguments.keep)


async def serve_spool(place: SpoolPlace, llm_url: str, key: str | None, keep: float) -> None:
    """Serve until nobody needs it; then the socket is removed. The caller holds the place's lock."""
    async with open_llm_client(llm_url, key, random.random) as client:
        listener = listen(place)
        try:
            async with trio.open_nursery() as calls:
                server = SpoolServer(
                    LlmSpool(client, calls, keep), identity(llm_url, key, keep), keep=keep, on_left=_hush
                )
                await server.serve(listener)
                calls.cancel_scope.cancel()
        finally:
            with suppress(FileNotFoundError):
                place.socket.unlink()


def listen(place: SpoolPlace) -> trio.SocketListener:
    """The place's socket, open to this user alone. The caller holds the place's lock. Raises `OSError`."""
    with suppress(FileNotFoundError):
        place.socket.unlink()  # of one that was killed
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # for this user alone from its first moment
    try:
        listening.bind(os.fspath(place.socket))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _hush() -> None:
    """Let go of the runtime's standard error once it has left: whoever reads that waits for its end."""
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, STDERR)
        os.close(nothing)


if __name__ == "__main__":
    main()
