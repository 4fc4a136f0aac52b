"""Request ids, subjects in headers, tokens in queries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import Forbidden
from gateway.core.request_context import (
    refuse_token_in_query,
    request_id,
    user_id_header,
)

FRESH = bytes(range(1, 25))


@pytest.mark.parametrize("presented", ["a", "A.b_c-1", "x" * 128])
def test_takes_over_a_safe_request_id(presented: str) -> None:
    """A caller's id of the allowed form is kept, so that its logs and ours can be joined."""
    assert request_id(presented, FRESH) == presented


@pytest.mark.parametrize("presented", [None, "", "x" * 129, "a b", "a\n", "a\r\nX-Evil: 1", "ä", "a;b"])
def test_makes_a_request_id_otherwise(presented: str | None) -> None:
    """Anything else is replaced, never repaired."""
    assert request_id(presented, FRESH) == FRESH.hex()


@pytest.mark.parametrize(
    ("subject", "expected"),
    [("alice", "alice"), ("auth0|12 3", "auth0|12 3"), ("a%b", "a%b"), ("zoë", "zo%C3%AB"),
     ("a\r\nX-Evil: 1", "a%0D%0AX-Evil:%201"), (" a", "%20a"), ("", "")],
)  # fmt: skip
def test_a_subject_is_one_header_value(subject: str, expected: str) -> None:
    """A subject that fits stays as it is, and any other is percent-encoded."""
    assert user_id_header(subject) == expected


@given(st.text())
def test_no_subject_leaves_its_header(subject: str) -> None:
    """Whatever the subject, the value is one line of visible ASCII and spaces."""
    assert all(" " <= letter <= "~" for letter in user_id_header(subject))


@pytest.mark.parametrize(
    "query",
    [
        "access_token=x",
        "a=1&ID_TOKEN=x",
        "q=eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.",
        "b%65arer=x",
        "jwt=",
        "token=x",
    ],
)
def test_refuses_a_token_in_a_query(query: str) -> None:
    """Credentials in a URL are refused by name and by shape."""
    with pytest.raises(Forbidden):
        refuse_token_in_query(query)


@pytest.mark.parametrize("query", ["", "limit=10&offset=2", "page_token=7", "q=a.b.c", "&&=", "%zz"])
def test_lets_other_queries_pass(query: str) -> None:
    """What is no credential passes, however odd."""
    refuse_token_in_query(query)
