"""The LLM brain against prepared answers."""

from collections.abc import Sequence
from typing import Any

import httpx
import orjson
import pytest
import trio
import trio.testing

from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.brain import BrainError, CallTool, Piece, Step, SwitchTo, Token, Usage
from gateway.reference_agent.history import Entry, RequestedCall
from gateway.reference_agent.llm_brain import LlmBrain
from gateway.reference_agent.llm_client import LlmClient, completions_url

from .fake_llm import DONE, FakeLlm, Reply, call_chunk, calls, chunk, says

DEFAULT_REASON = "This is work for the agent ask."
AT = "2026-01-01T00:00:00Z"


def step(*entries: Entry, agent: str = "coder", **more: Any) -> Step:
    """A step of a session, by default after one question."""
    return Step("s1", AGENTS[agent], entries or (Entry("user", "hi", AT),), **more)


async def ask(llm: FakeLlm, of: Step | None = None) -> list[Piece]:
    """What the brain says to one step; the cost of the attempts left out."""
    pieces: list[Piece] = []

    async def say(*said: Piece) -> None:
        pieces.extend(piece for piece in said if piece != Usage(requests=1))

    async with httpx.AsyncClient(transport=llm) as client:
        asker = LlmClient(client, "http://llm/v1/chat/completions", key="k", jitter=lambda: 1.0)
        brain = LlmBrain(asker, "m", history_tokens=1000)
        await brain.think(of or step(), say)
    return pieces


async def code_of(llm: FakeLlm) -> tuple[str, bool, int]:
    """The error the brain ends with: code, retryable, and how often the LLM was asked."""
    with pytest.raises(BrainError) as caught:
        await ask(llm)
    return caught.value.code, caught.value.retryable, len(llm.requests)


async def test_text_is_passed_on_as_it_comes_and_usage_counted() -> None:
    """Each chunk a token."""
    llm = FakeLlm(says("Hel", "lo"))
    assert await ask(llm) == [Token("Hel"), Token("lo"), Usage(10, 2, requests=0)]
    assert llm.requests[0].headers["Authorization"] == "Bearer k"


async def test_tool_calls_are_put_together_from_fragments() -> None:
    """Several at once, interleaved, whatever the server does with ids and indexes."""
    llm = FakeLlm(
        Reply(
            [
                chunk({"content": "Now."}),
                call_chunk(0, '{"pa', "a", "read_file"),
                call_chunk(1, "", "b", "list_files"),
                call_chunk(0, 'th": "x"}'),
                call_chunk(1, '{"path"', "b", "list_files"),
                call_chunk(1, ': "."}', "b"),
                call_chunk(1, "{}", "c", "read_file"),
                chunk({}, "tool_calls"),
                DONE,
            ]
        )
    )
    assert await ask(llm) == [
        Token("Now."),
        Usage(requests=0),
        CallTool("read_file", {"path": "x"}, "a"),
        CallTool("list_files", {"path": "."}, "b"),
        CallTool("read_file", {}, "c"),
    ]


@pytest.mark.parametrize("arguments", ['{"path": "x', "[]", "nonsense"])
async def test_arguments_that_are_no_object_are_told_to_the_llm(arguments: str) -> None:
    """The call is not made; the runtime hands the problem back."""
    llm = FakeLlm(Reply([call_chunk(0, arguments, "a", "read_file"), chunk({}, "tool_calls"), DONE]))
    assert await ask(llm) == [
        Usage(requests=0),
        CallTool("read_file", {}, "a", "The arguments are not a JSON object."),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"agent": "ask", "reason": "A question.", "confidence": 0.7},
            SwitchTo("ask", "A question.", 0.7),
        ),
        ({"agent": "ask", "confidence": 7}, SwitchTo("ask", DEFAULT_REASON, 1.0)),
        (
            {"agent": "ask", "reason": "", "confidence": "high"},
            SwitchTo("ask", DEFAULT_REASON),
        ),
    ],
)
async def test_the_llm_hands_over_by_a_tool_call(arguments: dict[str, Any], expected: SwitchTo) -> None:
    """It becomes a switch, not a call for the client."""
    assert (await ask(FakeLlm(calls("switch_agent", arguments))))[-1] == expected


@pytest.mark.parametrize("agent", ["coder", "boss"])
async def test_handing_over_to_oneself_or_nobody_is_told_to_the_llm(agent: str) -> None:
    """As a call that failed."""
    piece = (await ask(FakeLlm(calls("switch_agent", {"agent": agent, "reason": "r"}))))[-1]
    assert isinstance(piece, CallTool)
    assert piece.problem is not None
    assert piece.problem.startswith(f"There is no other agent '{agent}'")


async def test_an_answer_that_does_not_stream_is_taken_too() -> None:
    """Some servers ignore `stream`."""
    body = {"choices": [{"message": {"content": "Whole."}, "finish_reason": "stop"}], "usage": None}
    llm = FakeLlm(Reply([orjson.dumps(body)], headers={"Content-Type": "application/json"}))
    assert await ask(llm) == [Token("Whole."), Usage(requests=0)]


async def test_chunks_cut_anywhere_are_understood() -> None:
    """Byte by byte, CRLF, comments between."""
    whole = b"\xef\xbb\xbf: hi\r\n\r\n" + b"".join(says("é\u2028").chunks).replace(b"\n", b"\r\n")
    llm = FakeLlm(Reply([bytes([byte]) for byte in whole]))
    assert (await ask(llm))[0] == Token("é\u2028")


@pytest.mark.parametrize(
    ("failures", "waits"),
    [
        ([Reply(status=429, headers={"Retry-After": "7"}), Reply(status=503)], 7 + 0.5 + 1.0),
        ([Reply(refuse=True), Reply(status=500), Reply(cut=True)], 0.5 + 1.0 + 2.0),
        ([Reply(status=429, headers={"Retry-After": "9999"})], 30.5),
        ([Reply([chunk({"role": "assistant"})])], 0.5),
    ],
)
async def test_failures_before_the_first_token_are_tried_again(
    failures: Sequence[Reply], waits: float, autojump_clock: trio.testing.MockClock
) -> None:
    """With backoff, and as long as the server asks for."""
    llm = FakeLlm(*failures, says("ok"))
    assert (await ask(llm))[0] == Token("ok")
    assert trio.current_time() == pytest.approx(waits)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([Reply(status=429)] * 4, ("LLM_RATE_LIMITED", True, 4)),
        ([Reply(refuse=True)] * 4, ("LLM_UNAVAILABLE", True, 4)),
        ([Reply(status=401)], ("LLM_UNAUTHORIZED", False, 1)),
        ([Reply(status=400)], ("LLM_REFUSED", False, 1)),
        ([Reply([chunk({"content": "a"})], cut=True)], ("LLM_INTERRUPTED", True, 1)),
        ([Reply([chunk({"content": "a"})])], ("LLM_INTERRUPTED", True, 1)),
        ([Reply([chunk({"content": "a"}, "length"), DONE])], ("LLM_LENGTH", False, 1)),
        ([Reply([chunk({}, "content_filter"), DONE])], ("LLM_CONTENT_FILTER", False, 1)),
        ([Reply([b'data: {"error": {"message": "x"}}\n\n'])], ("LLM_ERROR", True, 1)),
        ([Reply([b"data: <html>\n\n"])], ("LLM_PROTOCOL_ERROR", False, 1)),
        ([Reply([b'data: {"choices": [7]}\n\n'])], ("LLM_PROTOCOL_ERROR", False, 1)),
        ([Reply([b"<html>"], headers={"Content-Type": "text/html"})], ("LLM_PROTOCOL_ERROR", False, 1)),
        ([Reply([b"data: " + b"x" * 5_000_000, b"\n"])], ("LLM_PROTOCOL_ERROR", False, 1)),
    ],
)
async def test_each_failure_has_its_code(
    replies: list[Reply], expected: tuple[str, bool, int], autojump_clock: trio.testing.MockClock
) -> None:
    """And nothing is tried again once the user has been given a word."""
    assert await code_of(FakeLlm(*replies)) == expected


async def test_cancelling_closes_the_request_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Which is what stops the LLM."""
    llm = FakeLlm(Reply([chunk({"content": "a"})] * 100, delay=1.0))
    with trio.move_on_after(3.5):
        await ask(llm)
    assert (trio.current_time(), llm.closed) == (3.5, ["closed"])


async def test_a_stream_left_open_after_its_end_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """The answer is complete with `[DONE]`."""
    reply = says("a")
    reply.chunks += [b": still here\n\n"] * 1000
    reply.delay = 0.1
    assert (await ask(FakeLlm(reply)))[0] == Token("a")
    assert trio.current_time() < 2


async def test_the_history_is_told_as_the_api_wants_it() -> None:
    """Results stand right behind their calls; system words of the IDE keep their place."""
    llm = FakeLlm(says("ok"))
    await ask(
        llm,
        step(
            Entry("user", "read", AT),
            Entry(
                "assistant",
                "",
                AT,
                tool_calls=(RequestedCall("a", "read_file", {"path": "x"}), RequestedCall("b", "t", {})),
            ),
            Entry("tool", "B", AT, call_id="b"),
            Entry("system", "note", AT),
            Entry("tool", "A", AT, call_id="a"),
        ),
    )
    body = llm.bodies[0]
    assert [message["role"] for message in body["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "system",
    ]
    assert [message["content"] for message in body["messages"][3:]] == ["A", "B", "note"]
    assert body["messages"][2]["tool_calls"][0]["function"] == {
        "name": "read_file",
        "arguments": '{"path":"x"}',
    }
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


async def test_each_agent_is_offered_its_own_tools() -> None:
    """And the hand-over, unless the client has chosen the agent."""

    def names(body: Any) -> list[str]:
        return [tool["function"]["name"] for tool in body["tools"]]

    llm = FakeLlm(says("ok"), says("ok"))
    await ask(llm, step(agent="ask"))
    await ask(llm, step(agent="architect", pinned=True))
    assert names(llm.bodies[0]) == ["read_file", "list_files", "switch_agent"]
    assert names(llm.bodies[1]) == ["read_file", "list_files", "write_file", "edit_file"]


async def test_an_answer_cut_by_a_restart_is_continued() -> None:
    """The LLM is given what the user already has."""
    llm = FakeLlm(says("ok"))
    await ask(llm, step(already_said="Once upon"))
    assert llm.bodies[0]["messages"][-2] == {"role": "assistant", "content": "Once upon"}
    assert "Continue exactly" in llm.bodies[0]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h:4000", "http://h:4000/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
        ("https://h/x/chat/completions", "https://h/x/chat/completions"),
    ],
)
def test_the_address_is_completed(base: str, url: str) -> None:
    """People paste all of these."""
    assert completions_url(base) == url


@pytest.mark.parametrize("base", ["", "localhost:4000", "ftp://h", "http://", "http://h:port"])
def test_an_address_that_is_none_is_refused(base: str) -> None:
    """Before anything is served."""
    with pytest.raises(ValueError, match="llm_url"):
        completions_url(base)
