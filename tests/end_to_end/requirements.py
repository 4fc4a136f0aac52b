"""Programs of other people that some tests need: missing, they skip with advice; in CI they fail."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def missing(message: str) -> NoReturn:
    """Skip the test for want of something; with ``CI=true`` fail it, so none is missed."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def need_program(name: str, advice: str) -> str:
    """The path of a program. Skips the test without it; with ``CI=true`` fails it, so none is missed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is not None:
        return found
    missing(f"{name} is not installed: {advice}")
