"""The approval policy: which tool calls run at once, which the user decides on, which are never made."""

import fnmatch
import posixpath
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

ALLOW, ASK, DENY = "allow", "ask", "deny"
ACTIONS = (ALLOW, ASK, DENY)

_RULE_KEYS = {"action", "tools", "paths", "commands", "pattern", "reason"}
_CHAINING = re.compile(r"[;&|<>`$()\n\r]")
"""What lets one command line do more than its beginning says."""


@attrs.frozen
class Verdict:
    """What the policy says of one call, and why."""

    action: str
    reason: str


@attrs.frozen
class Rule:
    """One rule; it fits when everything that it names fits."""

    action: str
    tools: tuple[str, ...] = ()
    paths: tuple[re.Pattern[str], ...] = ()
    commands: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    reason: str | None = None

    def fits(self, tool_name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether this rule speaks of this call."""
        if self.tools and not any(fnmatch.fnmatchcase(tool_name, tool) for tool in self.tools):
            return False
        if self.paths and not self._fits_path(arguments.get("path")):
            return False
        if self.commands and not self._fits_command(arguments.get("command")):
            return False
        if self.pattern is None:
            return True
        return any(self.pattern.search(text) for text in _texts(arguments))

    def _fits_path(self, path: object) -> bool:
        if not isinstance(path, str):
            return False
        clean = posixpath.normpath(path.replace("\\", "/")).removeprefix("./")
        outside = clean.startswith(("/", "../")) or clean == ".." or ":" in clean
        if outside and self.action == ALLOW:
            return False
        return any(pattern.fullmatch(clean) for pattern in self.paths)

    def _fits_command(self, command: object) -> bool:
        if not isinstance(command, str):
            return False
        if self.action == ALLOW and _CHAINING.search(command):
            return False
        line = " ".join(command.split())
        return any(fnmatch.fnmatchcase(line, pattern) for pattern in self.commands)


@attrs.frozen
class ApprovalPolicy:
    """Rules in order; the first that fits decides."""

    rules: tuple[Rule, ...]
    default: str = ASK

    def decide(self, tool_name: str, arguments: Mapping[str, Any]) -> Verdict:
        """What is to become of this call."""
        for rule in self.rules:
            if rule.fits(tool_name, arguments):
                return Verdict(rule.action, rule.reason or f"The policy says {rule.action} for {tool_name}.")
        return Verdict(self.default, f"No rule of the policy speaks of {tool_name}.")

    def why_denied(self, tool_name: str, arguments: Mapping[str, Any]) -> str | None:
        """The reason why this call must not be made, or None."""
        verdict = self.decide(tool_name, arguments)
        return verdict.reason if verdict.action == DENY else None


def load_policy(path: str | None) -> ApprovalPolicy:
    """Read a policy; None reads the one that comes with the package.

    Raises `ValueError` with all that is wrong in the file, or that it cannot be read. Blocks for one file.
    """
    try:
        if path is None:
            text = files(__package__).joinpath("default_approvals.toml").read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
        plain = tomllib.loads(text)
    except OSError as exc:
        raise ValueError(f"approvals: {path} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ValueError(f"approvals: {path} is not valid TOML: {exc}.") from exc
    return parse_policy(plain)


def parse_policy(plain: Mapping[str, Any]) -> ApprovalPolicy:
    """Build a policy from parsed TOML. Raises `ValueError` naming every mistake."""
    problems = [f"unknown key {name!r}" for name in plain.keys() - {"default", "rule"}]
    default = plain.get("default", ASK)
    if default not in ACTIONS:
        problems.append(f"`default` must be one of {', '.join(ACTIONS)}")
    given = plain.get("rule", [])
    rules: list[Rule] = []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        problems.append("rules must be written as [[rule]]")
        given = []
    for number, one in enumerate(given, 1):
        try:
            rules.append(_parse_rule(one))
        except ValueError as exc:
            problems.append(f"rule {number}: {exc}")
    if problems:
        raise ValueError(f"approvals: {'; '.join(problems)}.")
    return ApprovalPolicy(tuple(rules), default)


def _parse_rule(plain: Mapping[str, Any]) -> Rule:
    unknown = sorted(plain.keys() - _RULE_KEYS)
    if unknown:
        raise ValueError(f"unknown key {', '.join(map(repr, unknown))}")
    if plain.get("action") not in ACTIONS:
        raise ValueError(f"`action` must be one of {', '.join(ACTIONS)}")
    for name in ("tools", "paths", "commands"):
        value = plain.get(name, ["x"])
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise ValueError(f"`{name}` must be a list of texts that is not empty")
    for name in ("pattern", "reason"):
        if not isinstance(plain.get(name, ""), str):
            raise ValueError(f"`{name}` must be a text")
    try:
        pattern = re.compile(plain["pattern"]) if "pattern" in plain else None
    except re.error as exc:
        raise ValueError(f"`pattern` is not a regular expression: {exc}") from exc
    return Rule(
        action=plain["action"],
        tools=tuple(plain.get("tools", ())),
        paths=tuple(_path_pattern(one) for one in plain.get("paths", ())),
        commands=tuple(plain.get("commands", ())),
        pattern=pattern,
        reason=plain.get("reason"),
    )


def _path_pattern(text: str) -> re.Pattern[str]:
    """A path pattern as a regular expression: ``**/`` is any folders or none, ``*`` stays in one folder."""
    pieces = {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in parts), re.IGNORECASE)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]
