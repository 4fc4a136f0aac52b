"""Node and its ``ws`` package for the tests of the browser client."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest
from attrs import frozen


@frozen
class Node:
    """How to run a script with ``ws`` at hand."""

    executable: str
    environment: dict[str, str]


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what}; in CI these tests must run")
    pytest.skip(f"{what}; install Node 20 or newer with npm to run these tests")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Node with ``ws`` in a folder of its own; skips where there is none, and fails in CI."""
    executable, npm = shutil.which("node"), shutil.which("npm")
    if executable is None or npm is None:
        _missing("There is no node or npm here")
    folder: Path = tmp_path_factory.mktemp("node")
    installed = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), "ws@8"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if installed.returncode:
        _missing("npm could not install the package ws")
    return Node(executable, {**os.environ, "WS_FOLDER": str(folder / "node_modules")})
