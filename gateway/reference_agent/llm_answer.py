"""Puts a streamed chat completion together: text at once, tool calls from their fragments.

Source: OpenAI API reference, "The chat completion chunk object". Servers differ in details; each leniency
below says for whom it is.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import orjson

from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.brain import BrainError, CallTool, SwitchTo, Usage
from gateway.reference_agent.llm_messages import SWITCH_TOOL


@attrs.define
class _Fragment:
    """A tool call as far as it has come."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""


class LlmAnswer:
    """One answer of the LLM, fed chunk by chunk. Pure."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage = Usage(requests=0)
        self._calls: list[_Fragment] = []
        self._by_index: dict[int, _Fragment] = {}

    def feed(self, chunk: Mapping[str, Any]) -> str:
        """Take one chunk (or a whole completion); the text it adds.

        Raises `BrainError` when it reports an error or is not what the API describes.
        """
        if chunk.get("error"):
            raise BrainError("LLM_ERROR", "The LLM reported an error within its answer.", retryable=True)
        try:
            return self._feed(chunk)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as exc:
            raise BrainError("LLM_PROTOCOL_ERROR", "The LLM's answer is malformed.", retryable=False) from exc

    def _feed(self, chunk: Mapping[str, Any]) -> str:
        usage = chunk.get("usage")
        if usage:
            self.usage = Usage(
                int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), requests=0
            )
        choices = chunk.get("choices") or []
        if not choices:
            return ""
        choice = choices[0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        # `message` is in the answers of servers that do not stream although they were asked to.
        delta = choice.get("delta") or choice.get("message") or {}
        for position, fragment in enumerate(delta.get("tool_calls") or []):
            self._add_fragment(fragment, position)
        text = delta.get("content") or ""
        return text if isinstance(text, str) else ""

    def _add_fragment(self, fragment: Mapping[str, Any], position: int) -> None:
        index = fragment.get("index")
        index = position if index is None else int(index)
        call_id = fragment.get("id") or ""
        call = self._by_index.get(index)
        # A new id under an old index is a new call: some gateways number every call 0.
        if call is None or (call_id and call.call_id and call_id != call.call_id):
            call = self._by_index[index] = _Fragment()
            self._calls.append(call)
        function = fragment.get("function") or {}
        # Id and name come once; some servers repeat them in every fragment.
        call.call_id = call.call_id or call_id
        call.name = call.name or (function.get("name") or "")
        arguments = function.get("arguments") or ""
        # Ollama's older versions send an object instead of its JSON.
        call.arguments += arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()

    def outcome(self, current_agent: str) -> tuple[list[CallTool], SwitchTo | None]:
        """What the whole answer ends in. Raises `BrainError` when it was cut short."""
        match self.finish_reason:
            case "length":
                raise BrainError("LLM_LENGTH", "The answer hit the model's length limit.", retryable=False)
            case "content_filter":
                raise BrainError(
                    "LLM_CONTENT_FILTER", "The LLM's content filter ended the answer.", retryable=False
                )
        calls: list[CallTool] = []
        for fragment in self._calls:
            call = _finished(fragment)
            if call.tool_name == SWITCH_TOOL and call.problem is None:
                wanted = str(call.arguments.get("agent", ""))
                if wanted in AGENTS and wanted != current_agent:
                    return [], _switch(wanted, call.arguments)
                call = attrs.evolve(
                    call, problem=f"There is no other agent {wanted[:64]!r}: use {', '.join(AGENTS)}."
                )
            calls.append(call)
        return calls, None


def _finished(fragment: _Fragment) -> CallTool:
    try:
        arguments = orjson.loads(fragment.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    problem = None if isinstance(arguments, dict) else "The arguments are not a JSON object."
    return CallTool(
        fragment.name or "(unnamed)",
        arguments if isinstance(arguments, dict) else {},
        fragment.call_id or None,
        problem,
    )


def _switch(agent: str, arguments: Mapping[str, Any]) -> SwitchTo:
    confidence = arguments.get("confidence")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        confidence = None
    reason = arguments.get("reason")
    return SwitchTo(
        agent,
        reason if isinstance(reason, str) and reason else f"This is work for the agent {agent}.",
        None if confidence is None else min(1.0, max(0.0, float(confidence))),
    )
