"""One gateway with its scripted agent, and one browser, for all tests of the pages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("CI") != "true":  # there the import below fails
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[test]'")

from tests.browser.chromium import DESKTOP, Page, running_chromium
from tests.end_to_end.processes import Process, started


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """``gateway demo``, which has both pages on."""
    command = [sys.executable, "-m", "gateway", "demo", "--no-chat", "--bind", "127.0.0.1:0"]
    with started(command, tmp_path_factory.mktemp("demo"), name="demo") as process:
        yield process


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser, used by one test after another."""
    profile: Path = tmp_path_factory.mktemp("profile")
    with running_chromium(profile) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A window of desktop size without anything left of the test before."""
    browser.open("about:blank")
    browser.problems()
    browser.resize(DESKTOP)
    yield browser
    browser.open("about:blank")
