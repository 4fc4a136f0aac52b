"""The lines between a runtime and its LLM spool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.reference_agent.brain import CallTool, SwitchTo, Token, Usage
from gateway.reference_agent.llm_spool_protocol import (
    End,
    Failure,
    Line,
    LineBuffer,
    decode_line,
    encode_lines,
    identity,
)

LINES: list[Line] = [
    Token("é\u2028\n"),
    CallTool("read_file", {"path": "x"}, "c1", None),
    CallTool("t", {}, None, "no"),
    SwitchTo("ask", "because", 0.5),
    Usage(1, 2, 0),
    End(),
    Failure("LLM_REFUSED", "no", retryable=False),
]


@given(st.data())
def test_lines_arrive_as_they_were_sent(data: st.DataObject) -> None:
    """However the bytes are cut."""
    sent = data.draw(st.lists(st.sampled_from(LINES), max_size=8))
    encoded = encode_lines(*sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    buffer = LineBuffer()
    received = [
        decode_line(line)
        for first, last in zip([0, *cuts], [*cuts, len(encoded)], strict=True)
        for line in buffer.feed(encoded[first:last])
    ]
    assert received == sent


def test_an_empty_line_says_nothing() -> None:
    """But that the spool is alive."""
    assert decode_line(b"") is None


@pytest.mark.parametrize("line", [b"x", b"7", b"{}", b'{"type":"Token"}', b'{"type":"Secret","text":"x"}'])
def test_a_line_that_is_none_is_refused(line: bytes) -> None:
    """With one kind of error."""
    with pytest.raises(ValueError, match=r".+"):
        decode_line(line)


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it fills the memory."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool_protocol.MAX_LINE_BYTES", 10)
    buffer = LineBuffer()
    buffer.feed(b"1234567890")
    with pytest.raises(ValueError, match="too long"):
        buffer.feed(b"1")


def test_a_spool_of_other_settings_or_of_another_version_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part counts; the key cannot be read out of it."""
    same = identity("http://a", "k", 1.0)
    assert same == identity("http://a", "k", 1.0)
    others = [identity("http://b", "k", 1.0), identity("http://a", None, 1.0), identity("http://a", "k", 2.0)]
    monkeypatch.setattr("gateway.__version__", "0.0.0+another")
    others.append(identity("http://a", "k", 1.0))
    assert len({same, *others}) == 5
