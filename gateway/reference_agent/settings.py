"""What a reference Agent Runtime is told when it starts."""

from typing import Literal

import attrs

LLM_KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that carries the LLM's key, here and to the LLM spool."""


@attrs.frozen
class AgentSettings:
    """The settings of one reference Agent Runtime; all durations in seconds."""

    bind: str = "127.0.0.1:8001"
    """``HOST:PORT`` to listen on (an IPv6 host in brackets); port 0 takes a free one."""

    internal_key: str | None = attrs.field(default=None, repr=False)
    """When set, every request but ``GET /health`` must carry it as ``X-Internal-Auth``."""

    token_delay: float = attrs.field(default=0.02, validator=attrs.validators.ge(0))
    """Pause of the scripted brain before each token, so that a person sees it stream."""

    llm: Literal["scripted", "openai"] = attrs.field(
        default="scripted", validator=attrs.validators.in_(("scripted", "openai"))
    )
    """Which brain answers."""

    llm_url: str = "http://127.0.0.1:4000"
    """Base URL of an OpenAI-compatible API; ``/v1/chat/completions`` is added unless it is there."""

    model: str = "gpt-4o-mini"
    """The model asked for."""

    llm_key: str | None = attrs.field(default=None, repr=False)
    """Sent to the LLM as a bearer token when set."""

    llm_keep: float = attrs.field(default=120.0, validator=attrs.validators.ge(0))
    """How long the LLM spool of ``db`` keeps an answer that nobody asks for; 0 does without a spool."""

    history_tokens: int = attrs.field(default=24_000, validator=attrs.validators.ge(256))
    """Bound on the history given to the LLM at each step, by the estimate of ``history.py``."""

    db: str | None = None
    """SQLite file that keeps all state; ``None`` keeps it in memory until the process ends."""

    approvals: str | None = None
    """TOML file with the approval policy; ``None`` is the built-in policy."""

    heartbeat_interval: float = attrs.field(default=15.0, validator=attrs.validators.gt(0))
    """Silence on a stream after which a comment is sent."""

    resume_grace: float = attrs.field(default=10.0, validator=attrs.validators.ge(0))
    """How long work asked for with an ``Idempotency-Key`` waits, paused, for a listener to come back."""

    busy_patience: float = attrs.field(default=5.0, validator=attrs.validators.ge(0))
    """How long a new request waits for the session's running one before ``SESSION_BUSY``."""

    max_body_bytes: int = attrs.field(default=8 * 1024 * 1024, validator=attrs.validators.gt(0))
    """Largest request body accepted."""
