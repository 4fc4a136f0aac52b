"""The runtime as a process of its own, and a client that comes back after every cut."""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import trio

LISTENING = b"Listening on "


@asynccontextmanager
async def runtime_process(
    *arguments: str, environment: Mapping[str, str] | None = None, stderr: int | None = None
) -> AsyncIterator[tuple[str, trio.Process]]:
    """``gateway agent`` with these arguments: its URL and its process, which is killed at the end."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "gateway", "agent", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=None if environment is None else {**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        said = b""
        while not said.endswith(b"\n"):
            chunk = await process.stdout.receive_some()
            assert chunk, "the runtime ended before it listened"
            said += chunk
        assert said.startswith(LISTENING)
        yield said.removeprefix(LISTENING).decode().strip(), process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()


def free_port() -> int:
    """A port that nobody listens on now: one that a runtime keeps over its restarts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spool_pid(db: Path) -> int | None:
    """The process that asks the LLM for the runtime on this file, if it is running."""
    try:
        pid = int(Path(f"{db}.llm.lock").read_text("ascii"))
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else pid


async def wait_spool_ended(db: Path, within: float) -> None:
    """Return once that process has ended. Raises `trio.TooSlowError`."""
    with trio.fail_after(within):
        while spool_pid(db) is not None:  # noqa: ASYNC110 - another process's end is no event here
            await trio.sleep(0.02)


class ResumingClient:
    """Posts like a gateway: the same key again after a cut, with the last id it saw."""

    def __init__(self, url: str, session_id: str = "s1") -> None:
        self.url = url
        self.session_id = session_id
        self.cuts = 0

    async def post(self, message: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """All events of one turn, however often the stream is cut."""
        events: list[dict[str, Any]] = []
        last_id = 0
        while True:
            headers = {"Idempotency-Key": key}
            if last_id:
                headers["Last-Event-ID"] = str(last_id)
            try:
                async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
                    body = {"session_id": self.session_id, "message": message}
                    request = http.build_request(
                        "POST", f"{self.url}/agent/message/stream", json=body, headers=headers
                    )
                    response = await http.send(request, stream=True)
                    try:
                        assert response.status_code == 200, await response.aread()
                        assert response.headers["X-Stream-Resumable"] == "1"
                        last_id, ended = await self._read(response, events, last_id)
                    finally:
                        await response.aclose()
                    if ended:
                        return events
            except httpx.TransportError:
                pass
            self.cuts += 1
            await trio.sleep(0.02)

    async def _read(
        self, response: httpx.Response, events: list[dict[str, Any]], last_id: int
    ) -> tuple[int, bool]:
        # Read to the end of the stream even after `done`: leaving httpx's generators early leaks them.
        buffer, ended = b"", False
        try:
            async for chunk in response.aiter_raw():
                buffer += chunk
                *blocks, buffer = buffer.split(b"\n\n")
                for block in blocks:
                    if block.startswith(b":"):
                        continue
                    fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
                    assert int(fields[b"id"]) == last_id + 1, "an event was lost or repeated"
                    last_id += 1
                    if fields[b"event"] == b"done":
                        ended = True
                    else:
                        events.append(orjson.loads(fields[b"data"]))
        except httpx.TransportError:
            pass
        return last_id, ended


def text_of(events: list[dict[str, Any]]) -> str:
    """The tokens put together."""
    return "".join(event["token"] for event in events if event["type"] == "assistant_message")
