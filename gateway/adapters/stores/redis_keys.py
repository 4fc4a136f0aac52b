"""Names of the Redis store's keys and functions.

All keys of a session carry its id in braces: in a cluster they are in one hash slot, so that one function
call may change them all. What is about many sessions is an index beside them, written so that a crash
between the two leaves an index that says too much, never too little; readers ask the session itself. In a
cluster an index has many shards: a session is indexed in one that is on the same server as the session is
then, so that one write in order reaches both. Who reads an index reads all of its shards.
"""

from __future__ import annotations

import binascii
import hashlib
import itertools
from importlib import resources
from typing import NamedTuple

GENERATION = b"gateway:generation"
"""Changes when Redis was found to have lost what it had: epochs from before are in doubt."""
COMMITS = b"gateway:commits"
"""Counts group commits: a gateway that remembers a higher number knows that data was lost."""
NODES = b"gateway:nodes"
"""Sorted set of nodes by when they last said that they live, in Redis' milliseconds."""
SLOTS = 16384
"""Hash slots of a cluster."""
_SHARDS = 32
"""As many parts of the slots have an index of their own: with more masters than that some have none near."""


class Shard(NamedTuple):
    """Keys that are beside sessions."""

    unfinished: bytes
    """Sorted set of sessions that may have a running turn or waiting messages; scores tell marks apart."""
    touched: bytes
    """Sorted set of sessions by when they were last touched, as of some commit."""
    checked: bytes
    """Written to prove that it can be."""


SOLE_SHARD = Shard(b"gateway:unfinished", b"gateway:touched", b"gateway:checked")
"""Of a Redis that is no cluster."""


def cluster_shards() -> tuple[Shard, ...]:
    """One shard for each part of the slots, in their order."""
    tags: dict[int, bytes] = {}
    for number in itertools.count():
        # No session id has a number sign in it.
        tag = b"#%d" % number
        tags.setdefault(slot_of(tag) * _SHARDS // SLOTS, tag)
        if len(tags) == _SHARDS:
            break
    bases = [b"gateway:{%s}:" % tags[part] for part in range(_SHARDS)]
    return tuple(Shard(base + b"unfinished", base + b"touched", base + b"checked") for base in bases)


def slot_of(key: bytes) -> int:
    """The hash slot of a key: of what is between its first braces, if that is anything.

    https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags
    """
    _, has_tag, rest = key.partition(b"{")
    tag, is_closed, _ = rest.partition(b"}")
    return binascii.crc_hqx(tag if has_tag and is_closed and tag else key, 0) % SLOTS


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
