"""The dashboard as an operator uses it, with a conversation going on beside it."""

from __future__ import annotations

import json

import pytest

from tests.browser.chromium import DESKTOP, PHONE, Page
from tests.browser.test_playground import KEY, open_playground, say
from tests.end_to_end.processes import Process


def unlock(page: Page, demo: Process) -> None:
    """Open it with the key of the demo."""
    page.open(f"{demo.url}/dashboard")
    page.type("#secret", KEY + "\n")
    page.wait_for_text("#status-text", "Live")


def test_opens_with_the_key_alone(page: Page, demo: Process) -> None:
    """A wrong key is refused and says so; the right one is in memory alone, and can be given back."""
    page.open(f"{demo.url}/dashboard")
    page.type("#secret", "wrong\n")
    page.wait_for_text("#login-problem", "X-Internal-Auth does not hold the internal key")
    assert not page.find("#live").is_displayed()
    assert all("401" in problem for problem in page.problems())

    page.type("#secret", KEY + "\n")
    page.wait_for_text("#status-text", "Live")
    kept = page.run("return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert KEY not in str(kept) + str(page.driver.page_source)
    assert page.find("#secret").get_property("value") == ""
    page.click("#lock")
    assert not page.find("#live").is_displayed()
    page.driver.refresh()
    assert page.find("#login").is_displayed()
    assert page.problems() == []


def test_shows_sessions_live_and_closes_one(page: Page, demo: Process) -> None:
    """A session appears with its state and timeline, is found by its id, and ends when it is closed."""
    session = open_playground(page, demo, "watched-session")
    say(page, "count to 30")
    page.wait_for_text(".answer", " 30 ")
    say(page, "create secret-name.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        unlock(page, demo)
        row = f'tr[data-session="{session}"]'
        page.wait_for_text(row, "asks")
        assert "coder" in page.text(row)
        page.type("#filter", "no such session")
        page.wait_for_text("#no-sessions", "No live session has no such session in its id.")
        page.find("#filter").clear()
        page.type("#filter", "WATCHED")
        page.wait(lambda: page.texts("tbody th") == [session])

        page.click(f"{row} button")
        page.wait_for_text("#timeline", "tool called")
        for event in ("socket opened", "turn started", "agent switched", "turn ended"):
            assert event in page.text("#timeline")
        assert "secret-name" not in page.text("body")
        page.click("#session-close")
        page.wait_for_text("#session-close", "Really")
        page.click("#session-close")
        page.wait_for_text("#timeline", "session closed by operator")
        page.wait_for_text("#troubles", "session closed by operator")
        assert page.problems() == []
        page.driver.close()
    finally:
        page.driver.switch_to.window(first)
    page.wait_for_text("#status-text", "closed by an operator")


def test_draws_what_passes_through(page: Page, demo: Process) -> None:
    """Figures agree with the metrics, and curves are drawn."""
    open_playground(page, demo)
    say(page, "count to 100")
    page.wait_for_text(".answer", " 100 ")
    unlock(page, demo)
    page.wait(lambda: len(page.texts("#throughput path")) == 2)
    page.wait(lambda: "M" in str(page.find("#throughput path.s0").get_attribute("d")))

    metrics = page.driver.execute_async_script(
        "const done = arguments[1]; fetch('metrics', {headers: {'X-Internal-Auth': arguments[0]}})"
        ".then((answer) => answer.text()).then(done)",
        KEY,
    )
    line = next(line for line in str(metrics).splitlines() if line.startswith("gateway_tokens_total "))
    page.wait_for_text("#tiles .tile:nth-child(3) small", f"{int(float(line.split()[1]))} in all")
    # Latencies are read on a logarithmic scale: microseconds and hiccups of a hundred milliseconds at once.
    decades = ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s"]
    axis = page.run("return [...document.querySelectorAll('#latency .axis')].map((item) => item.textContent)")
    shown = [decades.index(label) for label in axis if label in decades]
    assert shown == list(range(shown[0], shown[0] + len(shown)))
    assert len(shown) > 1
    assert page.problems() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 568)], ids=["desktop", "phone", "small phone"])
def test_fits_the_screen(page: Page, demo: Process, size: tuple[int, int]) -> None:
    """Nothing sticks out sideways, in front of the lock and behind it."""
    page.resize(size)
    page.open(f"{demo.url}/dashboard")
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    unlock(page, demo)
    assert page.run("return document.documentElement.scrollWidth") <= size[0]


def test_its_policy_is_in_force(page: Page, demo: Process) -> None:
    """The key would be worth stealing: nothing foreign is loaded and nothing is sent elsewhere."""
    unlock(page, demo)
    outcome = page.driver.execute_async_script(
        """
        const done = arguments[0];
        const refused = [];
        const note = (event) => refused.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", note);
        const form = document.createElement("form");
        form.action = "https://example.org/";
        document.body.append(form);
        form.submit();
        fetch("https://example.org/").catch(() => {}).finally(
          () => setTimeout(() => done(JSON.stringify(refused)), 200));
        """
    )

    assert {"connect-src", "form-action"} <= set(json.loads(str(outcome)))
