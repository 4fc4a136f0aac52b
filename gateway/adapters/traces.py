"""Traces where they are on, and nothing of them where they are off."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

from gateway.ports import Telemetry
from gateway.settings import Settings
from gateway.trace_ports import Tracing


def open_traces(
    settings: Settings, telemetry: Telemetry
) -> AbstractAsyncContextManager[Tracing | None, bool | None]:
    """What ``TRACES`` asks for, while the block lasts; None for ``off``.

    Raises ``ImportError`` where the packages are missing, which ``load_configuration`` has looked for before.
    """
    if settings.traces == "off":
        return nullcontext()
    # Imported here: who does not use the packages needs to have none of them, nor to wait for them.
    from gateway.adapters.opentelemetry_traces import open_tracing

    return open_tracing(settings.version, telemetry, secrets=[settings.internal_api_key])
