"""The composition root: reads the settings once, wires everything by constructor, owns the root nursery.

    root nursery
    ├── hub                    every session, its turns, the group commit
    ├── JWKS refresher         with USE_JWT_AUTH
    ├── pulse                  event-loop lag, totals for the metrics
    ├── front door             one port: trio-websocket for sockets, hypercorn + Quart for REST
    ├── metrics listener       with METRICS_BIND
    └── shutdown watcher       SIGTERM, SIGINT → drain

A crash in a connection or a session is contained in its branch. A crash here ends the process with a
non-zero status: a gateway whose hub is gone must not go on answering 200.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio
from attrs import frozen
from hypercorn.config import Config
from quart_trio import QuartTrio

from gateway.adapters.auth import InternalKeyAuthenticator, TokenAuthenticator
from gateway.adapters.front_door import FrontDoor, FrontDoorLimits
from gateway.adapters.jwks import JwksCache, JwksTiming, jwks_http_client
from gateway.adapters.listeners import listen_on, open_listeners
from gateway.adapters.metrics_listener import MetricsListener
from gateway.adapters.readiness import HAS_EPOLL, Readiness
from gateway.adapters.rest import agent_client as rest_client
from gateway.adapters.rest import create_app
from gateway.adapters.sse_agent import SseAgentRuntime, agent_client
from gateway.adapters.stores.open import open_session_store
from gateway.adapters.streaming_transport import StreamingTransport
from gateway.adapters.telemetry import StructlogTelemetry
from gateway.adapters.traces import open_traces
from gateway.adapters.websocket import WebSocketSettings
from gateway.config import Configuration
from gateway.config_values import is_loopback_bind
from gateway.core.errors import Draining
from gateway.core.jwt_rules import TokenRules
from gateway.core.metrics import METRICS, Metric
from gateway.core.rate_limit import RateLimiter
from gateway.core.worker_metrics import merge_pages
from gateway.engine.admission import AdmissionRules, Admissions
from gateway.engine.hub import Hub
from gateway.engine.overview import HubOverview
from gateway.engine.pulse import Pulse
from gateway.engine.turn import TurnRunner
from gateway.engine_limits import limits_of
from gateway.node_ports import ASK_METRICS, Siblings
from gateway.ports import Authenticator, Clock
from gateway.settings import Settings

METRICS_BACKLOG = 64
"""Scrapers that wait to be accepted."""


class SystemClock(Clock):
    """The machine's wall clock."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()


@frozen
class Gateway:
    """Everything wired, not serving yet."""

    configuration: Configuration
    telemetry: StructlogTelemetry
    hub: Hub
    pulse: Pulse
    rest: QuartTrio
    jwks: JwksCache | None
    render_metrics: Callable[[], Awaitable[bytes]]
    origins: set[str]
    """Browser origins whose sockets are let in; ``serve`` adds this gateway's own for the playground."""
    readiness: Readiness
    """Of the agents' streams and the sockets together: one wake-up for all that can be read."""


@frozen
class Seat:
    """What a process of ``gateway serve --workers`` is given by its supervisor."""

    siblings: Siblings
    sockets: Sequence[socket.socket]
    """Bound to the addresses of ``BIND``; instead of sockets of its own."""
    metrics_sockets: Sequence[socket.socket]
    """… and to those of ``METRICS_BIND``."""


def make_telemetry(
    settings: Settings, *, worker: int | None = None, metrics: Sequence[Metric] = METRICS
) -> StructlogTelemetry:
    """Logs to standard error, so that a command's own output stays clean.

    With ``worker`` every line says which of several processes wrote it.
    """
    return StructlogTelemetry(
        sys.stderr,
        log_level=settings.log_level,
        log_format=settings.log_format,
        secrets=[settings.internal_api_key],
        bound={} if worker is None else {"worker": worker},
        metrics=metrics,
    )


@asynccontextmanager
async def open_gateway(
    configuration: Configuration, telemetry: StructlogTelemetry, siblings: Siblings | None = None
) -> AsyncIterator[Gateway]:
    """Wire a gateway. Raises ``StoreUnavailable`` when its store cannot be opened.

    Its metrics are those of its ``siblings`` too.

    Resource handling: the store and the HTTP clients are open inside the block; whoever runs the hub does
    so inside it and has ended it before leaving.
    """
    settings = configuration.settings
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        # First, for what is entered first is left last: the spans of everything else's end go out, too.
        tracing = await stack.enter_async_context(open_traces(settings, telemetry))
        store = await stack.enter_async_context(
            open_session_store(
                settings.store_url,
                full_sync=settings.store_sync == "full",
                dedupe_window=settings.dedupe_window,
                clock=clock,
                telemetry=telemetry,
                retention=settings.replay_retention,
                node_lease=settings.node_lease,
            )
        )
        if store.leases is not None:
            telemetry.info(
                "several_nodes",
                node=store.leases.node,
                lease_seconds=settings.node_lease,
            )
        readiness = Readiness()
        send_to_agent = await stack.enter_async_context(
            agent_client(settings.agent_url, StreamingTransport(readiness=readiness))
        )
        authenticator, jwks = await _make_authenticator(configuration, telemetry, clock, stack)
        limits = limits_of(settings)
        origins = set(settings.allowed_origins)
        admissions = Admissions(
            rules=AdmissionRules(
                allowed_origins=origins,
                trusted_proxies=settings.trusted_proxies,
                sessions_are_owned=settings.use_jwt_auth,
            ),
            authenticator=authenticator,
            store=store,
            upgrade_rate=RateLimiter(settings.rate_upgrades_per_minute),
            clock=clock,
            fresh_bytes=os.urandom,
        )
        agent = SseAgentRuntime(
            send=send_to_agent,
            agent_url=settings.agent_url,
            internal_key=settings.internal_api_key,
            connect_timeout=settings.agent_connect_timeout,
            stream_timeout=settings.agent_stream_timeout,
            max_event_bytes=settings.max_event_bytes,
            telemetry=telemetry,
        )
        run_turn = TurnRunner(
            agent, limits=limits, telemetry=telemetry, randomness=random.Random(), tracing=tracing
        )
        hub = Hub(
            store=store,
            admissions=admissions,
            authenticator=authenticator,
            run_turn=run_turn,
            limits=limits,
            telemetry=telemetry,
            clock=clock,
            new_id=lambda: secrets.token_urlsafe(12),
            message_rate=RateLimiter(settings.rate_messages_per_minute),
            randomness=random.Random(),
        )

        pulse = Pulse(hub, run_turn, telemetry, clock, settings.version)

        def render_own_metrics() -> bytes:
            pulse.publish()
            return telemetry.render()

        async def render_metrics() -> bytes:
            if siblings is None:
                return render_own_metrics()
            pages = await siblings.ask(ASK_METRICS)
            return merge_pages({str(siblings.number): render_own_metrics(), **pages})

        if siblings is not None:
            siblings.answer(ASK_METRICS, lambda _: render_own_metrics())

        async def check_ready() -> None:
            if hub.draining:
                raise Draining("This node is restarting.", retry_after=1)
            await store.check()

        rest = create_app(
            settings,
            authenticator=authenticator,
            store=store,
            telemetry=telemetry,
            clock=clock,
            agent=await stack.enter_async_context(rest_client(settings.agent_url)),
            render_metrics=render_metrics,
            check_ready=check_ready,
            overview=HubOverview(hub, pulse),
            tracing=tracing,
            journal=telemetry,
            siblings=siblings,
        )
        yield Gateway(
            configuration=configuration,
            telemetry=telemetry,
            hub=hub,
            pulse=pulse,
            rest=rest,
            jwks=jwks,
            render_metrics=render_metrics,
            origins=origins,
            readiness=readiness,
        )


async def serve(
    configuration: Configuration,
    *,
    announce: Callable[[Sequence[str]], None],
    task_status: trio.TaskStatus[Sequence[str]] = trio.TASK_STATUS_IGNORED,
    stop: trio.Event | None = None,
    seat: Seat | None = None,
    telemetry: StructlogTelemetry | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (or ``stop``), then drain. Started with the URLs it listens on.

    Raises ``StoreUnavailable``, and ``OSError`` when an address cannot be bound. A crash above the
    bulkheads leaves as an exception. In a ``seat`` among others it listens on the sockets that it has there.
    """
    telemetry = make_telemetry(configuration.settings) if telemetry is None else telemetry
    siblings = None if seat is None else seat.siblings
    with telemetry.route_standard_logging():
        async with open_gateway(configuration, telemetry, siblings) as gateway:
            backlog = int(configuration.hypercorn.get("backlog", 4096))
            if seat is None:
                listeners = await open_listeners(configuration.binds, backlog=backlog)
            else:
                listeners = listen_on(seat.sockets, backlog=backlog)
            front_door = _front_door(gateway)
            async with trio.open_nursery() as root:
                await root.start(serve_metrics, gateway, seat)
                if gateway.jwks is not None:
                    await root.start(gateway.jwks.run)
                await root.start(gateway.hub.run)
                root.start_soon(gateway.pulse.run)
                serving = trio.Event()

                async def serve_front_door() -> None:
                    await front_door.serve(listeners)
                    serving.set()

                root.start_soon(serve_front_door)
                urls = [_url(listener.socket.getsockname()) for listener in listeners]
                if configuration.settings.playground:
                    gateway.origins.update(own_origins(urls))
                telemetry.info("listening", urls=urls, version=configuration.settings.version)
                announce(urls)
                task_status.started(urls)
                await _wait_for_stop(stop)
                front_door.stop_accepting()
                await gateway.hub.drain()
                with trio.move_on_after(configuration.settings.drain_timeout):
                    await serving.wait()
                root.cancel_scope.cancel()
            telemetry.info("stopped")


async def serve_metrics(
    gateway: Gateway,
    seat: Seat | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``/metrics`` where ``METRICS_BIND`` says, until cancelled; nothing to do where it is empty.

    Raises ``OSError`` when an address cannot be bound.
    """
    binds = gateway.configuration.settings.metrics_bind
    if not binds:
        task_status.started()
        return
    if seat is None:
        listeners = await open_listeners(binds, backlog=METRICS_BACKLOG)
    else:
        listeners = listen_on(seat.metrics_sockets, backlog=METRICS_BACKLOG)
    urls = [_url(listener.socket.getsockname()) for listener in listeners]
    gateway.telemetry.info("metrics_listening", urls=urls)
    if not all(is_loopback_bind(bind) for bind in binds):
        gateway.telemetry.warning("metrics_open_to_other_machines", urls=urls)
    await MetricsListener(gateway.render_metrics, gateway.telemetry).serve(listeners, task_status=task_status)


def own_origins(urls: Sequence[str]) -> set[str]:
    """The origins of this gateway's pages as browsers on this machine write them.

    Only names that nobody else can have: a page of another host name could be led here by its DNS. A gateway
    with a name of its own has that in ``ALLOWED_ORIGINS``.
    """
    ports = {url.rpartition(":")[2] for url in urls if url.startswith("http://")}
    return {f"http://{host}:{port}" for port in ports for host in ("127.0.0.1", "localhost", "[::1]")}


async def _make_authenticator(
    configuration: Configuration, telemetry: StructlogTelemetry, clock: Clock, stack: AsyncExitStack
) -> tuple[Authenticator, JwksCache | None]:
    settings = configuration.settings
    if not settings.use_jwt_auth:
        anonymous = configuration.anonymous_sockets
        return InternalKeyAuthenticator(
            settings.internal_api_key, telemetry, anonymous_sockets=anonymous
        ), None
    algorithms = frozenset(settings.jwt_algorithms)
    http = await stack.enter_async_context(jwks_http_client())
    jwks = JwksCache(
        http,
        settings.auth_service_url.rstrip("/") + "/.well-known/jwks.json",
        telemetry,
        algorithms=algorithms,
        timing=JwksTiming(lifetime=settings.jwks_cache_lifetime),
    )
    rules = TokenRules(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        algorithms=algorithms,
        leeway=settings.jwt_leeway,
    )
    return TokenAuthenticator(settings.internal_api_key, jwks, rules, clock, telemetry), jwks


def _front_door(gateway: Gateway) -> FrontDoor:
    settings = gateway.configuration.settings
    config = Config.from_mapping(dict(gateway.configuration.hypercorn))
    # A logger of ours, or hypercorn installs a handler of its own beside the gateway's log.
    config.errorlog = logging.getLogger("hypercorn.error")
    return FrontDoor(
        gateway.hub,
        gateway.telemetry,
        gateway.rest,
        config,
        FrontDoorLimits(rest_grace=settings.drain_timeout),
        WebSocketSettings(
            max_message_size=settings.max_message_bytes,
            close_timeout=settings.ws_close_timeout,
            compresses=settings.ws_compression == "on",
        ),
        gateway.readiness if HAS_EPOLL else None,
    )


async def _wait_for_stop(stop: trio.Event | None) -> None:
    if stop is not None:
        await stop.wait()
        return
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return


def _url(address: object) -> str:
    if isinstance(address, tuple):
        host, port = address[0], address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return f"unix:{address!s}"
