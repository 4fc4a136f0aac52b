"""The LLM spool as a process: what it survives, when it ends, and what it never shows."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.reference_agent.llm_spool_link import open_spool_link
from gateway.reference_agent.settings import LLM_KEY_VARIABLE, AgentSettings

from .conftest import AgentClient, RunAgent
from .kill_runtime import Campaign
from .openai_server import COUNTED, OpenAiServer, run_openai_server
from .runtime_process import ResumingClient, runtime_process, spool_pid, text_of, wait_spool_ended

COUNT: dict[str, Any] = {"type": "user_message", "content": "count"}


def options(db: Path, llm_url: str, *more: str) -> tuple[str, ...]:
    """A runtime on a database and an LLM."""
    return ("--bind", "127.0.0.1:0", "--db", str(db), "--llm", "openai", "--llm-url", llm_url, *more)


def files_of(folder: Path) -> dict[str, int]:
    """The permissions of what is there."""
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir()}


def process_files(pid: int | None, *names: str) -> list[bytes]:
    """What the kernel shows of a process."""
    return [Path(f"/proc/{pid}/{name}").read_bytes() for name in names]


def assert_nowhere(secret: bytes, folder: Path) -> None:
    """No file holds it."""
    for path in folder.iterdir():
        assert secret not in path.read_bytes(), path.name


async def begin(url: str) -> None:
    """Start an answer and leave in the middle of it."""
    async with AgentClient.at(url) as client:
        await client.read_until("count", b'"7 "', Idempotency_Key="k")


async def test_it_ends_with_a_runtime_that_is_stopped(run_agent: RunAgent, short_folder: Path) -> None:
    """And takes its socket along; while the runtime is there it stays, ready for the next question."""
    db = short_folder / "agent.db"
    async with (
        run_openai_server(OpenAiServer()) as llm_url,
        run_agent(llm="openai", llm_url=llm_url, db=str(db)) as client,
    ):
        first = await client.post(COUNT, Idempotency_Key="k1")
        pid = spool_pid(db)
        second = await client.post(COUNT, Idempotency_Key="k2")
        assert pid is not None
        assert os.getsid(pid) == pid, "a signal to the runtime's group would end it too"
        assert spool_pid(db) == pid
    await wait_spool_ended(db, 5)
    assert first.text == second.text == "".join(COUNTED)
    assert files_of(short_folder).keys() == {"agent.db", "agent.db.llm.lock"}


async def test_it_ends_in_time_when_the_runtime_was_killed_for_good(short_folder: Path) -> None:
    """And stops the LLM, which nobody will hear."""
    db = short_folder / "agent.db"
    llm = OpenAiServer(delay=0.2)
    async with run_openai_server(llm) as llm_url:
        async with runtime_process(*options(db, llm_url, "--llm-keep", "1")) as (url, process):
            await begin(url)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            killed_at = trio.current_time()
            assert spool_pid(db) is not None
        await wait_spool_ended(db, 6)
        assert trio.current_time() - killed_at > 0.9
        with trio.fail_after(1):
            while not llm.given_up:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)


async def test_an_answer_in_flight_is_carried_on_by_the_next_start(
    run_agent: RunAgent, short_folder: Path
) -> None:
    """After an orderly stop as after a kill: the LLM has been asked once."""
    db = short_folder / "agent.db"
    llm = OpenAiServer(delay=0.02)
    async with run_openai_server(llm) as llm_url:
        settings = {"llm": "openai", "llm_url": llm_url, "db": str(db)}
        async with run_agent(**settings) as client:
            await client.read_until("count", b'"7 "', Idempotency_Key="k")
        async with run_agent(**settings) as client:
            whole = await client.post(COUNT, Idempotency_Key="k")
            metrics = (await client.get("/events/metrics/session/s1"))["metrics"]
        await wait_spool_ended(db, 5)
    assert whole.text == "".join(COUNTED)
    assert (llm.asked, llm.given_up) == (["count orchestrator 0"], 0)
    assert metrics["llm_requests"] == 1


async def test_stop_generating_stops_the_llm(run_agent: RunAgent, short_folder: Path) -> None:
    """As soon as the runtime knows that it is no cut: here by the user's next message."""
    llm = OpenAiServer(delay=0.05)
    async with (
        run_openai_server(llm) as llm_url,
        run_agent(llm="openai", llm_url=llm_url, db=str(short_folder / "agent.db")) as client,
    ):
        await client.read_until("count", b'"7 "', Idempotency_Key="k")
        await client.post({"type": "user_message", "content": "x", "role": "system"}, Idempotency_Key="next")
        with trio.fail_after(2):
            while not llm.given_up:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)
    assert len(llm.asked) == 1


async def test_when_it_is_killed_the_llm_is_asked_again_with_the_text_so_far(
    run_agent: RunAgent, short_folder: Path
) -> None:
    """Nothing is lost or repeated, only paid for twice."""
    db = short_folder / "agent.db"
    llm = OpenAiServer(delay=0.02)
    async with (
        run_openai_server(llm) as llm_url,
        run_agent(llm="openai", llm_url=llm_url, db=str(db)) as client,
        trio.open_nursery() as nursery,
    ):
        url = str(client.http.base_url)
        texts: list[str] = []

        async def listen() -> None:
            texts.append(text_of(await ResumingClient(url.rstrip("/")).post(COUNT, "k")))

        nursery.start_soon(listen)
        with trio.fail_after(5):
            while not llm.asked:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)
        await trio.sleep(0.2)
        pid = spool_pid(db)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(10):
            while not texts:  # noqa: ASYNC110 - ends with the nursery otherwise
                await trio.sleep(0.01)
        assert spool_pid(db) not in (None, pid)
    assert texts == ["".join(COUNTED)]
    assert len(llm.asked) == 2


async def test_the_key_is_in_no_argument_file_or_log(short_folder: Path) -> None:
    """It is in the environment of the processes that need it; socket and lock are their user's alone."""
    db = short_folder / "agent.db"
    key = "planted-key-7f3a"
    errors = short_folder / "stderr"
    llm = OpenAiServer()
    with errors.open("wb") as stderr:
        async with run_openai_server(llm) as llm_url:
            environment = {LLM_KEY_VARIABLE: key, "GATEWAY__INTERNAL_API_KEY": "planted-internal-key"}
            async with runtime_process(
                *options(db, llm_url), environment=environment, stderr=stderr.fileno()
            ) as (url, process):
                async with AgentClient.at(url, **{"X-Internal-Auth": "planted-internal-key"}) as client:
                    assert (await client.post(COUNT, Idempotency_Key="k")).text == "".join(COUNTED)
                pid = spool_pid(db)
                arguments, inherited = process_files(pid, "cmdline", "environ")
                modes = files_of(short_folder)
                process.terminate()
                await process.wait()
    await wait_spool_ended(db, 5)
    assert b"llm_spool_process" in arguments
    assert key.encode() not in arguments
    assert key.encode() in inherited
    assert b"planted-internal-key" not in inherited
    assert modes["agent.db.llm.sock"] == modes["agent.db.llm.lock"] == 0o600
    assert_nowhere(b"planted", short_folder)


async def test_it_holds_nothing_of_a_runtime_that_was_killed(short_folder: Path) -> None:
    """Whoever reads the runtime's output sees its end, and need not wait for the spool's."""
    db = short_folder / "agent.db"
    async with run_openai_server(OpenAiServer()) as llm_url:
        async with runtime_process(*options(db, llm_url, "--llm-keep", "2"), stderr=subprocess.PIPE) as (
            url,
            process,
        ):
            async with AgentClient.at(url) as client:
                await client.post(COUNT, Idempotency_Key="k")
            assert process.stderr is not None
            process.send_signal(signal.SIGKILL)
            with trio.fail_after(1):
                while await process.stderr.receive_some():
                    pass
            assert spool_pid(db) is not None
            await process.stderr.aclose()
        await wait_spool_ended(db, 5)


async def test_a_second_process_for_the_same_database_leaves_at_once(
    run_agent: RunAgent, short_folder: Path
) -> None:
    """Whoever started it finds the first."""
    db = short_folder / "agent.db"
    async with (
        run_openai_server(OpenAiServer()) as llm_url,
        run_agent(llm="openai", llm_url=llm_url, db=str(db)) as client,
    ):
        await client.post(COUNT, Idempotency_Key="k")
        pid = spool_pid(db)
        program = [sys.executable, "-m", "gateway.reference_agent.llm_spool_process"]
        with trio.fail_after(10):
            await trio.run_process([*program, "--db", str(db), "--llm-url", llm_url, "--keep", "60"])
        assert spool_pid(db) == pid
        assert "agent.db.llm.sock" in files_of(short_folder)


@pytest.mark.parametrize("db", [":memory:", ""])
async def test_a_database_that_is_no_file_has_no_spool(db: str) -> None:
    """Nothing of it outlives the process anyway."""
    async with open_spool_link(db, AgentSettings()) as link:
        assert link is None


# httpx leaves the generator of a request's body to the garbage collector when the connection breaks under it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_kills_and_cuts_at_random_points_ask_the_llm_once_per_step(short_folder: Path) -> None:
    """See `kill_runtime`, which does more of it; no process is left."""
    with trio.fail_after(90):
        outcome = await Campaign(8, short_folder).run(kills=6, cuts=10)
    assert len(outcome.spools) == 1
    assert outcome.broken_streams > 3
    assert spool_pid(short_folder / "agent.sqlite3") is None
