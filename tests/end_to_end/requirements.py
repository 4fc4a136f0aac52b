"""Programs of other people that some tests need: missing, they skip with advice; in CI they fail."""

from __future__ import annotations

import os
import shutil

import pytest


def need_program(name: str, advice: str) -> str:
    """The path of a program. Skips the test without it; with ``CI=true`` fails it, so none is missed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is not None:
        return found
    message = f"{name} is not installed: {advice}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
