"""Where settings come from besides the environment: a ``.env`` file, secret files, ``hypercorn.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LINE = re.compile(r"\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)\Z")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$"}
_MAX_FILE_BYTES = 1024 * 1024


class UnreadableFile(Exception):
    """A file that settings name cannot be used; the message says why and quotes none of its content."""


def read_text(path: Path) -> str:
    """The content of a small UTF-8 file. Raises ``UnreadableFile``."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or type(error).__name__}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise UnreadableFile(f"{path}: is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableFile(f"{path}: is not UTF-8 text") from None


def read_secret(path: Path) -> str:
    """The content of a secret file without the line end that editors and ``echo`` add.

    Raises ``UnreadableFile``.
    """
    return read_text(path).rstrip("\r\n")


def parse_dotenv(content: str) -> tuple[dict[str, str], list[str]]:
    """The values of a ``.env`` file, and a sentence for each line that is not understood.

    ``NAME=value``, with or without ``export``; a value may stand in single quotes (taken as it is) or double
    quotes (with the escapes ``\\n \\r \\t \\" \\\\ \\$``); a ``#`` at the start of a line, or after white
    space outside quotes, begins a comment. Nothing is interpolated: ``$`` stands for itself, and ``${``,
    which other readers of the same file would replace, is refused outside single quotes.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if not match:
            problems.append(f"line {number}: must be NAME=value")
            continue
        try:
            value = _unquote(match["value"])
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if match["name"] in values:
            problems.append(f"line {number}: {match['name']} is set twice")
        values[match["name"]] = value
    return values, problems


def _unquote(raw: str) -> str:
    if raw.startswith("'"):
        match = re.fullmatch(r"'([^']*)'\s*(?:#.*)?", raw)
        if not match:
            raise ValueError("the closing ' is missing, or something follows it")
        return match[1]
    if raw.startswith('"'):
        match = re.fullmatch(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?', raw)
        if not match:
            raise ValueError('the closing " is missing, or something follows it')
        _refuse_interpolation(match[1])
        return re.sub(r"\\(.)", _unescape, match[1])
    value = re.sub(r"(?:^|\s)#.*", "", raw).strip()
    _refuse_interpolation(value)
    return value


def _unescape(match: re.Match[str]) -> str:
    if match[1] not in _ESCAPES:
        raise ValueError("an unknown escape; use single quotes for backslashes")
    return _ESCAPES[match[1]]


def _refuse_interpolation(value: str) -> None:
    if re.search(r"(?<!\\)\$\{", value):
        raise ValueError("${…} is not replaced here; use single quotes if it is meant literally")


def read_toml(path: Path) -> Mapping[str, Any]:
    """A TOML file such as ``hypercorn.toml``. Raises ``UnreadableFile``."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UnreadableFile(f"{path}: is not TOML: {error}") from None
