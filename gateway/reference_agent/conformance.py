"""Drives any Agent Runtime through the upstream contract and says what it does not meet.

Source: protocol section 3 (stream, errors, resuming), section 2 (fields), section 1 (routes).
"""

from collections.abc import Callable, Iterable

import attrs
import httpx
import trio

from gateway.reference_agent.conformance_checks import CHECKS
from gateway.reference_agent.conformance_client import ContractFaultError, NotApplicableError, Probe

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class AgentUnreachableError(Exception):
    """Nothing answers at the address; the text says what was tried."""


@attrs.frozen
class CheckResult:
    """What one check found. ``detail`` is empty when it passed."""

    name: str
    requirement: str
    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        """One line for a terminal; a second one for what was found."""
        line = f"{self.outcome:<8}{self.name}: {self.requirement}"
        return f"{line}\n        → {self.detail}" if self.detail else line


def ignore_result(result: CheckResult) -> None:
    """Do nothing with a result."""


async def check_agent(
    url: str,
    *,
    key: str | None = None,
    timeout: float = 120.0,
    only: Iterable[str] | None = None,
    on_result: Callable[[CheckResult], None] = ignore_result,
) -> list[CheckResult]:
    """Check the Agent Runtime at ``url`` and return what was found, each check in a session of its own.

    ``key`` is sent as ``X-Internal-Auth``; ``timeout`` bounds each answer, in seconds; ``only`` names checks
    to be made instead of all; ``on_result`` hears of each as it is made. Raises `AgentUnreachableError` when
    nothing answers and `ValueError` for a name or URL that is none. May be cancelled at any time.
    """
    chosen = dict(CHECKS)
    if only is not None:
        names = list(only)
        unknown = [name for name in names if name not in chosen]
        if unknown:
            raise ValueError(f"There is no check {', '.join(unknown)}. There are: {', '.join(chosen)}.")
        chosen = {name: chosen[name] for name in names}
    results: list[CheckResult] = []
    async with httpx.AsyncClient(
        base_url=_base(url),
        timeout=httpx.Timeout(timeout, connect=10.0),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    ) as http:
        await _reach(http, url)
        for name, check in chosen.items():
            requirement = " ".join((check.__doc__ or "").split())
            outcome, detail = PASSED, ""
            try:
                with trio.fail_after(10 * timeout):
                    await check(Probe(http, key, timeout=timeout))
            except ContractFaultError as exc:
                outcome, detail = FAILED, str(exc)
            except NotApplicableError as exc:
                outcome, detail = SKIPPED, str(exc)
            except (httpx.HTTPError, trio.TooSlowError) as exc:
                outcome, detail = FAILED, f"No usable answer: {exc!r}"
            except Exception as exc:  # an answer nobody thought of must not end the other checks
                outcome, detail = FAILED, f"The answer cannot be understood: {exc!r}"
            result = CheckResult(name, requirement, outcome, detail)
            results.append(result)
            on_result(result)
    return results


def summarize(results: Iterable[CheckResult]) -> str:
    """One line: how many passed, failed and were skipped."""
    outcomes = [result.outcome for result in results]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (PASSED, FAILED, SKIPPED))


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise ValueError(f"{url!r} is not a URL: {exc}.") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} must begin with http:// or https:// and name a host.")
    return url.rstrip("/")


async def _reach(http: httpx.AsyncClient, url: str) -> None:
    try:
        await http.get("/agents")
    except httpx.TransportError as exc:
        raise AgentUnreachableError(f"Nothing answers at {url}: {exc!r}. Is it running there?") from exc
