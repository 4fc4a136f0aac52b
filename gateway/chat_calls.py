"""Tool calls in ``gateway chat``: shown, decided by the user, run in the folder, answered."""

from __future__ import annotations

import json
import shlex
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import trio
from attrs import define, field

from gateway.chat_terminal import Screen
from gateway.chat_tools import FolderTools, ToolFailed
from gateway.client import MessageTooLarge, Session

SHOWN_ARGUMENT = 400
_ALWAYS_ASK = frozenset({"execute_command"})
"""Tools that are not run without a word of this user's, even where the agent's policy would."""


class Leave(Exception):
    """The chat is over."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Interruption:
    """What the user may interrupt with Ctrl-C at the moment: a question, a tool."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """The block ends when the user interrupts."""
        with trio.CancelScope() as self._scope:
            yield

    def interrupt(self) -> None:
        """End the block that runs, if one does."""
        self._scope.cancel()


class Ask(Protocol):
    """Asks the user."""

    async def __call__(self, question: str, *, unless: Callable[[], bool] = ...) -> str | None:
        """The answer; None when ``unless`` came first or the user interrupted. Raises ``Leave``."""
        ...


@define
class Call:
    """A tool call that waits for us."""

    call_id: str
    tool_name: str
    arguments: dict[str, object] = field(repr=False)
    requires_approval: bool
    decision: str | None
    """Set when it was decided before we came, here or elsewhere."""

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Call | None:
        """Read a ``tool_call``; None for one that nobody could answer."""
        call_id, name, arguments = fields.get("call_id"), fields.get("tool_name"), fields.get("arguments")
        if not isinstance(call_id, str) or not isinstance(name, str):
            return None
        decision = fields.get("decision")
        return cls(
            call_id,
            name,
            dict(arguments) if isinstance(arguments, dict) else {},
            fields.get("requires_approval") is True,
            decision if isinstance(decision, str) else None,
        )


class ToolCalls:
    """The calls that wait for this user, and what becomes of them."""

    def __init__(
        self,
        session: Session,
        tools: FolderTools,
        screen: Screen,
        *,
        ask: Ask,
        say: Callable[[Callable[[], Awaitable[object]]], Awaitable[bool]],
        interruption: Interruption,
    ) -> None:
        self.waiting: dict[str, Call] = {}
        self._handled: set[str] = set()
        self._session = session
        self._tools = tools
        self._screen = screen
        self._ask = ask
        self._say = say
        self._interruption = interruption

    def take_pending(self, pending: object) -> None:
        """Take up the calls that a ``welcome`` or ``snapshot`` says are open."""
        for fields in pending if isinstance(pending, list) else []:
            self.take(fields)

    def take(self, fields: Mapping[str, object]) -> None:
        """Take up a ``tool_call``, unless it was handled here before."""
        call = Call.of(fields)
        if call is not None and call.call_id not in self._handled:
            self.waiting[call.call_id] = call

    def next(self) -> Call:
        """The call that has waited longest; it counts as handled from now on."""
        call = self.waiting.pop(next(iter(self.waiting)))
        self._handled.add(call.call_id)
        return call

    async def answer(self, call: Call) -> None:
        """Have it decided, run it if it may be, send what came of it. Raises ``Leave``."""
        session, call_id = self._session, call.call_id
        if not call.requires_approval:
            await self._run_call(call)
            return
        verdict, feedback = await self._decide(call)
        if verdict is None:
            return
        if verdict == "edit":
            decided = await self._say(
                lambda: session.decide(call_id, "edit", modified_arguments=call.arguments)
            )
        elif verdict == "approve":
            decided = await self._say(lambda: session.decide(call_id, "approve"))
        else:
            await self._say(lambda: session.decide(call_id, "reject", feedback=feedback or None))
            return
        if decided:
            await self._run_tool(call)

    async def _run_call(self, call: Call) -> None:
        """Run a call that the agent's policy, or a decision before we came, lets run."""
        if call.decision == "edit":
            # The edited arguments are known to the device that edited them, and to nobody else.
            self._screen.note(f"({call.tool_name} was edited on another device, which runs it)")
            return
        if call.decision is not None or call.tool_name in _ALWAYS_ASK:
            self._show_call(call)
            if call.decision is not None:
                self._screen.note("(approved earlier, and without a result: run it here?)")
            answer = await self._ask("run it? [y/n] ")
            if answer is None or answer.strip().lower() not in ("y", "yes"):
                await self._send_result(call, error="The user of this device declined to run it.")
                return
        else:
            self._screen.note(f"[{_summary(call)}]")
        await self._run_tool(call)

    async def _decide(self, call: Call) -> tuple[Literal["approve", "edit", "reject"] | None, str]:
        """Ask the user; None when another device has decided meanwhile."""
        self._show_call(call)
        self.waiting[call.call_id] = call
        try:
            while call.call_id in self.waiting:
                answer = await self._ask(
                    "run it? [y/edit/n] ", unless=lambda: call.call_id not in self.waiting
                )
                if answer is None:
                    if call.call_id in self.waiting:
                        return "reject", "The user interrupted."
                    break
                word, _, rest = answer.strip().partition(" ")
                if word.lower() in ("y", "yes"):
                    return "approve", ""
                if word.lower() in ("n", "no"):
                    return "reject", rest.strip()
                if word.lower() in ("e", "edit") and await self._edit(call, rest.strip()):
                    return "edit", ""
        except Leave:
            # The input is over: nobody will decide here, but somebody may elsewhere or later.
            self._screen.note(f"({call.tool_name} still waits for a decision)")
            raise
        finally:
            self.waiting.pop(call.call_id, None)
        return None, ""

    async def _edit(self, call: Call, given: str) -> bool:
        """Take new arguments as one line of JSON, behind ``edit`` or asked for; False when there are none."""
        if not given:
            self._screen.line(json.dumps(call.arguments, ensure_ascii=False))
            given = (await self._ask("new arguments as JSON, empty to go back: ") or "").strip()
        if not given:
            return False
        try:
            arguments = json.loads(given)
        except (ValueError, RecursionError) as error:
            self._screen.problem(f"That is not JSON: {error}.")
            return False
        if not isinstance(arguments, dict):
            self._screen.problem('Arguments are a JSON object, as in {"path": "hello.py"}.')
            return False
        call.arguments = arguments
        return True

    async def _run_tool(self, call: Call) -> None:
        result: str | None = None
        error = "The user interrupted."
        with self._interruption.allowed():
            try:
                result = await self._tools.run(call.tool_name, call.arguments)
            except ToolFailed as failed:
                error = str(failed)
        if result is None:
            self._screen.note(f"({call.tool_name}: {error.splitlines()[0]})")
            await self._send_result(call, error=error)
        else:
            await self._send_result(call, result=result)

    async def _send_result(self, call: Call, *, result: object = None, error: str | None = None) -> None:
        async def send() -> object:
            try:
                return await self._session.tool_result(
                    call.call_id, result=result, error=error, tool_name=call.tool_name
                )
            except MessageTooLarge as large:
                return await self._session.tool_result(
                    call.call_id, error=f"The result is too large to send: {large}", tool_name=call.tool_name
                )

        await self._say(send)

    def _show_call(self, call: Call) -> None:
        self._screen.strong(f"The agent wants to run {call.tool_name}:")
        for name, value in call.arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown = (
                text if len(text) <= SHOWN_ARGUMENT else f"{text[:SHOWN_ARGUMENT]}… ({len(text)} characters)"
            )
            if "\n" in shown:
                shown = "\n" + "\n".join(f"    {line}" for line in shown.splitlines())
            self._screen.line(f"  {name}: {shown}")


def _summary(call: Call) -> str:
    shown = [value for value in call.arguments.values() if isinstance(value, str) and "\n" not in value]
    return " ".join([call.tool_name, *(shlex.quote(value[:80]) for value in shown[:2])])
