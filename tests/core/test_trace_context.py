"""W3C Trace Context in header fields and in messages."""

from __future__ import annotations

import pytest

from gateway.core.trace_context import TraceContext, new_trace, presented_trace, trace_of_message

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"
INVALID = [
    "",
    "00",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01\r\nX-Evil: 1",
    f"00-{TRACE}-{SPAN}-1",
]


@pytest.mark.parametrize("presented", [VALID, f"cc-{TRACE}-{SPAN}-01-what-comes-later"])
def test_continues_a_valid_trace(presented: str) -> None:
    """A valid traceparent is taken over, in the version that is known here."""
    assert presented_trace([("traceparent", presented)]) == TraceContext(VALID)


@pytest.mark.parametrize("presented", INVALID)
def test_continues_no_other(presented: str) -> None:
    """An invalid one counts as none, and with it what came beside it."""
    assert presented_trace([("traceparent", presented), ("tracestate", "vendor=1")]) is None


def test_two_parents_are_none() -> None:
    """Which of them counts would be a guess."""
    assert presented_trace([("traceparent", VALID), ("traceparent", VALID)]) is None
    assert presented_trace([("tracestate", "vendor=1")]) is None


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], ""),
        (["vendor=value,other=1"], "vendor=value,other=1"),
        (["vendor=value", "other=1"], "vendor=value,other=1"),
        (["a=b\r\nX-Evil: 1"], ""),
        (["x" * 513], ""),
    ],
)
def test_tracestate_must_fit_in_a_header(states: list[str], expected: str) -> None:
    """Several fields are one list (RFC 9110 section 5.3); what does not fit is left out."""
    headers = [("traceparent", VALID), *(("tracestate", state) for state in states)]

    assert presented_trace(headers) == TraceContext(VALID, expected)


def test_a_message_may_name_its_trace() -> None:
    """By fields named as the header fields are, among its others."""
    body = f'{{"type":"user_message","traceparent":"{VALID}","tracestate":"vendor=1"}}'.encode()

    assert trace_of_message(body) == TraceContext(VALID, "vendor=1")


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"user_message","content":"traceparent"}',
        b'{"content":"\\"traceparent\\""}',
        b'{"metadata":{"traceparent":"x"}}',
        b'{"traceparent":7}',
        b'{"traceparent":"x"}',
        b'{"traceparent"',
    ],
)
def test_any_other_message_does_not(body: bytes) -> None:
    """The word in its content, another type, an invalid value: its socket's trace goes on."""
    assert trace_of_message(body) is None


def test_a_new_trace_is_of_fresh_bytes() -> None:
    """Sampled, as it would be if whoever is called began it."""
    fresh = bytes(range(1, 25))

    assert new_trace(fresh) == TraceContext(f"00-{fresh[:16].hex()}-{fresh[16:].hex()}-01")
    assert presented_trace([("traceparent", new_trace(fresh).traceparent)]) == new_trace(fresh)
