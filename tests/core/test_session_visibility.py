"""What one subject sees of lists about everybody's sessions."""

from __future__ import annotations

import pytest

from gateway.core.errors import AgentProtocolError
from gateway.core.session_visibility import only_sessions, session_of

OWN = {"mine", "mine too"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], []),
        (["mine", "other"], ["mine"]),
        ([{"session_id": "mine"}, {"session_id": "other"}], [{"session_id": "mine"}]),
        ([{"id": "mine", "n": 1}, {"id": "other"}], [{"id": "mine", "n": 1}]),
        ([{"session_id": "other", "id": "mine"}], []),
        ([{"title": "no id"}, 7, None, ["mine"]], []),
        ({"sessions": [{"id": "other"}, {"id": "mine"}], "total": 2},
         {"sessions": [{"id": "mine"}], "total": 1}),
        ({"sessions": ["other"], "count": 9, "page": 1}, {"sessions": [], "count": 0, "page": 1}),
        ({"sessions": ["mine"], "by_session": {"other": 3}}, {"sessions": ["mine"]}),
    ],
)  # fmt: skip
def test_leaves_out_what_is_not_known_to_be_own(answer: object, expected: object) -> None:
    """Entries of other sessions, entries that name none, and objects beside the lists are not shown."""
    assert only_sessions(answer, OWN) == expected


@pytest.mark.parametrize(
    "answer",
    [[{"id": "mine"}, "mine too"], {"sessions": [{"session_id": "mine"}], "total": 40, "next": None}],
)
def test_gives_an_answer_that_is_all_own_as_it_is(answer: object) -> None:
    """When nothing has to be left out the very same object comes back, so its bytes need no change."""
    assert only_sessions(answer, OWN) is answer


@pytest.mark.parametrize("answer", [None, "mine", 3, {}, {"mine": {"turns": 1}}, {"sessions": {"mine": 1}}])
def test_refuses_shapes_it_does_not_know(answer: object) -> None:
    """What cannot be filtered is not shown at all."""
    with pytest.raises(AgentProtocolError):
        only_sessions(answer, OWN)


def test_an_entrys_own_id_is_not_its_session() -> None:
    """In lists of entries only ``session_id`` counts: an id that looks like a session's opens nothing."""
    assert only_sessions([{"id": "mine"}], OWN, ("session_id",)) == []


def test_names_the_session_of_an_object() -> None:
    """``session_id`` goes before ``id``; without either there is none."""
    assert session_of({"id": "a", "session_id": "b"}) == "b"
    assert session_of({"id": 3}) is None
    assert session_of([]) is None
