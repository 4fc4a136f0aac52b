"""Conversations with the scripted brain, through the running agent."""

import pytest

from .conftest import AgentClient, Answer, RunAgent


async def test_an_edit_reads_first_then_changes(client: AgentClient) -> None:
    """Two tools, one after the other; only the change needs approval."""
    reading = await client.say("edit hello.py: replace hello with goodbye")
    assert reading.calls[0]["tool_name"] == "read_file"
    assert reading.calls[0]["requires_approval"] is False
    changing = await client.result(reading.calls[0]["call_id"], 'x = 1\nprint("hello")\n')
    call = changing.calls[0]
    assert (call["tool_name"], call["requires_approval"]) == ("edit_file", True)
    assert call["arguments"] == {"path": "hello.py", "old": 'print("hello")', "new": 'print("goodbye")'}
    await client.decide(call["call_id"], "approve")
    done = await client.result(call["call_id"], {"ok": True})
    assert done.text == "Done: hello.py now says 'goodbye'."


async def test_an_edit_in_several_lines_writes_the_file_anew(client: AgentClient) -> None:
    """`edit_file` wants a passage that occurs once."""
    reading = await client.say("edit a.txt: replace one with two")
    changing = await client.result(reading.calls[0]["call_id"], "one\none and one\nthree\n")
    call = changing.calls[0]
    assert (call["tool_name"], call["arguments"]["content"]) == ("write_file", "two\ntwo and two\nthree\n")


async def test_an_edit_of_what_is_not_there_changes_nothing(client: AgentClient) -> None:
    """The brain says so instead of asking for the impossible."""
    reading = await client.say("edit hello.py: replace hello with goodbye")
    answer = await client.result(reading.calls[0]["call_id"], "nothing here")
    assert answer.calls == []
    assert "does not occur" in answer.text


async def test_several_files_are_read_at_once(client: AgentClient) -> None:
    """All calls come in one stream; the brain goes on when the last result is in."""
    asked = await client.say("read a.py, b.py and c.py")
    ids = [call["call_id"] for call in asked.calls]
    assert len(ids) == 3
    first = await client.result(ids[2], "C")
    second = await client.result(ids[0], "A")
    last = await client.result(ids[1], "B")
    assert (first.events, second.events) == ([], [])
    assert last.types == ["assistant_message"]
    assert {"A", "B", "C"} <= set(last.text.split())


async def test_a_rejection_is_taken_to_heart(client: AgentClient) -> None:
    """The stream that answers it goes on, with the reason in the brain's hands."""
    asked = await client.say("create hello.py")
    answer = await client.decide(asked.calls[0]["call_id"], "reject", feedback="wrong folder")
    assert answer.text == "All right, I leave it as it is. I understood: wrong folder"
    assert answer.events[-1]["is_final"] is True


@pytest.mark.parametrize(
    ("text", "agent", "tool"),
    [
        ("create a.py", "coder", "write_file"),
        ("run `ls`", "coder", "execute_command"),
        ("plan a shop", "architect", "write_file"),
        ("debug a.py", "debug", "read_file"),
        ("explain a.py", "ask", "read_file"),
    ],
)
async def test_requests_are_routed(client: AgentClient, text: str, agent: str, tool: str) -> None:
    """The orchestrator hands over with a reason and its confidence."""
    answer = await client.say(text)
    switch = answer.events[0]
    assert (switch["type"], switch["from_agent"], switch["to_agent"]) == (
        "agent_switched",
        "orchestrator",
        agent,
    )
    assert switch["reason"]
    assert 0 < switch["confidence"] <= 1
    assert answer.calls[0]["tool_name"] == tool
    assert (await client.get("/agents/s1/current"))["agent"] == agent


async def test_debugging_finds_a_syntax_error(client: AgentClient) -> None:
    """The line of a real fault is named."""
    asked = await client.say("debug a.py")
    answer = await client.result(asked.calls[0]["call_id"], "x = 1\nprint('hello'\n")
    assert "a.py does not parse" in answer.text
    assert "line 2" in answer.text


async def test_an_agent_chosen_by_the_client_stays(client: AgentClient) -> None:
    """Its limits hold: what it may not do is refused, and it says so."""
    await client.post({"type": "switch_agent", "agent_type": "ask", "reason": "only questions"})
    answer = await client.say("create hello.py")
    assert answer.types == ["assistant_message"]
    assert "may not call write_file" in answer.text
    assert (await client.get("/agents/s1/current"))["agent"] == "ask"


async def test_exercises(client: AgentClient) -> None:
    """The commands made for gateways: tokens by number, a failure, free talk."""
    counted = await client.say("count to 5")
    failed = await client.say("fail")
    talked = await client.say("nice weather")
    assert [event["token"] for event in counted.events] == ["1 ", "2 ", "3 ", "4 ", "5 ", ""]
    assert (failed.error_codes, failed.ended) == (["SCRIPTED_FAILURE"], True)
    assert "nice weather" in talked.text


async def test_the_same_conversation_gives_the_same_events(run_agent: RunAgent) -> None:
    """But for the call ids, which are new each time."""

    async def talk() -> list[Answer]:
        async with run_agent() as client:
            return [await client.say("help"), await client.say("count to 3"), await client.say("explain me")]

    first, second = await talk(), await talk()
    assert [answer.events for answer in first] == [answer.events for answer in second]
