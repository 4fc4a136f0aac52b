"""The campaign: attackers on every target at once, bystanders among them, and what must not have happened."""

from __future__ import annotations

import random
import re
import socket
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson
import trio
from attrs import define, field

from tests.adapters.socket_harness import client_frame
from tests.fuzz import inputs
from tests.fuzz.bystanders import Bystanders
from tests.fuzz.mutation import cut
from tests.hostile.servers import Request, answer
from tests.hostile.surroundings import AUDIENCE, Surroundings, open_surroundings, saying

TARGETS = ("handshake", "frames", "json", "messagepack", "sse", "paths", "jwt")
ATTACKERS = 2
"""At once, per target."""
LISTEN = 0.3
"""Seconds that an attacker listens at most for what its input brings."""
FETCH_SECONDS = 30.0

_SESSION = r"[A-Za-z0-9._:-]{1,128}"
_UPSTREAM = re.compile(
    rf"/(agent/message/stream|agents|agents/{_SESSION}/current|sessions|sessions/{_SESSION}/(history|pending-approvals)"
    rf"|events/(metrics|metrics/sessions|metrics/session/{_SESSION}|stats|audit-log))(\?[!-~]*)?"
)
_CLIENT_CASE = "__case__"


@define
class Outcome:
    """What a campaign came to."""

    seconds: float = 0.0
    cases: Counter[str] = field(factory=Counter)
    answers: int = 0
    """Of the Agent Runtime to bystanders …"""
    unanswered: int = 0
    """… and turns of theirs that failed there."""
    broken: list[str] = field(factory=list)
    """What must not have happened, each with the case to repeat."""


@define
class Campaign:
    """Attacks one gateway."""

    surroundings: Surroundings
    seed: int
    outcome: Outcome = field(factory=Outcome)

    def source(self, target: str, number: int) -> random.Random:
        """The randomness of one case: the same for the same seed, target and number."""
        return random.Random(zlib.crc32(f"{self.seed} {target} {number}".encode()))

    async def attack(self, target: str, first: int, step: int) -> None:
        """Cases ``first``, ``first + step``, … until cancelled."""
        number = first
        while True:
            with trio.move_on_after(10):
                await self.one(target, number)
            self.outcome.cases[target] += 1
            number += step

    async def one(self, target: str, number: int) -> None:
        """One case."""
        source = self.source(target, number)
        token = self.surroundings.issuer.token(f"fuzz-{source.randrange(4)}")
        session = f"fuzz-{target}-{source.randrange(50)}-{number % 4}"
        if target == "handshake":
            received = await self._send(source, inputs.handshake(source, token))
        elif target == "paths":
            received = await self._send(source, inputs.request(source, token))
        elif target == "jwt":
            bad = inputs.bad_token(source, token)
            if source.random() < 0.5:
                sent = inputs.upgrade("", f"/ws/{session}").replace(
                    b"Bearer ", b"Bearer " + bad.encode("latin-1")
                )
            else:
                sent = (
                    b"GET /api/v1/agents HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer "
                )
                sent += bad.encode("latin-1") + b"\r\n\r\n"
            received = await self._send(source, sent)
            if received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 101")):
                self._broken(target, number, f"a token that must not hold opened: {received[:60]!r}")
        else:
            head = f"/ws/{source.choice('abcd')}-{session}"
            good = self.surroundings.issuer.token(f"owner-of-{head[4:]}")
            protocol = (
                "codelab.v2.msgpack" if target == "messagepack" else source.choice((None, "codelab.v2.json"))
            )
            if target == "frames":
                data = inputs.frames(source)
            elif target == "sse":
                fields = {"type": "user_message", "content": f"{_CLIENT_CASE} {number}", "id": f"n{number}"}
                data = client_frame(1, orjson.dumps(fields))
            else:
                data = inputs.messages(source, binary=target == "messagepack")
            received = await self._send(source, inputs.upgrade(good, head, protocol), data)
        if re.match(rb"HTTP/1.1 500", received):
            self._broken(target, number, f"answered {received[:200]!r}")

    async def _send(self, source: random.Random, *parts: bytes) -> bytes:
        """Send on a connection of its own, cut anywhere; close it in some way or other."""
        received = b""
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", self.surroundings.port)
        except OSError:
            return b""
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                for part in parts:
                    for piece in cut(source, part):
                        await stream.send_all(piece)
                        if source.random() < 0.3:
                            await trio.lowlevel.checkpoint()
                    if part is not parts[-1]:
                        with trio.move_on_after(LISTEN):
                            received += await stream.receive_some(65_536)
                how = source.randrange(4)
                if how == 1:
                    await stream.send_eof()
                if how:
                    with trio.move_on_after(LISTEN):
                        async for chunk in stream:
                            received += chunk
                if how == 2:
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return received

    def _broken(self, target: str, number: int, what: str) -> None:
        self.outcome.broken.append(f"--only {target}:{number} --seed {self.seed}: {what}")

    async def answer_as_agent(self, request: Request, stream: trio.SocketStream) -> None:
        """The Agent Runtime: calm sessions get an answer, others rubbish."""
        if not _UPSTREAM.fullmatch(request.target) or "evil" in (request.header("host") or ""):
            self.outcome.broken.append(f"the Agent Runtime was asked for {request.target[:200]!r}")
        if request.method == "POST" and request.target == "/agent/message/stream":
            body = orjson.loads(request.body)
            if body["session_id"].startswith("calm-"):
                await stream.send_all(saying("fine"))
                return
            said = str(body["message"].get("content"))
            number = (
                int(said.removeprefix(_CLIENT_CASE))
                if said.startswith(_CLIENT_CASE)
                else zlib.crc32(request.body)
            )
            source = self.source("stream", number)
            for piece in cut(source, inputs.stream(source)):
                await stream.send_all(piece)
                await trio.lowlevel.checkpoint()
            return
        source = self.source("rest", zlib.crc32(request.target.encode()))
        bodies = (b'{"sessions":[{"session_id":"fuzz-1"}]}', b"[]", b"{}", b'{"detail":"no"}')
        await stream.send_all(answer(source.choice(bodies)))

    async def judge(self) -> None:
        """Look at what the gateway says of itself."""
        crashes = await self.surroundings.crashes()
        if crashes:
            self.outcome.broken.append(f"{crashes:.0f} exceptions were caught by bulkheads")
        self.outcome.broken += [f"logged: {line[:2000]}" for line in self.surroundings.errors_logged()[:5]]
        allowed = 2 + self.outcome.seconds / FETCH_SECONDS
        if self.surroundings.issuer.asked > allowed:
            self.outcome.broken.append(f"signing keys were fetched {self.surroundings.issuer.asked} times")


async def run(seconds: float, seed: int, only: tuple[str, int] | None, say: Callable[[str], None]) -> Outcome:
    """Attack for ``seconds``, or with the one case ``only``."""
    holder: list[Campaign] = []

    async def agent(request: Request, stream: trio.SocketStream) -> None:
        await holder[0].answer_as_agent(request, stream)

    with tempfile.TemporaryDirectory() as folder:
        async with open_surroundings(
            Path(folder),
            agent,
            RATE_UPGRADES_PER_MINUTE="0",
            RATE_REST_PER_MINUTE="0",
            MAX_SOCKETS_PER_SUBJECT="5000",
            DETACH_GRACE="2",
            REPLAY_RETENTION="5",
            AGENT_STREAM_TIMEOUT="2",
            ALLOWED_ORIGINS="https://ide.example",
            JWT_AUDIENCE=AUDIENCE,
        ) as surroundings:
            campaign = Campaign(surroundings, seed)
            holder.append(campaign)
            outcome = campaign.outcome
            bystanders = Bystanders(surroundings)
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bystanders.run)
                if only is not None:
                    await trio.sleep(1)
                    await campaign.one(*only)
                    await trio.sleep(2)
                else:
                    async with trio.open_nursery() as attackers:
                        for target in TARGETS:
                            for first in range(ATTACKERS):
                                attackers.start_soon(campaign.attack, target, first, ATTACKERS)
                        attackers.cancel_scope.deadline = started + seconds
                        while trio.current_time() < started + seconds - 1:
                            await trio.sleep(min(60, started + seconds - trio.current_time()))
                            surroundings.requests.clear()
                            say(f"{trio.current_time() - started:.0f} s: {outcome.cases.total()} cases, "
                                f"{bystanders.answers} answers, {len(outcome.broken)} broken")  # fmt: skip
                before = bystanders.answers
                await trio.sleep(3)
                if bystanders.answers == before:
                    outcome.broken.append("bystanders get no answers after the attack")
                nursery.cancel_scope.cancel()
            outcome.seconds = trio.current_time() - started
            outcome.answers, outcome.unanswered = bystanders.answers, bystanders.unanswered
            outcome.broken += bystanders.lost
            await campaign.judge()
            surroundings.gateway.end()
            if (code := surroundings.gateway.wait()) != 0:
                outcome.broken.append(f"the gateway ended with {code}: {surroundings.gateway.log[-2000:]}")
            if outcome.broken:
                await trio.Path("fuzz-gateway.log").write_text(surroundings.gateway.log)
    return outcome
