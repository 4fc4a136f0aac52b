"""``python -m tests.browser.take_screenshots docs/images`` takes the screenshots of the documentation anew.

They show the real pages of a real ``gateway demo``, with conversations going on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.browser.chromium import DESKTOP, PHONE, Page, running_chromium
from tests.browser.test_dashboard import unlock
from tests.browser.test_playground import open_playground, say
from tests.end_to_end.processes import Process, started

NAMES = ("checkout-page", "ide-anna", "ide-jonas", "nightly-review", "ide-mei", "refactor-auth", "docs-pass")
SECONDS_OF_TRAFFIC = 75.0

TRAFFIC = """
import asyncio, json, random, sys
from websockets.asyncio.client import connect

SAYINGS = ["count to 120", "count to 60", "explain app.py", "create page.py that prints hi", "count to 200"]

async def talk(url, number):
    v2 = number % 3 > 0
    async with connect(url, proxy=None, subprotocols=["codelab.v2.json"] if v2 else None) as socket:
        async def read():
            async for frame in socket:
                value = json.loads(frame)
                items = value if isinstance(value, list) else [value]
                seqs = [item["seq"] for item in items if "seq" in item]
                if seqs and seqs[-1] % 20 == 0:
                    await socket.send(json.dumps({"type": "ack", "seq": seqs[-1]}))
        reading = asyncio.create_task(read())
        for count in range(1000):
            content = "fail" if number == 3 and count == 2 else random.choice(SAYINGS)
            await socket.send(json.dumps({"type": "user_message", "id": f"{count}", "content": content}))
            await asyncio.sleep(random.uniform(2, 7))

async def main(url, names):
    places = [f"{url}/api/v1/ws/{name}-{1000 + 37 * number}" for number, name in enumerate(names * 3)]
    await asyncio.gather(*(talk(place, number) for number, place in enumerate(places)))

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """People who talk to it."""
    talkers = subprocess.Popen([sys.executable, "-c", TRAFFIC, url, *NAMES], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        talkers.terminate()
        talkers.wait()


def shoot(page: Page, folder: Path, name: str, *, dark: bool, phone: bool) -> None:
    """One page on one screen."""
    page.resize(PHONE if phone else DESKTOP, dark=dark)
    time.sleep(1.2)
    page.shoot(folder / f"{name}-{'phone' if phone else 'desktop'}-{'dark' if dark else 'light'}.png")


def shoot_playground(page: Page, demo: Process, folder: Path) -> None:
    """A conversation with an approval and a resume; and a call that waits."""
    page.resize(DESKTOP)
    open_playground(page, demo, "a-first-look")
    say(page, "create hello.py that prints hello")
    page.wait_for_text(".card .state", "waits for you")
    page.click(".card .primary")
    page.wait_for_text("#transcript", 'Say "read hello.py" to see it.')
    say(page, "count to 200")
    page.wait_for_text(".answer:last-child", " 60 ")
    page.click("#plug")
    time.sleep(2)
    page.click("#put-back")
    page.wait_for_text(".answer:last-child", " 199 ")
    for dark in (False, True):
        for phone in (False, True):
            shoot(page, folder, "playground", dark=dark, phone=phone)
    page.resize(DESKTOP)
    open_playground(page, demo, "another-look")
    say(page, "edit greet.py: replace hello with good morning")
    page.wait_for_text("#transcript", "waits for you")
    for dark in (False, True):
        shoot(page, folder, "playground-approval", dark=dark, phone=False)
        shoot(page, folder, "playground-approval", dark=dark, phone=True)


def main(folder: Path) -> None:
    """Take all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "gateway", "demo", "--no-chat", "--bind", "127.0.0.1:0"]
        demo = stack.enter_context(started(command, temporary, name="demo"))
        page = stack.enter_context(running_chromium(temporary / "profile"))
        shoot_playground(page, demo, folder)
        stack.enter_context(traffic(demo.socket_url))
        page.resize(DESKTOP)
        unlock(page, demo)
        time.sleep(SECONDS_OF_TRAFFIC)
        for dark in (False, True):
            for phone in (False, True):
                shoot(page, folder, "dashboard", dark=dark, phone=phone)
        page.resize(DESKTOP)
        page.click('tr[data-session^="ide-anna"] button')
        shoot(page, folder, "dashboard-session", dark=False, phone=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
