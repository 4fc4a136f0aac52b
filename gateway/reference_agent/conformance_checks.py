"""What an Agent Runtime is held to, a function each. Their docstrings are the requirements, as reported."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from gateway.reference_agent.conformance_client import (
    ContractFaultError,
    NotApplicableError,
    Probe,
    Recording,
)
from gateway.reference_agent.conformance_rules import STREAM_TIMEOUT, fault_if, refused, well_formed

TALK = "Hello! Answer in one short sentence, without using any tool."
READ = "Read the file README.md with your tool."
WRITE = "Create the file conformance.txt with content hello"
LONG = "Count to 200, all numbers in words or digits, one after the other."

Check = Callable[[Probe], Awaitable[None]]


async def _get_calls(probe: Probe, prompt: str, *, approval: bool) -> list[dict[str, Any]]:
    """Tool calls that a prompt leads to, calls of the other kind answered on the way."""
    recording = well_formed(await probe.say(prompt))
    for _ in range(6):
        calls = recording.of_type("tool_call")
        if not calls:
            break
        if all(call["requires_approval"] is approval for call in calls):
            return calls
        recording = await _answer_all(probe, calls)
    kind = "that needs approval " if approval else "that needs no approval "
    raise NotApplicableError(f"{prompt!r} led to no tool call {kind}(but to: {recording.describe()}).")


async def _answer_all(probe: Probe, calls: list[dict[str, Any]]) -> Recording:
    """Run all calls as a client does; the last stream goes on with the work."""
    recording = Recording()
    for call in calls:
        if call["requires_approval"]:
            well_formed(await probe.post(_decision(call, "approve")))
        recording = well_formed(await probe.post(_result(call)))
    return recording


async def _finish(probe: Probe, recording: Recording) -> Recording:
    """Go on until no tool is asked for."""
    for _ in range(8):
        calls = recording.of_type("tool_call")
        if not calls:
            return recording
        recording = await _answer_all(probe, calls)
    raise NotApplicableError("It went on calling tools, so its final answer was not seen.")


def _result(call: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "tool_result",
        "call_id": call["call_id"],
        "tool_name": call["tool_name"],
        "result": "# Read me\nThis is a test.",
    }


def _decision(call: dict[str, Any], decision: str, **more: Any) -> dict[str, Any]:
    return {"type": "hitl_decision", "call_id": call["call_id"], "decision": decision, **more}


async def check_key(probe: Probe) -> None:
    """Requests without the right X-Internal-Auth are refused with 401 or 403."""
    if probe.key is None:
        raise NotApplicableError("No key was given.")
    stranger = Probe(probe.http, "not the key", timeout=probe.timeout)
    recording = await stranger.say(TALK)
    fault_if(recording.status not in (401, 403), f"A wrong key got status {recording.status}.")


async def check_stream(probe: Probe) -> None:
    """A user_message is answered by a stream of well-formed events with a final one, which then ends."""
    recording = await _finish(probe, well_formed(await probe.say(TALK)))
    fault_if(bool(recording.of_type("error")), f"The answer is an error: {recording.of_type('error')[:1]}.")
    fault_if(not recording.text, f"No assistant_message with text came, but: {recording.describe()}.")
    finals = [one["is_final"] for one in recording.of_type("assistant_message")]
    fault_if(True not in finals, "No assistant_message has `is_final` true.")
    fault_if(True in finals[:-1], "Tokens came after the one with `is_final` true.")


async def check_tool_call_ends_stream(probe: Probe) -> None:
    """After a tool_call the stream ends: the runtime neither goes on talking nor runs the tool itself."""
    await _get_calls(probe, READ, approval=False)
    other = probe.another_session()
    recording = well_formed(await other.say(READ))
    kinds = [event.type for event in recording.events]
    if "tool_call" not in kinds:
        raise NotApplicableError("The second time it called no tool.")
    after = kinds[kinds.index("tool_call") :]
    fault_if("assistant_message" in after, "It went on talking after a tool_call in the same stream.")


async def check_tool_result(probe: Probe) -> None:
    """A tool_result continues the work, to a final answer in the end."""
    calls = await _get_calls(probe, READ, approval=False)
    recording = await _finish(probe, await _answer_all(probe, calls))
    fault_if(
        bool(recording.of_type("error")), f"The result led to an error: {recording.of_type('error')[:1]}."
    )
    fault_if(not recording.is_final, f"No final answer came, but: {recording.describe()}.")


async def check_result_twice(probe: Probe) -> None:
    """A second tool_result for the same call is refused."""
    calls = await _get_calls(probe, READ, approval=False)
    await _answer_all(probe, calls)
    refused(await probe.post(_result(calls[0])), "A second tool_result")


async def check_approve(probe: Probe) -> None:
    """Approved, the call may be run, and its tool_result continues the work."""
    calls = await _get_calls(probe, WRITE, approval=True)
    recording = await _finish(probe, await _answer_all(probe, calls))
    fault_if(not recording.is_final, f"No final answer came, but: {recording.describe()}.")


async def check_edit(probe: Probe) -> None:
    """A decision `edit` is taken with its modified_arguments, in any letter case."""
    calls = await _get_calls(probe, WRITE, approval=True)
    edited = {**calls[0]["arguments"]}
    recording = well_formed(await probe.post(_decision(calls[0], "edit", modified_arguments=edited)))
    fault_if(bool(recording.of_type("error")), f"An edit was refused: {recording.of_type('error')[:1]}.")


async def check_reject(probe: Probe) -> None:
    """Rejected, the call is over: the work goes on without it, to a final answer."""
    calls = await _get_calls(probe, WRITE, approval=True)
    recording = Recording()
    for call in calls:
        recording = well_formed(
            await probe.post(_decision(call, "reject", feedback="Do nothing; just stop."))
        )
    recording = await _finish(probe, recording)
    fault_if(not recording.is_final, f"No final answer came, but: {recording.describe()}.")


async def check_second_decision(probe: Probe) -> None:
    """A second decision on the same call is refused."""
    calls = await _get_calls(probe, WRITE, approval=True)
    well_formed(await probe.post(_decision(calls[0], "approve")))
    refused(await probe.post(_decision(calls[0], "reject")), "A second decision")


async def check_result_without_approval(probe: Probe) -> None:
    """A tool_result for a call that waits for approval is refused."""
    calls = await _get_calls(probe, WRITE, approval=True)
    refused(await probe.post(_result(calls[0])), "A tool_result before the approval")


async def check_pending_approvals(probe: Probe) -> None:
    """A call that waits for approval is shown by pending-approvals, until it is decided."""
    calls = await _get_calls(probe, WRITE, approval=True)
    path = f"/sessions/{probe.session_id}/pending-approvals"
    before = (await probe.get(path)).text
    fault_if(calls[0]["call_id"] not in before, f"GET {path} does not show the waiting call.")
    well_formed(await probe.post(_decision(calls[0], "reject")))
    after = (await probe.get(path)).text
    fault_if(calls[0]["call_id"] in after, f"GET {path} still shows a call that was decided.")


async def check_unknown_call(probe: Probe) -> None:
    """Results and decisions for calls that do not exist are refused, not a crash."""
    call = {"call_id": "no-such-call", "tool_name": "read_file"}
    refused(await probe.post(_result(call)), "A tool_result for an unknown call")
    refused(await probe.post(_decision(call, "approve")), "A decision on an unknown call")


async def check_bad_messages(probe: Probe) -> None:
    """Unknown types and missing fields are refused, bad JSON with 4xx; the session stays usable."""
    refused(await probe.post({"type": "no_such_type"}), "An unknown type")
    refused(await probe.post({"type": "user_message"}), "A user_message without content")
    for body in (b"{not json", b"[]", b"{}"):
        recording = await probe.post_raw(body)
        fault_if(
            not 400 <= recording.status < 500,
            f"The body {body.decode()!r} must get a status from 400 to 499, got {recording.status}.",
        )
    well_formed(await probe.say(TALK))


async def check_switch(probe: Probe) -> None:
    """switch_agent is answered by agent_switched; an agent that does not exist is refused."""
    answer = await probe.post({"type": "switch_agent", "agent_type": "ask", "reason": "check"})
    well_formed(answer)
    switches = answer.of_type("agent_switched")
    fault_if(not switches, f"switch_agent to `ask` led to no agent_switched, but: {answer.describe()}.")
    metadata = switches[0].get("metadata")
    lifted = metadata if isinstance(metadata, dict) else {}
    to_agent = switches[0].get("to_agent") or lifted.get("to_agent")
    fault_if(to_agent != "ask", f"agent_switched says to_agent {to_agent!r}, not 'ask'.")
    unknown = await probe.post({"type": "switch_agent", "agent_type": "no_such_agent"})
    refused(unknown, "A switch to an unknown agent")


async def check_cancel(probe: Probe) -> None:
    """Closing the request stops the work: the session takes the next message at once."""
    await probe.post({"type": "user_message", "content": LONG}, cut_after=2)
    began = trio.current_time()
    recording = well_formed(await probe.say(TALK))
    fault_if(bool(recording.of_type("error")), f"The next message got {recording.of_type('error')[:1]}.")
    fault_if(trio.current_time() - began > STREAM_TIMEOUT, "The next message was answered only much later.")


async def check_sessions_apart(probe: Probe) -> None:
    """Two sessions at once do not see each other."""
    other = probe.another_session()
    faults: list[ContractFaultError] = []

    async def talk(one: Probe) -> None:
        try:
            well_formed(await one.say(TALK))
        except ContractFaultError as exc:
            faults.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, probe)
        nursery.start_soon(talk, other)
    if faults:
        raise faults[0]
    history = await probe.get(f"/sessions/{probe.session_id}/history")
    fault_if(history.text.count(TALK) > 1, "One session's history holds another's message.")


async def check_routes(probe: Probe) -> None:
    """The reading routes answer 200 with JSON, and 404 with a `detail` for a session that is not there."""
    well_formed(await probe.say(TALK))
    session = probe.session_id
    for path in (
        "/agents",
        f"/agents/{session}/current",
        "/sessions",
        f"/sessions/{session}/history",
        f"/sessions/{session}/pending-approvals",
        "/events/metrics",
        "/events/metrics/sessions",
        f"/events/metrics/session/{session}",
        "/events/stats",
        "/events/audit-log",
    ):
        response = await probe.get(path)
        fault_if(response.status_code != 200, f"GET {path} answers {response.status_code}, not 200.")
        content_type = response.headers.get("content-type", "")
        fault_if("json" not in content_type, f"GET {path} answers {content_type or 'no type'}, not JSON.")
    missing = await probe.get(f"/sessions/{session}-not-there/history")
    fault_if(
        missing.status_code != 404,
        f"The history of a session that is not there answers {missing.status_code}, not 404.",
    )
    fault_if('"detail"' not in missing.text, "The 404 has no `detail`.")
    created = await probe.http.post("/sessions", json={}, headers=probe.headers())
    fault_if(created.status_code not in (200, 201), f"POST /sessions answers {created.status_code}.")
    fault_if("session_id" not in created.text, "POST /sessions does not say the new `session_id`.")


async def check_resume(probe: Probe) -> None:
    """A resumable stream has an id on every event and continues after Last-Event-ID, losing nothing."""
    message = {"type": "user_message", "content": LONG}
    key = {"Idempotency_Key": f"turn-{probe.session_id}"}
    cut = well_formed(await probe.post(message, headers=key, cut_after=3))
    if cut.headers.get("x-stream-resumable") != "1":
        raise NotApplicableError("It does not offer X-Stream-Resumable: 1.")
    if cut.ended_by != "cut by us":
        raise NotApplicableError("The answer was too short to be cut.")
    ids = [event.event_id for event in cut.events]
    fault_if(not all(ids) or len(set(ids)) != len(ids), f"Each event needs an `id` of its own, got {ids}.")
    rest = well_formed(await probe.post(message, headers={**key, "Last_Event_ID": str(ids[-1])}))
    whole = well_formed(await probe.post(message, headers=key))
    joined = [event.data for event in cut.events] + [event.data for event in rest.events]
    told = [event.data for event in whole.events]
    fault_if(
        bool(rest.events) and rest.events[0].event_id in ids,
        "The resumed stream repeats events that came before Last-Event-ID.",
    )
    fault_if(
        joined != told, f"Cut and rest make {len(joined)} events, the whole stream has {len(told)} or others."
    )
    history = (await probe.get(f"/sessions/{probe.session_id}/history")).text
    fault_if(history.count(LONG) > 1, "The work was started more than once: the message is there twice.")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("key", check_key),
    ("stream", check_stream),
    ("tool-call-ends-stream", check_tool_call_ends_stream),
    ("tool-result", check_tool_result),
    ("tool-result-twice", check_result_twice),
    ("approve", check_approve),
    ("edit", check_edit),
    ("reject", check_reject),
    ("second-decision", check_second_decision),
    ("result-without-approval", check_result_without_approval),
    ("pending-approvals", check_pending_approvals),
    ("unknown-call", check_unknown_call),
    ("bad-messages", check_bad_messages),
    ("switch-agent", check_switch),
    ("cancel", check_cancel),
    ("sessions-apart", check_sessions_apart),
    ("routes", check_routes),
    ("resume", check_resume),
)
