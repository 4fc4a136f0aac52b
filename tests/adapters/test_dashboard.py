"""Who may see the dashboard's figures, what is in them, and when their stream ends."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import httpx
import pytest
import trio

from gateway.adapters.rest import create_app
from gateway.adapters.rest.access import Access, RequestHead
from gateway.adapters.rest.dashboard import COLUMNS, MAX_VIEWERS, Dashboard
from gateway.adapters.rest.pages import PAGES_POLICY
from gateway.adapters.stores.memory import MemoryStore
from gateway.app import own_origins
from gateway.core.errors import Overloaded
from gateway.core.identity import SCOPE_ADMIN, SCOPE_READ, Credentials, Identity
from gateway.core.overview import JournalEntry, PulseSample, SessionList, SessionOverview
from gateway.node_ports import ASK_CLOSE_SESSION, ASK_SESSION, Siblings
from gateway.operator_ports import Journal, Overview
from gateway.ports import Authenticator, Clock
from gateway.settings import Settings
from tests.adapters.rest.harness import (
    ADMIN,
    INTERNAL,
    FixedClock,
    RecordingTelemetry,
    TokenIsSubject,
    bearer,
)

FOREIGN = {"Origin": "https://evil.example"}


def sample(at: float, added: Sequence[float] = ()) -> PulseSample:
    """A second of a gateway's life."""
    return PulseSample(at, 10, 11, 12, 13, 1, 2, 3, 4, 0.001, added)


SESSION = SessionOverview("s1", "idle", None, "ask", 0, ["v1"], 0.01, 0, 5, 900, 1.0, "")


class FakeOverview(Overview):
    """One session."""

    def __init__(self) -> None:
        self.is_draining = False
        self.asked: list[str] = []
        self.closed: list[str] = []
        self.seconds = [sample(1.0, [0.3, 0.1, 0.2]), sample(2.0)]

    @property
    def draining(self) -> bool:
        """As set."""
        return self.is_draining

    @property
    def samples(self) -> Sequence[PulseSample]:
        """As set."""
        return self.seconds

    async def sessions(self, *, containing: str = "", limit: int = 100) -> SessionList:
        """The one."""
        self.asked.append(containing)
        return SessionList([SESSION], 1)

    def session(self, session_id: str) -> SessionOverview | None:
        """If it is asked for."""
        return SESSION if session_id == "s1" else None

    def close_session(self, session_id: str) -> bool:
        """Remember it."""
        self.closed.append(session_id)
        return session_id == "s1"


class FakeJournal(Journal):
    """Two entries."""

    def __init__(self) -> None:
        self.kept = [
            JournalEntry(1, 1.0, "info", "socket_opened", {"session_id": "s1"}),
            JournalEntry(2, 2.0, "error", "turn_crashed", {"session_id": "s1", "cause": "KeyError"}),
        ]

    def entries(
        self, *, session_id: str | None = None, troubles_only: bool = False, after: int = 0, limit: int = 100
    ) -> Sequence[JournalEntry]:
        """Those that fit."""
        return [
            entry
            for entry in self.kept
            if entry.number > after
            and (session_id is None or entry.fields["session_id"] == session_id)
            and (not troubles_only or entry.level == "error")
        ][-limit:]


class FakeSiblings(Siblings):
    """Worker 2 of 3; one other has the session ``there``."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[str], bytes | None]] = {}
        self.asked: list[tuple[str, str]] = []

    @property
    def number(self) -> int:
        """Of this process."""
        return 2

    @property
    def count(self) -> int:
        """With this one."""
        return 3

    def answer(self, question: str, answer: Callable[[str], bytes | None]) -> None:
        """Keep it for the test to ask."""
        self.answers[question] = answer

    async def ask(self, question: str, about: str = "") -> Mapping[str, bytes]:
        """The one that knows."""
        await trio.lowlevel.checkpoint()
        self.asked.append((question, about))
        return {"3": b'{"session":{},"timeline":[]}'} if about == "there" else {}


async def _no_metrics() -> bytes:
    await trio.lowlevel.checkpoint()
    return b""


class Pages:
    """The REST application with a dashboard."""

    def __init__(self, siblings: Siblings | None = None, **settings: Any) -> None:
        self.overview = FakeOverview()
        self.journal = FakeJournal()
        self.telemetry = RecordingTelemetry()
        self.app = create_app(
            Settings(**settings),
            authenticator=TokenIsSubject(),
            store=MemoryStore(dedupe_window=60),
            telemetry=self.telemetry,
            clock=FixedClock(),
            agent=httpx.AsyncClient(),
            render_metrics=_no_metrics,
            check_ready=trio.lowlevel.checkpoint,
            overview=self.overview,
            journal=self.journal,
            siblings=siblings,
        )

    async def call(self, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
        """One request."""
        client: Any = self.app.test_client()
        with trio.fail_after(5):  # a stream that should have been refused would not end
            return await client.open(path, method=method, headers=headers or {})


class Stream:
    """The events of a dashboard, without the web server that would run ahead of the test."""

    def __init__(self, siblings: Siblings | None = None) -> None:
        self.overview = FakeOverview()
        self.clock = MovingClock()
        telemetry = RecordingTelemetry()
        access = Access(
            ExpiringToken(),
            MemoryStore(dedupe_window=60),
            telemetry,
            self.clock,
            rate_per_minute=0,
            trusted_proxies=(),
        )
        self.dashboard = Dashboard(access, self.overview, FakeJournal(), self.clock, telemetry, siblings)

    async def open(self, containing: str = "") -> AsyncGenerator[bytes, None]:
        """A viewer whose token holds for two minutes."""
        head = RequestHead([("authorization", "Bearer t")], "")
        stream = await self.dashboard.events(head, containing)
        assert isinstance(stream, AsyncGenerator)
        return stream


class MovingClock(Clock):
    """Follows Trio's clock."""

    def now(self) -> float:
        """Seconds."""
        return trio.current_time()


class ExpiringToken(Authenticator):
    """An operator for two minutes."""

    async def authenticate(self, credentials: Credentials, *, socket: bool) -> Identity:
        """See ``ports.Authenticator``."""
        return Identity("root", frozenset({SCOPE_READ, SCOPE_ADMIN}), expires_at=trio.current_time() + 120)


async def event(stream: AsyncIterator[bytes]) -> tuple[str, Any]:
    """The next event: its type and its data."""
    text = (await anext(stream)).decode()
    found = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", text)
    assert found, text
    return found[1], json.loads(found[2])


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/dashboard/events", "GET"),
        ("/dashboard/sessions/s1", "GET"),
        ("/dashboard/sessions/s1/close", "POST"),
    ],
)
async def test_is_for_operators(path: str, method: str) -> None:
    """Nobody without proof, nobody with a user's token, and a key in the URL is none."""
    pages = Pages()

    assert (await pages.call(path, None, method)).status_code == 401
    assert (await pages.call(path, bearer("anna"), method)).status_code == 403
    assert (await pages.call(f"{path}?key=k-internal", None, method)).status_code == 401
    assert pages.overview.closed == []


async def test_closing_needs_the_right_to_write() -> None:
    """A token that may only read, if all, closes nothing."""
    pages = Pages()

    refused = await pages.call("/dashboard/sessions/s1/close", ADMIN, "POST")
    closed = await pages.call("/dashboard/sessions/s1/close", bearer("r", "api:write", "api:admin"), "POST")

    assert (refused.status_code, closed.status_code) == (403, 200)
    assert pages.overview.closed == ["s1"]
    assert ("warning", "session_closed_by_operator", {"session_id": "s1", "subject": "r"}) in [
        (level, name, fields) for level, name, fields in pages.telemetry.lines
    ]


async def test_a_foreign_page_cannot_have_a_session_closed() -> None:
    """What a browser sends for another site has no key with it, and asking first is answered with no."""
    pages = Pages()
    ask = {**FOREIGN, "Access-Control-Request-Method": "POST"}

    assert (await pages.call("/dashboard/sessions/s1/close", FOREIGN, "POST")).status_code == 401
    assert (await pages.call("/dashboard/sessions/s1/close", ask, "OPTIONS")).status_code == 403
    assert (await pages.call("/api/v1/sessions", {**FOREIGN, **INTERNAL}, "POST")).status_code == 403


async def test_closes_from_its_own_page() -> None:
    """A browser names the gateway's own origin, which no setting has to list."""
    own = {**INTERNAL, "Origin": "https://gateway.example"}

    assert (await Pages().call("/dashboard/sessions/s1/close", own, "POST")).status_code == 200


async def test_tells_a_session_and_its_timeline() -> None:
    """Also when it is not live any more; 404 when nothing is known."""
    pages = Pages()
    live = await (await pages.call("/dashboard/sessions/s1", INTERNAL)).get_json()
    pages.journal.kept.append(
        JournalEntry(3, 3.0, "info", "socket_closed", {"session_id": "old", "code": 1000})
    )
    old = await (await pages.call("/dashboard/sessions/old", INTERNAL)).get_json()

    assert live["session"]["state"] == "idle"
    assert [entry["event"] for entry in live["timeline"]] == ["socket_opened", "turn_crashed"]
    assert live["timeline"][1]["cause"] == "KeyError"
    assert (old["session"], old["timeline"][0]["fields"]["code"]) == (None, 1000)
    assert (await pages.call("/dashboard/sessions/nobody", INTERNAL)).status_code == 404
    assert (await pages.call("/dashboard/sessions/a@b", INTERNAL)).status_code == 400
    assert (await pages.call("/dashboard/sessions/nobody/close", INTERNAL, "POST")).status_code == 404


async def test_other_workers_are_asked_for_a_session() -> None:
    """To show it and to close it, if it is not live here; and what is live here is told to them."""
    siblings = FakeSiblings()
    pages = Pages(siblings)
    assert (await pages.call("/dashboard/sessions/s1", INTERNAL)).status_code == 200
    assert not siblings.asked
    there = await pages.call("/dashboard/sessions/there", INTERNAL)
    assert await there.get_json() == {"session": {}, "timeline": []}
    assert (await pages.call("/dashboard/sessions/there/close", INTERNAL, "POST")).status_code == 200
    assert (await pages.call("/dashboard/sessions/nobody", INTERNAL)).status_code == 404
    assert (await pages.call("/dashboard/sessions/nobody/close", INTERNAL, "POST")).status_code == 404

    assert siblings.asked == [
        (ASK_SESSION, "there"),
        (ASK_CLOSE_SESSION, "there"),
        (ASK_SESSION, "nobody"),
        (ASK_CLOSE_SESSION, "nobody"),
    ]
    shown = siblings.answers[ASK_SESSION]("s1")
    assert shown is not None
    assert json.loads(shown)["session"]["session_id"] == "s1"
    assert siblings.answers[ASK_SESSION]("nobody") is None
    assert siblings.answers[ASK_CLOSE_SESSION]("s1") == b"closed"
    assert siblings.answers[ASK_CLOSE_SESSION]("nobody") is None
    assert pages.overview.closed[-2:] == ["s1", "nobody"]


async def test_who_may_not_look_is_not_asked_about_elsewhere() -> None:
    """The other workers trust this one's answer to who is asking."""
    siblings = FakeSiblings()
    pages = Pages(siblings)

    assert (await pages.call("/dashboard/sessions/there", {})).status_code == 401
    assert (await pages.call("/dashboard/sessions/there/close", {}, "POST")).status_code == 401
    assert siblings.asked == []


async def test_says_which_worker_it_shows(autojump_clock: trio.abc.Clock) -> None:
    """And nothing of the kind where one process serves."""
    for siblings, shown in ((FakeSiblings(), [2, 3]), (None, None)):
        async with aclosing(await Stream(siblings).open()) as stream:
            assert (await event(stream))[1]["worker"] == shown


async def test_streams_a_pulse_a_second(autojump_clock: trio.abc.Clock) -> None:
    """First all samples, then the new ones; sessions each time, troubles once."""
    subject = Stream()
    async with aclosing(await subject.open("S1")) as stream:
        _, first = await event(stream)
        started = trio.current_time()
        subject.overview.seconds.append(sample(3.0))
        _, second = await event(stream)

    assert trio.current_time() - started == 1.0
    assert tuple(first["columns"]) == COLUMNS
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in first["samples"]]
    assert [(row["at"], row["added_p50"], row["added_p99"]) for row in rows] == [
        (1, 0.2, 0.3),
        (2, None, None),
    ]
    assert [row[0] for row in second["samples"]] == [3]
    assert first["sessions"][0]["session_id"] == second["sessions"][0]["session_id"] == "s1"
    assert [trouble["event"] for trouble in first["troubles"]] == ["turn_crashed"]
    assert second["troubles"] == []
    assert subject.overview.asked == ["S1", "S1"]


async def test_the_stream_ends_with_the_node(autojump_clock: trio.abc.Clock) -> None:
    """A dashboard that is open must not hold up a stop."""
    subject = Stream()
    stream = await subject.open()
    await event(stream)
    subject.overview.is_draining = True

    assert (await event(stream))[0] == "end"
    assert [chunk async for chunk in stream] == []


async def test_the_stream_ends_with_the_token(autojump_clock: trio.abc.Clock) -> None:
    """Who may look for two minutes sees two minutes."""
    stream = await Stream().open()

    kinds = [chunk.partition(b"\n")[0] async for chunk in stream]

    assert kinds == [b"event: pulse"] * 120 + [b"event: end"]


async def test_few_may_look_at_once(autojump_clock: trio.abc.Clock) -> None:
    """Each costs a survey a second; a place is free again when somebody leaves."""
    subject = Stream()
    async with AsyncExitStack() as viewers:
        leaver = await subject.open()
        await event(leaver)
        for _ in range(MAX_VIEWERS - 1):
            await event(await viewers.enter_async_context(aclosing(await subject.open())))

        with pytest.raises(Overloaded):
            await subject.open()
        await leaver.aclose()
        next_one = await viewers.enter_async_context(aclosing(await subject.open()))
        assert (await event(next_one))[0] == "pulse"


@pytest.mark.parametrize("name", ["dashboard", "playground"])
async def test_pages_hold_to_their_policy(name: str) -> None:
    """No inline script or style, no handler attribute, nothing from another host; and every part is there."""
    pages = Pages(playground=True)
    response = await pages.call(f"/{name}")
    text = (await response.get_data()).decode()

    assert response.headers["Content-Security-Policy"] == PAGES_POLICY
    assert "unsafe" not in PAGES_POLICY
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", text)
    parts = set(re.findall(r'(?:src|href)="(web/[^"]+)"', text))
    while parts:
        part = parts.pop()
        answer = await pages.call(f"/{part}")
        assert answer.status_code == 200, part
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        content = (await answer.get_data()).decode()
        if part.endswith(".js"):
            assert answer.headers["Content-Type"].startswith("text/javascript")
            imported = re.findall(r'^(?:import|export) [^;]*?from "\./([^"]+)";', content, re.MULTILINE)
            parts |= {f"web/{module}" for module in imported}
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", content)


async def test_the_playground_is_off_unless_asked_for() -> None:
    """Nor are its parts there."""
    pages = Pages()

    assert (await pages.call("/playground")).status_code == 404
    assert (await pages.call("/web/playground.js")).status_code == 404
    assert (await pages.call("/web/../settings.py")).status_code == 404
    assert (await pages.call("/dashboard")).status_code == 200


async def test_the_contract_lists_the_pages() -> None:
    """/openapi.json has what is on, and no more."""
    on, off = Pages(playground=True), Pages()
    rules = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method)
        for rule in on.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    document = await (await on.call("/openapi.json")).get_json()
    documented = {
        (path, method.upper()) for path, operations in document["paths"].items() for method in operations
    }

    assert documented == rules
    assert "/playground" not in (await (await off.call("/openapi.json")).get_json())["paths"]


def test_own_origins_are_names_that_nobody_else_can_have() -> None:
    """Loopback by its three names, whatever it listens on; never the machine's address or name."""
    assert own_origins(["http://0.0.0.0:8000", "unix:/x"]) == {
        "http://127.0.0.1:8000",
        "http://localhost:8000",
        "http://[::1]:8000",
    }
