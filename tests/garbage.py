"""What only the garbage collector would free: objects that lead back to themselves.

It runs seldom where most objects are none of its business (events, commits), and until then a closed socket's
session would stay in memory with all its events.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_of(*packages: str) -> Iterator[list[str]]:
    """After the block: the types of these packages of which it left objects to the collector."""
    found: list[str] = []
    gc.collect()
    before, was_enabled = gc.get_debug(), gc.isenabled()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        kinds = {f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage}
        found += sorted(kind for kind in kinds if kind.split(".")[0] in packages)
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
        if was_enabled:
            gc.enable()
