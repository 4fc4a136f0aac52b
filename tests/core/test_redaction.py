"""What may be logged, and how."""

from __future__ import annotations

import pytest

from gateway.core.redaction import MASK, MAX_ITEMS, Redactor, one_line

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "name",
    ["authorization", "Authorization", "token", "access_token", "internal_api_key", "key", "cookie", "x_jwt",
     "client_secret", "password", "X-Internal-Auth", "content", "message", "body", "arguments", "query"],
)  # fmt: skip
def test_masks_by_name(name: str) -> None:
    """A field whose name says secret or message content is masked whatever it holds, also inside others."""
    redactor = Redactor()

    assert redactor.field(name, "hello") == MASK
    assert {"outer": {name: MASK}} == redactor.field("fields", {"outer": {name: "hello"}})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"got {JWT} today", f"got {MASK} today"),
        (JWT[:20], MASK),
        (f"bearer.{JWT}", f"bearer.{MASK}"),
        ("Bearer opaque-token-1", f"Bearer {MASK}"),
        ("basic dXNlcjpwYXNz", f"basic {MASK}"),
        ("redis://user:pass@host:1/0", f"redis://{MASK}@host:1/0"),
        ("the key is s3cr3t-value!", f"the key is {MASK}!"),
    ],
)
def test_masks_by_shape_and_value(value: str, expected: str) -> None:
    """Tokens, passwords in URLs and the secrets of this process are masked inside any text."""
    assert expected == Redactor(["s3cr3t-value"]).field("error", value)


def test_masks_a_mapping_key() -> None:
    """A secret used as a key of a mapping is masked too."""
    assert Redactor(["s3cr3t-value"]).field("counts", {"s3cr3t-value": 1}) == {MASK: 1}


@pytest.mark.parametrize("value", [None, True, 3, 1.5])
def test_keeps_plain_values(value: object) -> None:
    """Numbers, booleans and None pass under any name: a count of tokens is no token."""
    assert value == Redactor().field("tokens", value)


def test_says_only_the_size_of_bytes() -> None:
    """Bytes are messages and events: their size is logged, not what they say."""
    assert Redactor().field("event_seen", b"hello") == "[5 bytes]"


def test_text_of_other_objects_is_masked() -> None:
    """An exception or other object is logged as its text, with secrets masked."""
    assert f"no {MASK}" == Redactor(["s3cr3t-value"]).field("cause", ValueError("no s3cr3t-value"))


def test_bounds_what_is_kept() -> None:
    """Long text, long lists and deep structures are cut."""
    deep: object = "end"
    for _ in range(20):
        deep = [deep]
    redactor = Redactor()

    assert len(str(redactor.field("error", "x" * 1_000_000))) < 3_000
    assert len(redactor.field("items", list(range(1_000)))) == MAX_ITEMS  # type: ignore[arg-type]
    assert isinstance(redactor.field("deep", deep), list)
    assert redactor.field("rtt", float("nan")) == "nan"


@pytest.mark.parametrize(
    "character", ["\n", "\r", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\udc80"]
)
def test_keeps_text_on_one_line(character: str) -> None:
    """Whatever could end a line, steer a terminal or reorder text is escaped."""
    assert f"a\\u{ord(character):04x}b" == one_line(f"a{character}b")


def test_does_not_mask_ordinary_words_for_short_secrets() -> None:
    """A secret of under six characters is not searched for in text."""
    assert Redactor(["test"]).field("event_name", "testing") == "testing"
