"""Decides which tool calls need the user's approval."""

from collections.abc import Mapping
from typing import Any

import attrs

from gateway.reference_agent.agents import READING


@attrs.frozen
class ApprovalPolicy:
    """Reading is free; whatever changes something, or is unknown, needs approval."""

    free_tools: tuple[str, ...] = READING

    def why_approval(self, tool_name: str, arguments: Mapping[str, Any]) -> str | None:
        """The reason why this call needs approval, or None when it may run at once."""
        if tool_name in self.free_tools:
            return None
        return f"{tool_name} changes {arguments.get('path') or 'something'}."
