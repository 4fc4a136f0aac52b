"""Names of the Redis store's keys and functions.

All keys of a session carry its id in braces: in a cluster they are in one hash slot, so that one function
call may change them all. What is about many sessions is an index beside them, written so that a crash
between the two leaves an index that says too much, never too little; readers ask the session itself.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

GENERATION = b"gateway:generation"
"""Changes when Redis was found to have lost what it had: epochs from before are in doubt."""
COMMITS = b"gateway:commits"
"""Counts group commits: a gateway that remembers a higher number knows that data was lost."""
UNFINISHED = b"gateway:unfinished"
"""Sorted set of sessions that may have a running turn or waiting messages; the score tells marks apart."""
TOUCHED = b"gateway:touched"
"""Sorted set of sessions by when they were last touched, as of some commit."""
NODES = b"gateway:nodes"
"""Sorted set of nodes by when they last said that they live, in Redis' milliseconds."""
CHECKED = b"gateway:checked"
"""Written to prove that it can be."""


def keys_of(session_id: str) -> tuple[bytes, ...]:
    """Owner, head, events, queue, ledger, ages and decisions of a session, in the order of the functions."""
    base = b"gateway:{%s}:" % session_id.encode()
    return (
        base + b"owner",
        base + b"head",
        base + b"events",
        base + b"queue",
        base + b"ledger",
        base + b"ages",
        base + b"decisions",
    )


def subject_key(subject: str) -> bytes:
    """The set of the session ids that belong to a subject."""
    return b"gateway:subject:" + subject.encode()


class Library(NamedTuple):
    """The functions, under names that no other version of them has: old and new gateways run side by side."""

    name: str
    code: str
    prefix: bytes

    def function(self, name: str) -> bytes:
        """The full name of a function."""
        return b"%s_%s" % (self.prefix, name.encode())


def load_library() -> Library:
    """Read the functions' source, which is beside this module."""
    source = resources.files("gateway.adapters.stores").joinpath("redis_functions.lua").read_text("utf-8")
    prefix = f"gateway_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    return Library(prefix, f"#!lua name={prefix}\n" + source.replace("PREFIX", prefix), prefix.encode())
