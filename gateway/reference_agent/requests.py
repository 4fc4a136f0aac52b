"""What a user's sentence asks for, found by patterns: the scripted brain's only understanding."""

import re

import attrs

_PATH = r"[`'\"]?((?:[\w.-]+/)*[\w-]*\.[A-Za-z0-9]{1,8})[`'\"]?"
_PATHS = re.compile(r"(?<![\w/])" + _PATH + r"(?![\w/])")
_NUMBER = re.compile(r"\b(\d{1,6})\b")
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


@attrs.frozen
class Request:
    """One understood request. ``kind`` is the verb; the rest is what that verb needs."""

    kind: str
    paths: tuple[str, ...] = ()
    content: str = ""
    old: str = ""
    new: str = ""
    number: int = 0
    text: str = ""


def understand(text: str) -> Request:
    """Find out what ``text`` asks for; anything not understood is ``chat``."""
    plain = " ".join(text.split())
    lower = plain.lower()
    paths = tuple(dict.fromkeys(_PATHS.findall(_FENCE.sub("", text))))
    for exercise in ("count to", "slow", "think", "fail"):
        if lower == exercise or lower.startswith(exercise + " "):
            number = _NUMBER.search(lower)
            return Request(exercise.split()[0], number=int(number.group(1)) if number else 0, text=plain)
    replacement = _replacement(plain)
    if replacement is not None and paths:
        return Request("edit", paths[:1], old=replacement[0], new=replacement[1], text=plain)
    if _starts(lower, "run", "execute"):
        return Request("run", content=_command(plain), text=plain)
    if _mentions(lower, "plan", "design", "architecture", "roadmap", "specification"):
        documents = tuple(path for path in paths if path.lower().endswith(".md"))
        return Request("plan", documents[:1], text=plain)
    if _mentions(lower, "debug", "bug", "fix", "broken", "crash", "crashes", "traceback", "fails"):
        return Request("debug", paths, text=plain)
    if _mentions(lower, "explain", "summarize", "summarise", "describe") or _starts(
        lower, "what does", "why", "how"
    ):
        return Request("explain", paths, text=plain)
    if paths and _mentions(lower, "create", "write", "make", "add", "generate", "new"):
        return Request("create", paths[:1], content=_content(text, paths[0]), text=plain)
    if paths and _mentions(lower, "read", "show", "open", "cat", "view", "print"):
        return Request("read", paths, text=plain)
    if _starts(lower, "list", "ls") or "what files" in lower or "which files" in lower:
        return Request("list", (_folder(plain),), text=plain)
    return Request("chat", paths, text=plain)


ROUTES = {
    "create": ("coder", "Creating files is the coder's work.", 0.95),
    "edit": ("coder", "Changing files is the coder's work.", 0.95),
    "run": ("coder", "Running commands is the coder's work.", 0.9),
    "plan": ("architect", "Planning and design is the architect's work.", 0.9),
    "debug": ("debug", "Finding the cause of a fault is the debugger's work.", 0.85),
    "explain": ("ask", "Explaining is what the ask agent is for.", 0.85),
}
"""Who does what: agent, reason, confidence. What is not here, the agent at hand answers itself."""


def _mentions(lower: str, *words: str) -> bool:
    return any(re.search(rf"\b{re.escape(word)}\b", lower) for word in words)


def _starts(lower: str, *words: str) -> bool:
    lower = re.sub(r"^(please|can you|could you|now)[, ]+", "", lower)
    return any(lower == word or lower.startswith(word + " ") for word in words)


def _replacement(plain: str) -> tuple[str, str] | None:
    found = re.search(
        r"\b(?:replace|change)\s+(?P<old>`[^`]+`|\"[^\"]+\"|'[^']+'|.+?)\s+(?:with|by|to|into)\s+"
        r"(?P<new>`[^`]*`|\"[^\"]*\"|'[^']*'|.+?)(?:\s+in\s+\S+)?[.!]?$",
        plain,
        re.IGNORECASE,
    )
    if found is None:
        return None
    old, new = _unquote(found["old"]), _unquote(found["new"])
    return None if _PATHS.fullmatch(old) else (old, new)


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "`\"'" else text


def _command(plain: str) -> str:
    quoted = re.search(r"`([^`]+)`", plain)
    if quoted:
        return quoted.group(1)
    return re.sub(
        r"^.*?\b(?:run|execute)\s+(?:the command\s+)?", "", plain, count=1, flags=re.IGNORECASE
    ).rstrip(".!")


def _folder(plain: str) -> str:
    found = re.search(r"\b(?:in|of|under)\s+(?:the\s+)?(?:folder\s+)?[`'\"]?([\w./-]+)", plain)
    return found.group(1) if found and found.group(1).lower() not in ("here", "project", "this") else "."


def _content(text: str, path: str) -> str:
    """What a new file is to hold: a fenced block, the words after ``content``, or a small program."""
    fenced = _FENCE.search(text)
    if fenced:
        return fenced.group(1)
    given = re.search(r"\b(?:with (?:the )?content|containing)s?:?\s+(.+)$", text, re.IGNORECASE | re.DOTALL)
    if given:
        return _unquote(given.group(1).strip()) + "\n"
    said = re.search(r"\bprint(?:s|ing)?\s+(.+?)[.!]?$", " ".join(text.split()), re.IGNORECASE)
    words = _unquote(said.group(1)) if said else "hello"
    quoted = words.replace("\\", "\\\\").replace('"', '\\"')
    kind = path.rsplit(".", 1)[-1].lower()
    if kind == "py":
        return f'print("{quoted}")\n'
    if kind in ("js", "mjs", "ts"):
        return f'console.log("{quoted}");\n'
    if kind == "sh":
        return f'#!/bin/sh\necho "{quoted}"\n'
    if kind == "md":
        return f"# {words}\n"
    return words + "\n"
