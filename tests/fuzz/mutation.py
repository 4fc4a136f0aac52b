"""Damage: bytes changed, cut, doubled, spliced, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence


def damage(source: random.Random, data: bytes, words: Sequence[bytes], *, times: int = 4) -> bytes:
    """``data`` with up to ``times`` changes; ``words`` are what its readers pay attention to."""
    result = bytearray(data)
    for _ in range(source.randint(1, times)):
        at = source.randrange(len(result) + 1)
        until = min(len(result), at + source.choice((1, 1, 2, 4, 16, 200)))
        match source.randrange(7):
            case 0 if at < len(result):
                result[at] ^= 1 << source.randrange(8)
            case 1:
                result[at:at] = source.randbytes(source.choice((1, 1, 2, 8)))
            case 2:
                del result[at:until]
            case 3:
                result[at:at] = result[at:until] * source.choice((1, 1, 2, 50))
            case 4:
                result[at:until] = source.choice(words)
            case 5:
                del result[at:]
            case _:
                result[at:at] = source.choice(words)
    return bytes(result)


def cut(source: random.Random, data: bytes, *, most: int = 6) -> list[bytes]:
    """``data`` in up to ``most`` pieces."""
    places = sorted(source.randrange(len(data) + 1) for _ in range(source.randrange(most)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
