"""Every Dart snippet of the documentation, as it stands there, against a real gateway and agent.

Compiled and run by Dart itself, types checked. Only ``package:web_socket_channel`` is a stand-in (of its
documented interface, on dart:io as the package is), for it is to be had from pub.dev alone.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import field, frozen

from tests.client.cutting_proxy import CuttingProxy
from tests.counting_proxy import CountingProxy
from tests.dart.toolchain import Dart
from tests.end_to_end.processes import Process

ROOT = Path(__file__).parents[2]
CONVERSE = (Path(__file__).parent / "converse.dart").read_text("utf-8")
COUNT = 150
Event = dict[str, Any]


def dart_snippets(page: Path) -> list[str]:
    """Of a page, in order."""
    return re.findall(r"```dart\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


(FIRST_LINES,) = dart_snippets(ROOT / "README.md")
(CONVERSATION,) = dart_snippets(ROOT / "docs" / "connect.md")


@frozen
class Outcome:
    """What a program left behind."""

    code: int
    events: list[Event]
    """What it took in."""
    errors: str
    acks: list[int] = field(factory=list)
    """What it acknowledged."""
    cuts: int = 0


async def converse(dart: Dart, folder: Path, snippet: str, url: str, message: str) -> Outcome:
    """Run the snippet in a program that talks to ``url``."""
    (folder / "conversation.dart").write_text(snippet, "utf-8")
    program = folder / "converse.dart"
    program.write_text(CONVERSE, "utf-8")
    # The session is named for the test's folder, so that tests share a gateway.
    command = dart.command(program, url, folder.name, message)
    with trio.fail_after(60):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return Outcome(done.returncode, events, done.stderr.decode())


async def count_over_a_bad_line(dart: Dart, folder: Path, snippet: str, gateway: Process) -> Outcome:
    """Ask it to count, over connections that are cut at random bytes."""
    async with trio.open_nursery() as nursery:
        counting = CountingProxy(int(gateway.url.rpartition(":")[2]))
        await nursery.start(counting.run)
        cutting = CuttingProxy(counting.port, random.Random(3), mean_bytes=4000)
        await nursery.start(cutting.run)
        url = cutting.url.replace("http:", "ws:")
        outcome = await converse(dart, folder, snippet, url, f"count to {COUNT}")
        nursery.cancel_scope.cancel()
    acks = [message["seq"] for message in counting.up.objects if message["type"] == "ack"]
    return Outcome(outcome.code, outcome.events, outcome.errors, acks, cutting.cuts)


def assert_counted(outcome: Outcome) -> None:
    """Cut off several times, it has every event once, in order, and has acknowledged the last."""
    assert outcome.code == 0, f"it failed: {outcome.errors}"
    assert outcome.cuts >= 4
    welcomes = [event for event in outcome.events if event["type"] == "welcome"]
    assert not welcomes[0]["resumed"]
    assert all(welcome["resumed"] for welcome in welcomes[1:]), "it did not resume"
    numbered = [event for event in outcome.events if "seq" in event]
    for before, after in pairwise(numbered):
        assert after.get("first_seq", after["seq"]) == before["seq"] + 1, "a gap or a repeat"
    text = "".join(event["token"] for event in numbered if event["type"] == "assistant_message")
    assert [int(number) for number in text.split()] == list(range(1, COUNT + 1))
    assert outcome.acks == sorted(outcome.acks)
    assert outcome.acks[-1:] == [numbered[-1]["seq"]], "it did not acknowledge"


def test_runs_all_that_there_are() -> None:
    """A snippet that is added has to be run here, too."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = [snippet for page in pages for snippet in dart_snippets(page)]
    assert found == [FIRST_LINES, CONVERSATION]


async def test_resumes_where_it_was_cut_off(dart: Dart, gateway: Process, tmp_path: Path) -> None:
    """docs/connect.md: over connections that are cut at random, nothing is missing or comes twice."""
    assert_counted(await count_over_a_bad_line(dart, tmp_path, CONVERSATION, gateway))


async def test_approves_and_runs_a_tool(dart: Dart, gateway: Process, tmp_path: Path) -> None:
    """docs/connect.md: decisions and results go up as messages do; the socket is closed with 1000."""
    url = gateway.socket_url
    outcome = await converse(dart, tmp_path, CONVERSATION, url, "create hello.py that prints hello")

    assert outcome.code == 0, outcome.errors
    text = "".join(event["token"] for event in outcome.events if event["type"] == "assistant_message")
    assert "Done: hello.py is there." in text
    (call,) = [event for event in outcome.events if event["type"] == "tool_call"]
    assert call["requires_approval"] is True
    acks = [(event["id"], event["status"]) for event in outcome.events if event["type"] == "ack"]
    expected = ["question", f"decide {call['call_id']}", f"result {call['call_id']}"]
    assert acks == [(name, "accepted") for name in expected]
    assert outcome.errors == "ended with 1000\n"


async def test_says_when_nobody_is_there(dart: Dart, tmp_path: Path) -> None:
    """docs/connect.md: `await channel.ready` throws."""
    outcome = await converse(dart, tmp_path, CONVERSATION, "ws://127.0.0.1:9", "hello")

    assert outcome.code == 3
    assert "refused" in outcome.errors


def test_the_first_lines_of_an_ide(dart: Dart, gateway: Process, tmp_path: Path) -> None:
    """README.md, v1: connects, asks, and reads the answer."""
    address = "ws://127.0.0.1:8000"
    assert address in FIRST_LINES
    program = tmp_path / "main.dart"
    program.write_text(
        f"""
        import 'dart:convert';
        import 'dart:io';
        import 'package:web_socket_channel/web_socket_channel.dart';

        void handle(Map<String, dynamic> event) {{
          print(jsonEncode(event));
          if (event['is_final'] == true) exit(0);
        }}

        void main() {{
          {FIRST_LINES.replace(address, gateway.socket_url)}
        }}
        """,
        "utf-8",
    )
    done = subprocess.run(dart.command(program), capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["type"] for event in events} == {"assistant_message"}
    assert "Hello" in "".join(event["token"] for event in events)


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("lastSeq = seq;", "lastSeq = seq - 1;", "a gap or a repeat"),
        ("epoch == null ? null", "epoch != '' ? null", "it did not resume"),
        ("send({'type': 'ack', 'seq': lastSeq});", "", "it did not acknowledge"),
        ("lastSeq = seq;", "lastSeq = seq.toString();", "A value of type 'String' can't be assigned to"),
    ],
    ids=["off by one", "no resumption", "no acknowledgement", "wrong type"],
)
async def test_notices_a_client_that_is_wrong(
    dart: Dart, gateway: Process, tmp_path: Path, right: str, wrong: str, complaint: str
) -> None:
    """With a mistake in the snippet the tests above would fail, and for that reason."""
    assert right in CONVERSATION
    outcome = await count_over_a_bad_line(dart, tmp_path, CONVERSATION.replace(right, wrong), gateway)

    with pytest.raises(AssertionError, match=complaint):
        assert_counted(outcome)
