"""A headless Chromium of the operating system, driven over its own chromedriver; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.end_to_end.requirements import need_program

ADVICE = "apt-get install chromium chromium-driver"
PATIENCE = 15.0
"""Seconds for what usually takes a tenth of one; the machine may be busy with other tests."""
DESKTOP = (1280, 820)
PHONE = (390, 840)


class Page:
    """One browser window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load a page."""
        self.driver.get(url)

    def resize(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Look at it on a screen of that size, light or dark."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """What stands in all elements of a CSS selector."""
        return [str(item.text) for item in self.driver.find_elements("css selector", selector)]

    def text(self, selector: str) -> str:
        """All text of an element, also what is scrolled away."""
        found = self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
        return str(found)

    def click(self, selector: str) -> None:
        """Click, when it can be clicked."""
        self.wait(lambda: self.find(selector).is_displayed() and self.find(selector).is_enabled(), selector)
        self.find(selector).click()

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        self.find(selector).send_keys(text)

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Any, what: str = "") -> None:
        """Until ``condition()`` holds."""
        message = f"it did not come about: {what}; the page shows: {self.text('body')[:2000]}"
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05, ignored_exceptions=[Exception]).until(
            lambda _: condition(), message
        )

    def wait_for_text(self, selector: str, text: str) -> None:
        """Until it stands in the element."""
        self.wait(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def problems(self) -> list[str]:
        """Warnings and errors of the console, refusals of the Content-Security-Policy among them."""
        return [
            str(entry["message"])
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def shoot(self, file: Path) -> None:
        """A screenshot as PNG."""
        self.driver.save_screenshot(str(file))


@contextmanager
def running_chromium(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile. Skips the test without Chromium; in CI it fails."""
    binary, driver_path = need_program("chromium", ADVICE), need_program("chromedriver", ADVICE)
    os.environ["SE_OFFLINE"] = "true"  # selenium must look for no driver anywhere else
    options = Options()
    options.binary_location = binary
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--no-first-run", "--disable-extensions", "--no-proxy-server", "--hide-scrollbars"),
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",),
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield Page(driver)
    except BaseException:
        raise
    finally:
        driver.quit()


def no_browser_tests() -> None:
    """For a module's imports: selenium itself may be missing."""
    pytest.importorskip("selenium")
