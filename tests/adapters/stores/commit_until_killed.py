"""A process that commits to a store until it is killed, and prints the number of each commit that returned.

``python -m tests.adapters.stores.commit_until_killed URL SYNC SESSION…``: carries on where the store stands.
"""

from __future__ import annotations

import sys

import trio

from gateway.adapters.stores.open import open_session_store
from tests.conformance.session_store import (
    DEDUPE_WINDOW,
    RecordingTelemetry,
    SettableClock,
    numbered_commit,
)


async def main(*arguments: str) -> None:
    """Commit for ever, tidying up often, with a clock on which everything is always due."""
    url, sync, *session_ids = arguments
    clock = SettableClock()
    async with open_session_store(
        url,
        full_sync=sync == "full",
        dedupe_window=DEDUPE_WINDOW,
        clock=clock,
        telemetry=RecordingTelemetry(),
    ) as store:
        for session_id in session_ids:
            await store.claim(session_id, "ada", 1.0)
        stand = {}
        for session_id in session_ids:
            found = await store.load(session_id)
            stand[session_id] = 0 if found is None or found.record is None else int(found.record.touched_at)
        number = max(stand.values())
        # Where each session is a step of its own, the kill may have come between two of them.
        behind = [numbered_commit(each, number) for each, stands_at in stand.items() if stands_at < number]
        await store.commit(behind)
        async with trio.open_nursery() as nursery:

            async def tidy() -> None:
                while True:
                    clock.seconds += 100
                    await store.maintain()
                    await trio.sleep(0.002)

            nursery.start_soon(tidy)
            while True:
                number += 1
                commits = [numbered_commit(session_id, number) for session_id in session_ids]
                await trio.lowlevel.checkpoint()
                if number % 2 or not store.commit_nowait(commits):
                    await store.commit(commits)
                sys.stdout.write(f"{number}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
