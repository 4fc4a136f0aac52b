"""A brain without a network: the same history always leads to the same next step."""

import ast
import re

import trio

from gateway.reference_agent.brain import (
    Brain,
    BrainError,
    CallTool,
    Piece,
    Say,
    Step,
    SwitchTo,
    Token,
    Usage,
)
from gateway.reference_agent.history import Entry, last_request
from gateway.reference_agent.requests import ROUTES, Request, understand

MAX_COUNT = 100_000
SLOW_PAUSE = 1.0
LINES_SHOWN = 12

HELP = (
    "Hello! I am a scripted agent: I need no network and always answer the same way. Try: "
    '"create hello.py that prints hello", "read hello.py", "edit hello.py: replace hello with goodbye", '
    '"list files", "run `python hello.py`", "explain hello.py", "debug hello.py", '
    '"plan a todo app", "count to 20".'
)


class ScriptedBrain(Brain):
    """Answers by patterns, token by token with ``token_delay`` seconds before each.

    The next step is a function of the last request and of the tool results since: nothing is remembered
    here, so an answer broken off anywhere is carried on exactly.
    """

    def __init__(self, token_delay: float) -> None:
        self._token_delay = token_delay

    async def think(self, step: Step, say: Say) -> None:
        """Emit the next step. Raises `BrainError` when asked to fail. Stops at once when cancelled."""
        asked, since = last_request(step.history)
        request = Request("chat") if asked is None else understand(asked.content)
        if request.kind == "think":
            await trio.sleep(request.number)
        text, then = self._next(step, request, since)
        pause = SLOW_PAUSE if request.kind == "slow" else self._token_delay
        left = text[len(step.already_said) :]
        for piece in re.findall(r"\S+\s*|\s+", left):
            await trio.sleep(pause)
            await say(Token(piece))
        if request.kind == "fail":
            raise BrainError("SCRIPTED_FAILURE", "You asked me to fail, and I did.", retryable=True)
        for further in then:
            await say(further)
        await say(Usage(completion_tokens=len(text.split())))

    def _next(self, step: Step, request: Request, since: tuple[Entry, ...]) -> tuple[str, list[Piece]]:
        """The text of this step, and what it ends in."""
        route = ROUTES.get(request.kind)
        if route is not None and not step.pinned and not since and step.agent.name != route[0]:
            return "", [SwitchTo(*route)]
        done = [entry for entry in since if entry.role == "tool"]
        if done and done[-1].is_error:
            return self._after_failure(done[-1]), []
        match request.kind:
            case "count" | "slow":
                return "".join(f"{n} " for n in range(1, min(request.number, MAX_COUNT) + 1)), []
            case "think":
                return f"I thought about it for {request.number} s.", []
            case "fail":
                return "I will try. ", []
            case "create":
                return self._create(request, done)
            case "edit":
                return self._edit(request, done)
            case "run":
                return self._run(request, done)
            case "read" | "list":
                return self._read(request, done)
            case "explain" | "debug":
                return self._study(request, done)
            case "plan":
                return self._plan(request, done)
            case _:
                return self._chat(request), []

    def _after_failure(self, result: Entry) -> str:
        if "rejected" in result.content:
            said = result.content.partition("They said: ")[2]
            return f"All right, I leave it as it is.{f' I understood: {said}' if said else ''}"
        return f"That did not work: {_first_line(result.content)} Tell me how to go on."

    def _create(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        path = request.paths[0]
        if not done:
            call = CallTool("write_file", {"path": path, "content": request.content})
            return f"I will create {path} for you. ", [call]
        return f'Done: {path} is there. Say "read {path}" to see it.', []

    def _edit(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        path = request.paths[0]
        if not done:
            return f"Let me look at {path} first. ", [CallTool("read_file", {"path": path})]
        if len(done) == 1:
            if request.old not in done[0].content:
                return f"I read {path}, but {request.old!r} does not occur in it, so I changed nothing.", []
            text = f"I found it. I will replace {request.old!r} with {request.new!r}. "
            return text, [_replacement(path, done[0].content, request)]
        return f"Done: {path} now says {request.new!r}.", []

    def _run(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        if not done:
            return f"I will run {request.content}. ", [
                CallTool("execute_command", {"command": request.content})
            ]
        return f"It ran. Output:\n{_shorten(done[0].content)}", []

    def _read(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        tool = "read_file" if request.kind == "read" else "list_files"
        if not done:
            return "", [CallTool(tool, {"path": path}) for path in request.paths]
        if request.kind == "list":
            return f"I see {len(done[0].content.split())} files:\n{_shorten(done[0].content, 50)}", []
        shown = [
            f"{path}:\n{_shorten(entry.content)}" for path, entry in zip(request.paths, done, strict=False)
        ]
        return "\n".join(shown), []

    def _study(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        if not request.paths:
            doing = "explain" if request.kind == "explain" else "debug"
            return (
                f'Name a file, for example "{doing} hello.py", and I will read it and tell you what I see.',
                [],
            )
        if not done:
            return "I will read it first. ", [CallTool("read_file", {"path": path}) for path in request.paths]
        describe = _faults if request.kind == "debug" else _outline
        found = [describe(path, entry.content) for path, entry in zip(request.paths, done, strict=False)]
        return "\n".join(found), []

    def _plan(self, request: Request, done: list[Entry]) -> tuple[str, list[Piece]]:
        subject = re.sub(
            r"^(please\s+)?(plan|design|write|create|make)\s+(an?\s+|the\s+)?(plan|design)?(\s*(for|of))?\s*",
            "",
            request.text,
            flags=re.IGNORECASE,
        ).rstrip(".!")
        words = re.findall(r"[a-z0-9]+", subject.lower())[:5]
        path = request.paths[0] if request.paths else f"docs/plan-{'-'.join(words) or 'project'}.md"
        if not done:
            plan = (
                f"# Plan: {subject or 'the project'}\n\n1. State what it must do, in one page.\n"
                "2. Build the smallest version that can be used.\n3. Test it with its first user.\n"
                "4. Write down what was learned, then go on.\n"
            )
            return f"I will write the plan to {path}. ", [
                CallTool("write_file", {"path": path, "content": plan})
            ]
        return f"The plan is in {path}. Tell the coder to begin when you agree with it.", []

    def _chat(self, request: Request) -> str:
        lower = request.text.lower()
        if not lower or re.search(r"\b(hi|hello|hey|help|who are you|what can you)\b", lower):
            return HELP
        if "thank" in lower:
            return "You are welcome."
        return f'You said: {request.text} — I am only a script. Say "help" to see what I can do.'


def _replacement(path: str, content: str, request: Request) -> CallTool:
    """The call that replaces every occurrence: an edit of one line, or else the whole file anew."""
    lines = [line for line in content.splitlines() if request.old in line]
    if len(lines) == 1:
        new = lines[0].replace(request.old, request.new)
        return CallTool("edit_file", {"path": path, "old": lines[0], "new": new})
    return CallTool("write_file", {"path": path, "content": content.replace(request.old, request.new)})


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no reason was given."
    return line if line.endswith((".", "!", "?")) else line + "."


def _shorten(text: str, lines: int = LINES_SHOWN) -> str:
    every = text.splitlines()
    more = f"\n… and {len(every) - lines} more lines" if len(every) > lines else ""
    return "\n".join(every[:lines]) + more


def _outline(path: str, content: str) -> str:
    lines = content.splitlines()
    names = re.findall(r"^\s*(?:async\s+)?(?:def|class|function)\s+(\w+)", content, re.MULTILINE)
    defines = f" It defines {', '.join(names[:8])}." if names else ""
    printed = " It prints something." if re.search(r"\b(print|console\.log|echo)\b", content) else ""
    return f"{path} has {len(lines)} lines.{defines}{printed} It begins: {_first_line(content)}"


def _faults(path: str, content: str) -> str:
    if path.endswith(".py"):
        try:
            ast.parse(content)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            where = f" in line {exc.lineno}" if isinstance(exc, SyntaxError) and exc.lineno else ""
            return f"{path} does not parse: {getattr(exc, 'msg', None) or exc}{where}."
    found = [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(content.splitlines(), 1)
        if re.search(r"\bexcept\s*:|\bFIXME\b|\bXXX\b", line)
    ]
    if found:
        return f"In {path} I would look at {'; '.join(found[:5])}."
    return f"{path} has {len(content.splitlines())} lines and I see nothing wrong in it."
