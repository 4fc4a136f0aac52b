"""``gateway chat``: a conversation with an agent in a terminal, over ``gateway.client``.

    chat nursery
    ├── conversation     one thing at a time: a tool call, the running turn, or the user's next line
    ├── listener         events of the session → screen, open calls, running turns
    └── interrupts       Ctrl-C

With a terminal, lines may be typed while a turn runs. Without one (a pipe, a file) the next line is read when
the turn has ended, so that a script is a conversation; decisions about calls are read from it too.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal, TextIO

import trio
from attrs import field, frozen

from gateway.chat_calls import Interruption, Leave, ToolCalls
from gateway.chat_terminal import LineReader, Screen, open_interrupts
from gateway.chat_tools import FolderTools
from gateway.client import (
    ClientError,
    Connected,
    ConnectionState,
    Ended,
    MessageRefused,
    OutcomeUnknown,
    Reconnecting,
    Session,
    SessionEnded,
    SessionEvent,
    open_session,
)

EXIT_DONE = 0
EXIT_FAILED = 1
"""The gateway could not be reached, or ended the session."""
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
SECOND_INTERRUPT = 2.0
"""A second Ctrl-C within so many seconds ends the chat."""

HELP = """\
Say something to the agent, or:
  /agent NAME   another agent answers from here on (coder, architect, debug, ask, orchestrator)
  /cancel       stop the running turn (so does Ctrl-C)
  /quit         leave (so does Ctrl-D); the session stays and can be taken up again
When the agent wants to run a tool: y runs it, edit changes its arguments first, n refuses;
words after n tell the agent why."""


@frozen
class ChatOptions:
    """What ``gateway chat`` was asked for."""

    url: str
    session_id: str
    folder: Path = Path()
    """The tools read and change files below it, and nowhere else."""
    token: str | None = field(default=None, repr=False)
    token_provider: Callable[[], Awaitable[str]] | None = None
    internal_key: str | None = field(default=None, repr=False)
    encoding: Literal["json", "msgpack"] = "json"
    connect_timeout: float = 10.0
    """Seconds to try for the first connection; later ones are tried for ever."""


async def run_chat(options: ChatOptions, *, stdin: TextIO, stdout: TextIO) -> int:
    """Hold a conversation until the user leaves or the input ends; returns an exit code.

    Cancelled, it leaves the session as it is. Must own SIGINT while it runs.
    """
    has_terminal = stdin.isatty() and stdout.isatty()
    screen = Screen(stdout, os.environ, is_terminal=stdout.isatty())
    try:
        tools = FolderTools(options.folder)
    except OSError as error:
        screen.problem(f"Cannot use the folder {options.folder}: {error.strerror}.")
        return EXIT_USAGE
    link = _LinkNotes(screen)
    try:
        async with open_session(
            options.url,
            session_id=options.session_id,
            token=options.token,
            token_provider=options.token_provider,
            internal_key=options.internal_key,
            encoding=options.encoding,
            connect_timeout=options.connect_timeout,
            on_state=link.show,
        ) as session:
            chat = _Chat(session, tools, screen, LineReader(stdin), has_terminal=has_terminal)
            return await chat.run()
    except ValueError as error:
        screen.problem(str(error))
        return EXIT_USAGE
    except SessionEnded as ended:
        screen.problem(f"The session ended: {ended}.")
        return EXIT_FAILED


class _LinkNotes:
    """Tells the user about the connection when it is lost, once, and when it is back."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._is_lost = False
        self._was_connected = False

    def show(self, state: ConnectionState) -> None:
        if isinstance(state, Connected):
            if self._is_lost:
                self._screen.note("(connected again)")
            self._is_lost, self._was_connected = False, True
        elif isinstance(state, Reconnecting) and not self._is_lost:
            self._is_lost = True
            doing = "connection lost, reconnecting" if self._was_connected else "no connection yet, trying"
            self._screen.note(f"({doing}: {state.reason or state.code})")
        elif isinstance(state, Ended):
            self._is_lost = False


class _Chat:
    def __init__(
        self, session: Session, tools: FolderTools, screen: Screen, lines: LineReader, *, has_terminal: bool
    ) -> None:
        self._session = session
        self._folder = tools.folder
        self._screen = screen
        self._lines = lines
        self._has_terminal = has_terminal
        self._turns: dict[str, None] = {}
        """Turns that were accepted or have started, and have not ended."""
        self._ended_turns: set[str] = set()
        self._news = trio.lowlevel.ParkingLot()
        self._interruption = Interruption()
        self._calls = ToolCalls(
            session, tools, screen, ask=self._ask, say=self._say, interruption=self._interruption
        )
        self._last_interrupt = -SECOND_INTERRUPT
        self._exit_code: int | None = None

    async def run(self) -> int:
        """Converse; returns the exit code. Raises ``SessionEnded``."""
        self._greet()
        failure: SessionEnded | None = None
        async with open_interrupts() as interrupts, trio.open_nursery() as nursery:

            async def until_over(task: Callable[[], Awaitable[None]]) -> None:
                nonlocal failure
                try:
                    await task()
                except Leave as leave:
                    self._exit_code = leave.code
                except SessionEnded as ended:
                    failure = ended
                nursery.cancel_scope.cancel()

            async def watch_interrupts() -> None:
                async for _ in interrupts:
                    await self._interrupted(nursery)
                await trio.sleep_forever()

            nursery.start_soon(until_over, self._listen)
            nursery.start_soon(until_over, watch_interrupts)
            nursery.start_soon(until_over, self._converse)
        self._screen.end_line()
        if failure is not None:
            raise failure
        return EXIT_DONE if self._exit_code is None else self._exit_code

    def _greet(self) -> None:
        welcome = self._session.welcome
        self._screen.note(f"Session {welcome.session_id}; tools work in {self._folder}. /help helps.")
        if welcome.turn_state == "running" and welcome.turn_id is not None:
            self._turns[welcome.turn_id] = None
            self._screen.note("(an answer is being written; here is the rest of it)")
        self._calls.take_pending(welcome.pending)

    # ------------------------------------------------------------------ one thing at a time

    async def _converse(self) -> None:
        while True:
            if self._turns:
                await self._during_turn()
            elif self._calls.waiting:
                await self._calls.answer(self._calls.next())
            else:
                line = await self._ask("you> ", unless=lambda: bool(self._calls.waiting))
                if line is not None:
                    await self._obey(line.strip())

    async def _during_turn(self) -> None:
        """Wait for the turn to end; a terminal's user may type meanwhile."""

        async def read_ahead() -> None:
            while True:
                line = await self._lines.read_line()
                if line is None:
                    raise Leave(EXIT_DONE)
                await self._obey(line.strip())

        await self._until(lambda: not self._turns, meanwhile=read_ahead if self._has_terminal else None)

    async def _until(
        self, is_so: Callable[[], bool], *, meanwhile: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Do ``meanwhile`` until ``is_so``, or until it has been done."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:

            async def do() -> None:
                nonlocal failure
                assert meanwhile is not None
                try:
                    await meanwhile()
                except Exception as error:
                    failure = error
                nursery.cancel_scope.cancel()

            if meanwhile is not None:
                nursery.start_soon(do)
            while not is_so():
                await self._news.park()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _ask(self, question: str, *, unless: Callable[[], bool] = lambda: False) -> str | None:
        """The user's answer; None when ``unless`` came first or the user interrupted. Raises ``Leave``."""
        answers: list[str | None] = []

        async def read() -> None:
            answers.append(await self._lines.read_line())

        self._screen.prompt(question)
        with self._interruption.allowed():
            await self._until(unless, meanwhile=read)
        if not answers:
            self._screen.end_line()
            return None
        self._screen.echoed(answers[0], by_terminal=self._has_terminal)
        if answers[0] is None:
            raise Leave(EXIT_DONE)
        return answers[0]

    async def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line:
            return
        if command == "/quit":
            raise Leave(EXIT_DONE)
        if command == "/help":
            self._screen.note(HELP)
        elif command == "/cancel":
            await self._cancel_turn()
        elif command == "/agent":
            if argument:
                await self._say(lambda: self._session.switch_agent(argument.strip()))
            else:
                self._screen.note("/agent NAME, for example /agent coder")
        elif command.startswith("/") and not line.startswith("//"):
            self._screen.note(f"There is no command {command}; /help shows those there are.")
        else:
            # A doubled slash says a line that begins with one.
            content = line.removeprefix("/") if line.startswith("//") else line
            await self._say(lambda: self._session.send_user_message(content))

    async def _cancel_turn(self) -> None:
        try:
            if not await self._session.cancel():
                self._screen.note("(nothing to cancel)")
        except (MessageRefused, OutcomeUnknown) as error:
            self._screen.problem(str(error))

    async def _say(self, send: Callable[[], Awaitable[object]]) -> bool:
        """Send, and remember the turn that answers; False when it was not taken, which is shown."""
        try:
            accepted = await send()
        except SessionEnded:
            raise
        except ClientError as error:
            self._screen.problem(str(error))
            return False
        turn_id = getattr(accepted, "turn_id", None)
        if isinstance(turn_id, str) and turn_id not in self._ended_turns:
            self._turns[turn_id] = None
        return True

    # ------------------------------------------------------------------ what the session says

    async def _listen(self) -> None:
        async for event in self._session.events():
            self._show(event)
            self._news.unpark_all()
        raise Leave(EXIT_DONE)

    def _show(self, event: SessionEvent) -> None:
        screen = self._screen
        if event.type == "assistant_message":
            screen.write(event.token)
            if event.is_final:
                screen.end_line()
        elif event.type == "turn_started":
            self._turns[event.text("turn_id")] = None
        elif event.type == "turn_ended":
            self._end_turn(event.text("turn_id"), event.text("outcome"))
        elif event.type == "tool_call":
            self._calls.take(event.fields)
        elif event.type == "approval_resolved":
            if self._calls.waiting.pop(event.text("call_id"), None) is not None:
                screen.note(f"(decided on another device: {event.text('decision')})")
        elif event.type == "agent_switched":
            reason = event.text("reason")
            screen.note(f"-- {event.text('to_agent')} answers{': ' + reason if reason else ''}")
        elif event.type == "error":
            screen.problem(f"{event.text('content') or event.text('error')} ({event.text('code')})")
        elif event.type == "snapshot":
            self._start_over(event)
        else:
            screen.note(f"({event.type})")

    def _end_turn(self, turn_id: str, outcome: str) -> None:
        self._turns.pop(turn_id, None)
        self._ended_turns.add(turn_id)
        self._screen.end_line()
        if outcome == "cancelled":
            self._screen.note("(cancelled)")
        elif outcome not in ("completed", "failed"):
            self._screen.note(f"(the turn ended: {outcome.replace('_', ' ')})")

    def _start_over(self, snapshot: SessionEvent) -> None:
        """Some events cannot be had any more: show what is known instead."""
        self._screen.note("(a part of the conversation is not held by the gateway any more)")
        turn = snapshot.fields.get("turn")
        fields: Mapping[str, object] = turn if isinstance(turn, dict) else {}
        turn_id = fields.get("id")
        self._turns.clear()
        self._calls.waiting.clear()
        if fields.get("state") == "running" and isinstance(turn_id, str):
            self._turns[turn_id] = None
            self._screen.note("The answer so far:")
            self._screen.write(snapshot.text("text"))
        self._calls.take_pending(snapshot.fields.get("pending"))

    # ------------------------------------------------------------------ Ctrl-C

    async def _interrupted(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        if now - self._last_interrupt < SECOND_INTERRUPT:
            raise Leave(EXIT_INTERRUPTED)
        self._last_interrupt = now
        if self._turns:
            # In a task of its own: while it waits for the gateway, a second Ctrl-C must be heard.
            nursery.start_soon(self._cancel_turns)
        else:
            self._interruption.interrupt()
            self._screen.note("(Ctrl-C again to leave)")

    async def _cancel_turns(self) -> None:
        for turn_id in list(self._turns):
            try:
                await self._session.cancel(turn_id)
            except (MessageRefused, OutcomeUnknown, SessionEnded):
                continue
