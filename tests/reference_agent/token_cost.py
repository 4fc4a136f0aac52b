"""What a token costs the runtime: ``python -m tests.reference_agent.token_cost``.

Starts ``gateway agent`` on a database, an LLM that streams to many sessions at once, and prints the CPU time
per token of the runtime and of the process that asks the LLM for it, as the kernel counts it.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import httpx
import orjson
import trio

from .runtime_process import runtime_process, spool_pid

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WORD = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
END = b'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class StreamingLlm:
    """Answers every request with ``writes`` writes of ``burst`` tokens each, ``pause`` seconds apart."""

    def __init__(self, writes: int, burst: int, pause: float) -> None:
        self._writes = writes
        self._burst = burst
        self._pause = pause

    async def __call__(self, stream: trio.SocketStream) -> None:
        """Serve one connection, a request after the other."""
        received = b""
        while chunk := await stream.receive_some():
            received += chunk
            head, separator, body = received.partition(b"\r\n\r\n")
            length = next(
                (
                    int(line[15:])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ),
                0,
            )
            if separator and len(body) >= length:
                received = b""
                await self._answer(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        words = WORD * self._burst
        await stream.send_all(HEAD)
        for _ in range(self._writes):
            await trio.sleep(self._pause)
            await stream.send_all(b"%x\r\n%b\r\n" % (len(words), words))
        await stream.send_all(b"%x\r\n%b\r\n0\r\n\r\n" % (len(END), END))


def cpu_seconds(pid: int | None) -> float:
    """User and system time that a process has used, with all its threads."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(sessions: int, writes: int, burst: int, pause: float, folder: Path) -> str:
    """One line of figures."""
    db = folder / f"agent-{sessions}-{burst}.sqlite3"
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, StreamingLlm(writes, burst, pause), 0)
        port = listeners[0].socket.getsockname()[1]
        arguments = ("--llm", "openai", "--llm-url", f"http://127.0.0.1:{port}", "--db", str(db))
        async with (
            runtime_process("--bind", "127.0.0.1:0", *arguments) as (url, process),
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http,
        ):

            async def ask(session: int, key: str) -> None:
                message = {"type": "user_message", "content": "go", "agent_type": "ask"}
                content = orjson.dumps({"session_id": f"s{session}", "message": message})
                headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
                answer = await http.post("/agent/message/stream", content=content, headers=headers)
                assert answer.text.count('"token":"word "') == writes * burst, answer.text[-500:]

            await ask(0, "warm-up")
            before = cpu_seconds(process.pid), cpu_seconds(spool_pid(db))
            began = trio.current_time()
            async with trio.open_nursery() as asking:
                for session in range(sessions):
                    asking.start_soon(ask, session, "measured")
            took = trio.current_time() - began
            after = cpu_seconds(process.pid), cpu_seconds(spool_pid(db))
            process.terminate()
            await process.wait()
        nursery.cancel_scope.cancel()
    tokens = sessions * writes * burst
    runtime, spool = (1e6 * (late - early) / tokens for early, late in zip(before, after, strict=True))
    return (
        f"{sessions} sessions, {burst} tokens per read: runtime {runtime:.0f} µs per token,"
        f" spool {spool:.0f}; {tokens} tokens in {took:.1f} s"
    )


def main() -> None:
    """Measure a few ways of streaming."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400, help="per session (%(default)s)")
    tokens = parser.parse_args().tokens
    with tempfile.TemporaryDirectory() as folder:
        for sessions, burst in ((1, 1), (1, 20), (20, 1), (20, 20)):
            line = trio.run(measure, sessions, tokens // burst, burst, 0.005 * burst, Path(folder))
            sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
