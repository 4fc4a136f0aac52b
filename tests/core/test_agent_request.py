"""What goes to the Agent Runtime cannot be more than it stands for, nor come back into the log."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.agent_request import event_id_value, header_value, loggable, post_body
from gateway.core.errors import AgentProtocolError


def test_the_message_is_not_encoded_again() -> None:
    """Spaces, escapes, long numbers and duplicate names reach the runtime as the client wrote them."""
    message = b'{ "type":"user_message", "n":123456789012345678901.50, "n":"\\u0041" }'
    assert post_body('s"1', message) == b'{"session_id":"s\\"1","message":' + message + b"}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("user-1@example.org|a:b", b"user-1@example.org|a:b"),
        ("a\r\nX-Evil: 1", b"a%0D%0AX-Evil:%201"),
        ("a%0D", b"a%250D"),
        (" ж\0", b"%20%D0%B6%00"),
        ("\ud800", b"%ED%A0%80"),
        ("", b""),
    ],
)
def test_header_values_are_visible_ascii(text: str, value: bytes) -> None:
    """Everything else is percent-encoded, the percent sign included."""
    assert header_value(text) == value


@given(st.text(), st.text())
def test_two_subjects_never_become_one(one: str, other: str) -> None:
    """The encoding can be undone, and holds nothing that ends or splits a header."""
    assert re.fullmatch(rb"[\x21-\x7e]*", header_value(one))
    assert (header_value(one) == header_value(other)) == (one == other)


def test_an_event_id_is_sent_as_utf8() -> None:
    """Browsers do the same, and the runtime compares it with what it gave."""
    assert event_id_value("7-ж 8") == "7-ж 8".encode()


@pytest.mark.parametrize("event_id", [" 7", "7 ", "7\t", "a\x01b", "a\x7f"])
def test_an_event_id_that_no_header_can_carry_is_refused(event_id: str) -> None:
    """Without it, or with another one, the runtime would start over: tokens would come twice."""
    with pytest.raises(AgentProtocolError):
        event_id_value(event_id)


def test_an_error_page_is_logged_without_the_message_it_quotes() -> None:
    """Words of the message are masked, escaped or cut off as they may be; the rest says what went wrong."""
    message = '{"type":"user_message","content":"the password is hunter2, пароль"}'.encode()
    page = (
        b'{"detail":[{"loc":["body","role"],"msg":"Field required",'
        b'"input":"password is hunter2, \\u043f\\u0430\\u0440\\u043e\\u043b\\u044c, passw'
    )
    logged = loggable(page, message)
    assert "Field required" in logged
    for secret in ("password", "hunter2", "парол", "043f", "passw"):
        assert secret not in logged


def test_an_error_page_is_logged_on_one_line() -> None:
    """Line ends, terminal escapes and broken UTF-8 do not reach the log as they are."""
    logged = loggable(b"<h1>\r\nBad\x1b[31m \xff\xe2\x80\xa8\\u000agateway</h1>", b"{}")
    assert logged.isprintable()
    assert "gateway" in logged
