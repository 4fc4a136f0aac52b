"""A step in the words of the OpenAI chat completions API.

Source: OpenAI API reference, "Create chat completion" (messages, tools).
"""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.reference_agent.agents import AGENTS, TOOLS, Agent
from gateway.reference_agent.brain import Step
from gateway.reference_agent.history import Entry
from gateway.reference_agent.window import window

SWITCH_TOOL = "switch_agent"

CONTINUE = "Your answer was cut off in transit. Continue exactly where it stops; repeat nothing."
HANDED_OVER = "(The conversation was handed to you. Go on with my last request.)"


def request_body(step: Step, model: str, history_tokens: int) -> dict[str, Any]:
    """The body of the request that asks for this step, as a stream with usage."""
    return {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": _messages(step, window(step.history, history_tokens)),
        "tools": _tools(step.agent, pinned=step.pinned),
    }


def _messages(step: Step, history: tuple[Entry, ...]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": step.agent.prompt}]
    results = {entry.call_id: entry for entry in history if entry.role == "tool"}
    for entry in history:
        if entry.role != "tool":
            messages.append(_message(entry))
        # The API wants every result right behind the calls, whatever came in between.
        messages.extend(
            {
                "role": "tool",
                "tool_call_id": call.call_id,
                "content": results[call.call_id].content if call.call_id in results else "No result.",
            }
            for call in entry.tool_calls
        )
    if step.already_said:
        messages.append({"role": "assistant", "content": step.already_said})
        messages.append({"role": "user", "content": CONTINUE})
    elif messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": HANDED_OVER})
    return messages


def _message(entry: Entry) -> dict[str, Any]:
    message: dict[str, Any] = {"role": entry.role, "content": entry.content}
    if entry.tool_calls:
        message["content"] = entry.content or None
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.tool_name, "arguments": orjson.dumps(call.arguments).decode()},
            }
            for call in entry.tool_calls
        ]
    return message


def _tools(agent: Agent, *, pinned: bool) -> list[dict[str, Any]]:
    functions: list[Mapping[str, Any]] = [
        {
            "name": TOOLS[name].name,
            "description": TOOLS[name].description,
            "parameters": TOOLS[name].parameters,
        }
        for name in agent.tools
    ]
    if not pinned:
        functions.append(_switch_function(agent))
    return [{"type": "function", "function": function} for function in functions]


def _switch_function(agent: Agent) -> dict[str, Any]:
    others = [other for other in AGENTS.values() if other.name != agent.name]
    who = " ".join(f"{other.name}: {other.description}" for other in others)
    return {
        "name": SWITCH_TOOL,
        "description": f"Hand the conversation to the agent that fits the request better. {who}",
        "parameters": {
            "type": "object",
            "properties": {
                "agent": {"type": "string", "enum": [other.name for other in others]},
                "reason": {"type": "string", "description": "One sentence for the user"},
                "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            },
            "required": ["agent", "reason"],
        },
    }
