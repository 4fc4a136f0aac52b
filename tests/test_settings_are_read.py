"""A setting that nothing reads is a promise that nothing keeps."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import attrs
import pytest

from gateway.settings import Settings

PACKAGE = Path(__file__).parent.parent / "gateway"
NOT_READERS = {"settings.py", "config_values.py", "config_docs.py"}
"""These define, check and describe settings."""
READ_BY_CONFIG = {"allow_anonymous_ws", "bind", "hypercorn_config"}
"""What ``config.py`` itself acts on; all else it only checks."""


def reads(tree: ast.AST) -> set[str]:
    """Names of settings that code takes from something called ``settings``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).split(".")[-1].lstrip("_") == "settings"
    }


@functools.cache
def all_reads() -> set[str]:
    """Everything that is read anywhere in the package, but where settings are made."""
    found = set(READ_BY_CONFIG)
    for path in PACKAGE.rglob("*.py"):
        if path.name not in NOT_READERS and path != PACKAGE / "config.py":
            found |= reads(ast.parse(path.read_text("utf-8")))
    return found


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Settings)])
def test_every_setting_has_a_reader(name: str) -> None:
    """Each is taken from the settings by the code that it is for."""
    assert name in all_reads()


def test_config_reads_what_it_is_said_to() -> None:
    """The exceptions are true."""
    assert reads(ast.parse((PACKAGE / "config.py").read_text("utf-8"))) >= READ_BY_CONFIG


def test_a_mention_is_no_reader() -> None:
    """A text or another object's attribute of that name does not count."""
    assert reads(ast.parse("'settings.log_level'; limits.log_level")) == set()
    assert reads(ast.parse("configuration.settings.log_level")) == {"log_level"}
