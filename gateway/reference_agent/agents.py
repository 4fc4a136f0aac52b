"""The five agents: what each is for, which tools it may call and which files it may write."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import attrs

READING = ("read_file", "list_files")
WRITING = ("write_file", "edit_file")


@attrs.frozen
class Tool:
    """A tool that the client runs; ``parameters`` is a JSON schema as LLM APIs take it."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@attrs.frozen
class Agent:
    """One agent. ``writable`` are file-name patterns that its writing tools are limited to."""

    name: str
    title: str
    description: str
    prompt: str
    tools: tuple[str, ...] = ()
    writable: tuple[str, ...] = ("*",)

    def why_not_allowed(self, tool_name: str, arguments: Mapping[str, Any]) -> str | None:
        """The reason why this agent may not make this call, in words an LLM can act on; None if it may."""
        if tool_name not in self.tools:
            allowed = ", ".join(self.tools) or "none"
            return f"The agent {self.name} may not call {tool_name}. Its tools: {allowed}."
        required = TOOLS[tool_name].parameters["required"]
        missing = [name for name in required if not isinstance(arguments.get(name), str)]
        if missing:
            return f"{tool_name} needs the text arguments {', '.join(missing)}."
        path = str(arguments.get("path", "."))
        if path.startswith(("/", "\\", "~")) or ":" in path or ".." in path.replace("\\", "/").split("/"):
            return f"The path {path[:200]!r} leaves the project. Use a path relative to the project folder."
        fits = any(fnmatch.fnmatchcase(path.lower(), pattern) for pattern in self.writable)
        if tool_name in WRITING and not fits:
            return f"The agent {self.name} may only write files matching {', '.join(self.writable)}."
        return None


def _schema(**properties: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": text} for name, text in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


_PATH = "Path relative to the project folder, with forward slashes"

TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("read_file", "Read a text file of the project.", _schema(path=_PATH)),
        Tool("list_files", "List the files in a folder of the project.", _schema(path=_PATH + "; . is all")),
        Tool(
            "write_file",
            "Create a file, or replace all of its content.",
            _schema(path=_PATH, content="The whole new content"),
        ),
        Tool(
            "edit_file",
            "Replace one passage of a file. The passage must occur in it exactly once.",
            _schema(path=_PATH, old="The passage as it is", new="What replaces it"),
        ),
        Tool(
            "execute_command",
            "Run a shell command in the project folder.",
            _schema(command="The command line"),
        ),
    )
}

_COMMON = (
    "You work inside an IDE that owns the user's files. You never touch files yourself: you call tools, the "
    "IDE runs them and sends you their results. Read a file before you change it. The user may reject a call "
    "or change its arguments: take that as an instruction. Be brief. "
)

AGENTS: Mapping[str, Agent] = {
    agent.name: agent
    for agent in (
        Agent(
            name="orchestrator",
            title="Orchestrator",
            description="Understands what is asked and hands it to the agent that fits.",
            prompt=_COMMON
            + "You are the orchestrator. Hand the request to the agent that fits with switch_agent: coder to "
            "write or change code or run commands, architect to design and plan, debug to find the cause of "
            "a fault, ask to explain. Answer small talk yourself.",
            tools=READING,
        ),
        Agent(
            name="coder",
            title="Coder",
            description="Writes and changes files and runs commands.",
            prompt=_COMMON
            + "You are the coder: you write and change code, in small steps, and run commands.",
            tools=(*READING, *WRITING, "execute_command"),
        ),
        Agent(
            name="architect",
            title="Architect",
            description="Plans and designs; writes Markdown documents only.",
            prompt=_COMMON
            + "You are the architect: you plan and design, and write Markdown (.md) files only.",
            tools=(*READING, *WRITING),
            writable=("*.md",),
        ),
        Agent(
            name="debug",
            title="Debug",
            description="Finds causes of faults; reads files only.",
            prompt=_COMMON + "You are the debugger: you read code and find causes. You change nothing.",
            tools=READING,
        ),
        Agent(
            name="ask",
            title="Ask",
            description="Explains code and answers questions; reads files only.",
            prompt=_COMMON + "You answer questions and explain code. You change nothing.",
            tools=READING,
        ),
    )
}

FIRST_AGENT = "orchestrator"
