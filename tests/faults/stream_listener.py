"""A v2 client that listens to one answer across restarts of gateways, and checks every event it gets.

It does what ``docs/protocol.md`` asks of clients: comes back when ``draining`` says, after another end with
full jitter, resumes by epoch and seq, tries the next node when one does not take it. Asyncio's protocols and
no more, so that hundreds of them leave the machine to the gateways.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from gateway.bench.socket_client import upgrade_request
from tests.faults.json_socket import JsonSocket

BACKOFF = 0.5
"""protocol.md section 6: the most that is waited before the first try."""
BACKOFF_MOST = 5.0
SILENCE_SECONDS = 3.0
SILENT = 0
"""In place of a close code."""
RECONNECTABLE = (1001, 1006, 1011, 1012, 1013, 4408, 4413, 4429)


class StreamListener:
    """One session. ``ports`` gives those of the nodes that a client may try now.

    A stream that says nothing for ``silence`` seconds hangs somewhere: its client tries the next node.
    """

    def __init__(
        self,
        session_id: str,
        ports: Callable[[], Sequence[int]],
        *,
        pace: float,
        seed: int,
        first: int,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self.session_id = session_id
        self._ports = ports
        self._pace = pace
        self._silence = silence
        self._random = random.Random(f"{seed}/{session_id}")
        self._choice = first
        self.epoch: str | None = None
        self.last_seq = 0
        self.tokens = 0
        """The next token's number."""
        self.outcomes: list[str] = []
        self.violations: list[str] = []
        self.joins = 0
        self.refused = 0
        """Connections that were not taken, or were lost before their welcome."""
        self.snapshots = 0
        self.longest_gap = 0.0
        """Seconds between two arrivals of tokens."""
        self._token_at: float | None = None
        self.had_token = asyncio.Event()
        self.ended = asyncio.Event()
        self._failures = 0
        self.gaps: list[tuple[float, float]] = []
        """(when it ended, how long) of those that are longer than twice the pace."""

    @property
    def is_done(self) -> bool:
        """Whether its turn has ended."""
        return self.ended.is_set()

    def is_served(self, now: float) -> bool:
        """Whether tokens come."""
        return self._token_at is not None and now - self._token_at < 2 * self._pace + 0.5

    @property
    def pause(self) -> float:
        """The longest time between two tokens, beyond the pace; seconds."""
        return max(0.0, self.longest_gap - self._pace)

    async def run(self) -> None:
        """Say one message and listen until its turn has ended."""
        loop = asyncio.get_running_loop()
        while not self.ended.is_set():
            ports = list(self._ports())
            port = ports[self._choice % len(ports)]
            try:
                _, socket = await loop.create_connection(lambda: JsonSocket(self), "127.0.0.1", port)
            except OSError:
                self.refused += 1
                self._choice += 1
                self._failures += 1
                # The next node at once, and slowly when all of them refused.
                await asyncio.sleep(0 if self._failures % len(ports) else self._backoff())
                continue
            resume = f"?epoch={quote(self.epoch)}&last_seq={self.last_seq}" if self.epoch else ""
            path = f"/api/v1/ws/{self.session_id}"
            socket.open(upgrade_request(f"127.0.0.1:{port}", path, "v2-json", [], resume))
            code = await self._end(socket)
            socket.abort()
            if self.ended.is_set():
                return
            if code not in (*RECONNECTABLE, SILENT):
                self.violations.append(f"closed with {code}")
                self.ended.set()
                return
            if not socket.was_welcome:
                self.refused += 1
                self._failures += 1
            if not socket.was_welcome or code == SILENT or socket.come_back_at is not None:
                self._choice += 1
            if socket.come_back_at is not None:
                await asyncio.sleep(max(0.0, socket.come_back_at - loop.time()))
            else:
                await asyncio.sleep(self._backoff())

    async def _end(self, socket: JsonSocket) -> int:
        """Its close code, or ``SILENT``: then it is as good as gone, and its node too."""
        loop = asyncio.get_running_loop()
        while not (await asyncio.wait({socket.closed}, timeout=self._silence / 4))[0]:
            if loop.time() - socket.heard_at > self._silence:
                return SILENT
        return socket.closed.result()

    def _backoff(self) -> float:
        return self._random.uniform(0, min(BACKOFF_MOST, BACKOFF * 2 ** min(self._failures, 8)))

    # ------------------------------------------------------------------ what a socket got

    def welcome(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The first object; gives what there is to say."""
        self.joins += 1
        self._failures = 0
        if self.epoch is None:
            self.epoch = item["epoch"]
            self.last_seq = item["last_seq"]
        elif not item["resumed"]:
            self.violations.append(f"not resumed at {self.last_seq} of {self.epoch}")
        if self.tokens == 0 and self.last_seq == 0:
            return [{"type": "user_message", "content": "count", "id": "m1"}]
        return []

    def take(self, item: dict[str, Any], now: float) -> None:
        """One object after the welcome."""
        kind = item["type"]
        if kind == "snapshot":
            self.snapshots += 1
            self.violations.append(f"a snapshot: {item['reason']}")
            self.epoch, self.last_seq = item.get("epoch", self.epoch), item["seq"]
            return
        if kind == "nack":
            self.violations.append(f"nack {item['code']}")
            return
        seq = item.get("seq")
        if seq is None or kind in ("ack", "authenticated"):
            return
        first = item.get("first_seq", seq)
        if first != self.last_seq + 1:
            self.violations.append(f"seq {first} came after {self.last_seq}")
        self.last_seq = seq
        if kind == "assistant_message":
            self._tokens(item["token"].split(), now)
        elif kind == "turn_ended":
            self.outcomes.append(item["outcome"])
            self.ended.set()
        elif kind == "error":
            self.violations.append(f"error {item['code']}")

    def _tokens(self, words: list[str], now: float) -> None:
        for word in words:
            if int(word) != self.tokens:
                self.violations.append(f"token {word} came where {self.tokens} was due")
            self.tokens = int(word) + 1
        if self._token_at is not None:
            gap = now - self._token_at
            self.longest_gap = max(self.longest_gap, gap)
            if gap > 2 * self._pace + 0.05:
                self.gaps.append((now, gap))
        self._token_at = now
        self.had_token.set()
