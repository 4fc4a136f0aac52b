"""All settings: name, type, default and meaning, in one frozen class."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import environ

import gateway
from gateway.config_values import (
    Network,
    binds,
    boolean,
    choice,
    header_secret,
    http_url,
    networks,
    origins,
    seconds,
    size,
    store_url,
    text,
    whole,
    words,
)

PREFIX = "GATEWAY__"
DEFAULT_INTERNAL_API_KEY = "change-me-internal-key"

_var: Any = environ.var
"""``environ.var``, which is typed for values and not for the text that defaults are written in here."""


@attrs.frozen(kw_only=True, repr=False)
class Settings:
    """The settings in force; the environment variable of ``agent_url`` is ``GATEWAY__AGENT_URL``.

    Times are in seconds and sizes in bytes. Constructing it checks each value (``ValueError``); how values
    relate to each other and to the binds is checked by ``gateway.config.load_configuration``. Defaults are
    written the way a person would write them in ``.env``.
    """

    _prefix: ClassVar[str] = PREFIX.removesuffix("_")  # environ-config joins with one more underscore

    # ---- identity
    internal_api_key: str = _var(
        DEFAULT_INTERNAL_API_KEY,
        header_secret,
        help="Key of services: expected in X-Internal-Auth, and sent to the Agent Runtime.",
    )
    use_jwt_auth: bool = _var("false", boolean, help="Whether callers prove who they are with a JWT.")
    auth_service_url: str = _var(
        "http://localhost:8003", http_url, help="The Auth Service; its keys are under /.well-known/jwks.json."
    )
    jwt_issuer: str = _var("https://auth.codelab.local", text, help="The iss that a token must carry.")
    jwt_audience: str = _var("codelab-api", text, help="The aud that a token must carry.")
    jwt_algorithms: tuple[str, ...] = _var(
        "RS256",
        words("RS256", "ES256", "EdDSA"),
        help="Signature algorithms that are accepted, separated by commas: RS256, ES256, EdDSA.",
    )
    jwt_leeway: float = _var("30", seconds(0, 300), help="Clock difference allowed in exp, nbf and iat.")
    jwks_cache_lifetime: float = _var(
        "300",
        seconds(60, 86_400),
        help="How long signing keys are used before they are fetched anew; a revoked one works no longer.",
    )
    allow_anonymous_ws: bool = _var(
        "false",
        boolean,
        help="Without JWT: let sockets in without the key although other machines can reach the port.",
    )

    # ---- who may connect from where
    allowed_origins: tuple[str, ...] = _var(
        "", origins, help="Browser origins that may connect and call, separated by commas. Empty: none."
    )
    trusted_proxies: tuple[Network, ...] = _var(
        "",
        networks,
        help="Addresses or networks whose Forwarded and X-Forwarded-For are believed, separated by commas.",
    )

    # ---- Agent Runtime
    agent_url: str = _var("http://localhost:8001", http_url, help="The Agent Runtime.")
    agent_connect_timeout: float = _var(
        "5", seconds(), help="How long connecting to the Agent Runtime may take."
    )
    agent_stream_timeout: float = _var(
        "60", seconds(), help="How long a running turn's stream may be silent before it counts as dead."
    )
    request_timeout: float = _var(
        "30", seconds(), help="How long the Agent Runtime may take to answer a REST call."
    )
    max_concurrent_requests: int = _var(
        "100",
        whole(1),
        help="Turns, and separately REST calls, open at the Agent Runtime at once.",
    )
    queue_timeout: float = _var(
        "30",
        seconds(),
        help="How long a turn may wait for such a place before it fails as OVERLOADED.",
    )

    # ---- sockets
    ws_heartbeat_interval: float = _var("20", seconds(), help="Time between pings.")
    ws_pong_timeout: float = _var(
        "10", seconds(), help="How long a pong may take before the peer counts as dead (close code 4408)."
    )
    ws_close_timeout: float = _var("5", seconds(), help="How long to wait for the peer's close frame.")
    ws_send_timeout: float = _var(
        "10", seconds(), help="How long a socket may make no progress before it is closed as too slow (4413)."
    )
    ws_compression: str = _var("off", choice("off", "on"), help="permessage-deflate on sockets: off or on.")
    ws_merge_bytes: int = _var(
        "64KiB", size(1), help="Unacknowledged bytes per socket from which waiting tokens are merged."
    )
    ws_unacked_bytes: int = _var(
        "768KiB", size(1), help="Unacknowledged bytes per socket from which the upstream is read no faster."
    )
    max_sockets: int = _var("20000", whole(1), help="Open sockets; more are told to come back later (1013).")
    max_sockets_per_subject: int = _var("50", whole(1), help="Open sockets of one subject.")

    # ---- messages and sessions
    max_sessions: int = _var("20000", whole(1), help="Sessions held in memory.")
    max_queued_messages: int = _var("64", whole(1), help="Messages that may wait in one session.")
    max_message_bytes: int = _var("1MiB", size(1024), help="Size of one client message or REST body.")
    max_event_bytes: int = _var("8MiB", size(1024), help="Size of one event of the Agent Runtime.")
    detach_grace: float = _var(
        "120", seconds(0), help="How long a turn goes on without any socket before it is cancelled."
    )

    # ---- replay and store
    replay_retention: float = _var(
        "600", seconds(0), help="How long events are kept for clients that come back."
    )
    replay_events: int = _var("10000", whole(1), help="Events kept per session.")
    replay_bytes: int = _var("64MiB", size(1024), help="Bytes of events kept per session.")
    replay_total_bytes: int = _var("1GiB", size(1024), help="Bytes of events kept in memory by all sessions.")
    dedupe_window: float = _var(
        "86400", seconds(1), help="How long a repeated message id is recognised as the same message."
    )
    store_url: str = _var(
        "sqlite:///gateway.sqlite3",
        store_url,
        help="Where sessions are kept: memory://, sqlite:///FILE, or for several nodes redis://HOST:PORT/N, "
        "redis+sentinel://HOST:PORT,…/SERVICE or redis+cluster://HOST:PORT,… (rediss for TLS).",
    )
    store_sync: str = _var(
        "normal",
        choice("normal", "full"),
        help="What a SQLite store survives: normal: a crash of the process; full: power loss too, slower. "
        "With Redis: whether commits wait for its disk.",
    )
    node_lease: float = _var(
        "4",
        seconds(0.5),
        help="With Redis: how long a node must be silent until others take its sessions over.",
    )

    # ---- rate limits; the defaults stop a flood and are far above what an IDE, or an office of them, does
    rate_upgrades_per_minute: int = _var(
        "12000",
        whole(0, 10**9),
        help="Socket upgrades a minute, per subject and per address. 0: no limit.",
    )
    rate_messages_per_minute: int = _var(
        "60000",
        whole(0, 10**9),
        help="Client messages a minute, per subject and per address. 0: no limit.",
    )
    rate_rest_per_minute: int = _var(
        "12000", whole(0, 10**9), help="REST calls a minute, per subject and per address. 0: no limit."
    )

    # ---- the process
    bind: tuple[str, ...] = _var(
        "",
        binds,
        help="Addresses to listen on, separated by commas. Empty: see hypercorn.toml, else 127.0.0.1:8000.",
    )
    hypercorn_config: str = _var(
        "hypercorn.toml", text, help="The hypercorn.toml to use; the default one may be missing."
    )
    workers: int = _var(
        "1",
        whole(1, 64),
        help="Processes of gateway serve on this machine that share its port; more than 1 only with Redis. "
        "Limits count for each.",
    )
    drain_timeout: float = _var(
        "10", seconds(0), help="How long a stop may take to hand over sockets and finish requests."
    )
    metrics_public: bool = _var("false", boolean, help="Whether /metrics needs no key on the main port.")
    metrics_bind: tuple[str, ...] = _var(
        "",
        binds,
        help="Further addresses, separated by commas, that serve only /metrics, and to everybody who can "
        "connect. Empty: none.",
    )
    traces: str = _var(
        "off",
        choice("off", "otlp"),
        help="Spans of turns and REST calls: off, or otlp, which needs the extra otel; where they go is said "
        "by OTEL_EXPORTER_OTLP_ENDPOINT.",
    )
    playground: bool = _var(
        "false",
        boolean,
        help="Whether /playground is there: a page to talk to the agent, for trying things out.",
    )
    log_level: str = _var(
        "INFO",
        choice("DEBUG", "INFO", "WARNING", "ERROR"),
        help="The least important lines to log: DEBUG, INFO, WARNING or ERROR.",
    )
    log_format: str = _var(
        "json", choice("json", "console"), help="json: one object per line; console: for people."
    )
    version: str = _var(gateway.__version__, text, help="The version that /health reports.")

    def __repr__(self) -> str:
        shown = (
            f"{field.name}={'********' if field.name in SECRETS else repr(getattr(self, field.name))}"
            for field in attrs.fields(Settings)
        )
        return f"Settings({', '.join(shown)})"


SECRETS = frozenset({"internal_api_key", "store_url"})
"""Settings that may be read from a file (``GATEWAY__…_FILE``) and are shown masked."""
