"""The playground as somebody who sees it for the first time uses it."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from tests.browser.chromium import DESKTOP, PHONE, Page
from tests.end_to_end.processes import Process
from tests.test_docs_site import snippet

KEY = "change-me-internal-key"
_numbers = itertools.count(1)


def open_playground(page: Page, demo: Process, session: str = "") -> str:
    """Open a session of its own; returns its id."""
    session = session or f"browser-{next(_numbers)}"
    page.open("about:blank")
    page.open(f"{demo.url}/playground#{session}")
    page.wait_for_text("#status-text", f"Connected · {session}")
    return session


def say(page: Page, text: str) -> None:
    """Type a message and press Enter."""
    page.type("#message", text + "\n")


def sums(page: Page) -> dict[str, int]:
    """What the page counted on the raw frames."""
    names = ("events", "missing", "twice", "resumes")
    return {name: int(page.text(f"#sum-{name}")) for name in names}


def test_approves_a_tool_call(page: Page, demo: Process) -> None:
    """The answer streams, another agent takes over, asks, writes the file once approved, and goes on."""
    open_playground(page, demo)
    say(page, "create hello.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")

    assert page.find("#agent").get_property("value") == "coder"
    assert page.text(".card pre") == 'print("hello")\n'
    page.click(".card .primary")
    page.wait_for_text("#transcript", "Done: hello.py is there.")

    assert page.text(".card .state") == "done"
    assert page.find("#side-badge").text == "1"
    page.click("#side-folder")
    assert page.find("#file").text == 'print("hello")'
    assert sums(page)["missing"] == sums(page)["twice"] == 0
    assert page.problems() == []


def test_edits_what_the_agent_wants_to_write(page: Page, demo: Process) -> None:
    """The person's arguments are the ones that are run."""
    open_playground(page, demo)
    say(page, "create hello.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")
    page.click(".actions button:nth-child(2)")
    page.run("document.querySelectorAll('.field textarea')[1].value = 'print(\"mine\")\\n'")
    page.click(".card .primary")
    page.wait_for_text("#transcript", "Done: hello.py is there.")

    page.click("#side-folder")
    assert page.find("#file").text == 'print("mine")'
    assert page.problems() == []


def test_rejects_with_a_reason_by_keyboard_alone(page: Page, demo: Process) -> None:
    """Everything can be reached and pressed without a mouse; the agent is told why."""
    open_playground(page, demo)
    say(page, "create hello.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")
    page.run("document.querySelector('.card .danger').focus()")
    page.driver.switch_to.active_element.send_keys("\n")
    page.driver.switch_to.active_element.send_keys("not in this folder\n")
    page.wait_for_text("#transcript", "I understood: not in this folder")

    assert page.text(".card .state") == "rejected"
    page.click("#side-folder")
    assert "hello.py" not in page.text("#files")
    assert page.problems() == []


def test_pulls_the_plug_and_resumes(page: Page, demo: Process) -> None:
    """The agent writes on meanwhile; what was missed comes once, in order, and is shown for what it is."""
    open_playground(page, demo)
    say(page, "count to 200")
    page.wait_for_text(".answer", " 30 ")
    page.click("#plug")
    page.wait_for_text("#status-text", "Unplugged")
    before = sums(page)["events"]
    page.driver.execute_async_script("setTimeout(arguments[0], 1500)")
    assert sums(page)["events"] == before
    page.click("#put-back")
    page.wait_for_text(".answer", " 200 ")
    page.wait_for_text("#transcript .resumed", "resumed after")

    text = re.sub(r"resumed after.*caught up", " ", page.text(".answer p"))
    assert [int(number) for number in text.split()] == list(range(1, 201))
    assert int(page.text(".answer mark").split()[0]) > 30
    counted = sums(page)
    assert counted["missing"] == counted["twice"] == 0
    assert counted["resumes"] == 1
    assert page.problems() == []


def test_what_is_sent_while_unplugged_arrives_later(page: Page, demo: Process) -> None:
    """A message waits for the connection, and is carried out once."""
    open_playground(page, demo)
    page.click("#plug")
    say(page, "count to 5")
    page.click("#put-back")
    page.wait_for_text("#transcript", "1 2 3 4 5 ")

    assert len(page.texts(".answer")) == 1
    assert page.problems() == []


def test_switches_the_agent_and_stops(page: Page, demo: Process) -> None:
    """The person chooses who answers, and can stop it."""
    open_playground(page, demo)
    page.find("#agent").send_keys("architect")
    page.wait_for_text(".switched", "architect")
    say(page, "slow 50")
    page.wait_for_text(".answer", "1 ")
    page.click("#stop")
    page.wait_for_text("#transcript", "Stopped.")
    page.wait(lambda: not page.find("#stop").is_displayed())

    assert page.problems() == []


def test_two_windows_share_a_session(page: Page, demo: Process) -> None:
    """What one decides, the other sees decided."""
    session = open_playground(page, demo)
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        open_playground(page, demo, session)
        say(page, "create hello.py that prints hello")
        page.wait_for_text(".card .state", "waits for you")
        second = page.driver.current_window_handle
        page.driver.switch_to.window(first)
        page.wait_for_text(".card .state", "waits for you")
        page.driver.switch_to.window(second)
        page.click(".card .primary")
        page.wait_for_text("#transcript", "Done: hello.py is there.")
        page.driver.switch_to.window(first)
        page.wait_for_text(".card .state", "approve in another window")
        page.wait_for_text("#transcript", "Done: hello.py is there.")
        page.driver.switch_to.window(second)
        page.driver.close()
    finally:
        page.driver.switch_to.window(first)


def test_text_is_never_taken_for_html(page: Page, demo: Process) -> None:
    """What people, agents and files say is shown as it is."""
    open_playground(page, demo)
    evil = "<img src=x onerror=document.title='pwned'><b>bold</b>"
    say(page, f"create evil.html with content {evil}")
    page.wait_for_text(".card .state", "waits for you")

    assert evil in page.text(".said")
    assert evil in page.text(".card pre")
    page.click(".card .primary")
    page.wait_for_text("#transcript", "Done: evil.html")
    assert page.run("return document.querySelectorAll('main img, main b b').length") == 0
    assert "pwned" not in page.driver.title
    assert page.problems() == []


def test_its_policy_is_in_force(page: Page, demo: Process) -> None:
    """No inline script, no HTML from text, no foreign host, whoever got something into the page."""
    open_playground(page, demo)
    outcome = page.driver.execute_async_script(
        """
        const done = arguments[0];
        const refused = [];
        const note = (event) => refused.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", note);
        const results = {};
        try { document.body.innerHTML += "<i>x</i>"; } catch (error) { results.html = error.name; }
        const image = new Image();
        image.src = "https://example.org/x.png";
        document.body.append(image);
        fetch("https://example.org/").catch(() => {}).finally(
          () => setTimeout(() => done(JSON.stringify({ ...results, refused })), 200));
        """
    )
    found = json.loads(str(outcome))

    assert found["html"] == "TypeError"
    assert {"img-src", "connect-src", "require-trusted-types-for"} <= set(found["refused"])


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 568)], ids=["desktop", "phone", "small phone"])
def test_fits_the_screen(page: Page, demo: Process, size: tuple[int, int]) -> None:
    """Nothing sticks out sideways, and the message can be typed."""
    page.resize(size)
    open_playground(page, demo)
    say(page, "create hello.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")

    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    assert page.run("return document.querySelector('#transcript').scrollWidth") <= size[0]
    place = page.run("return document.querySelector('#send').getBoundingClientRect().toJSON()")
    assert place["right"] <= size[0]
    assert place["bottom"] <= size[1]


def test_shows_its_parts_one_by_one_on_a_phone(page: Page, demo: Process) -> None:
    """Chat, frames and folder are tabs there, reached with arrow keys too."""
    page.resize(PHONE)
    open_playground(page, demo)
    assert page.find("#chat").is_displayed()
    assert not page.find("#wire").is_displayed()
    page.click("#tab-wire")
    assert page.find("#wire").is_displayed()
    assert not page.find("#message").is_displayed()
    page.find("#tab-wire").send_keys("\ue014")  # arrow right
    assert page.find("#folder").is_displayed()
    assert page.run("return document.activeElement.id") == "tab-folder"


def test_the_snippet_of_the_documentation_runs(page: Page, demo: Process) -> None:
    """docs/connect.md, *TypeScript and JavaScript*: streams, asks, runs the tool, and ends."""
    open_playground(page, demo)
    lines = snippet("js").replace("http://127.0.0.1:8000", demo.url).splitlines()
    code = "\n".join(line for line in lines if not line.startswith("import "))
    outcome = page.driver.execute_async_script(
        f"""
        const done = arguments[0];
        const {{ openSession }} = await import("{demo.url}/web/client.js");
        let shown = "", asked = 0, ran = 0;
        const show = (token) => (shown += token);
        const askUser = async () => (asked += 1, true);
        const runTool = async () => (ran += 1, "done");
        {code}
        done([shown, asked, ran]);
        """
    )
    shown, asked, ran = outcome

    assert "Done: hello.py is there." in shown
    assert (asked, ran) == (1, 1)


NAMELESS = """
return [...document.querySelectorAll("button, input, select, textarea, [role=tab]")].filter((control) => {
  const labels = [...(control.labels ?? [])].map((label) => label.textContent.trim()).join("");
  return !(control.textContent.trim() || control.getAttribute("aria-label") || labels);
}).map((control) => control.outerHTML);
"""


@pytest.mark.parametrize("path", ["playground", "dashboard"])
def test_every_control_has_a_name(page: Page, demo: Process, path: str) -> None:
    """Somebody who does not see the page knows what each control is for."""
    page.open(f"{demo.url}/{path}")

    assert page.run(NAMELESS) == []
