"""All live sessions of this process, and the life of every socket on them. Implements ``ConnectionGate``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

import trio

from gateway.core.errors import Draining, Forbidden, GatewayError, NotAuthenticated, Overloaded, RateLimited
from gateway.core.flow import Flow
from gateway.core.identity import ANONYMOUS_SUBJECT, Identity
from gateway.core.limits import Limits
from gateway.core.rate_limit import RateLimiter
from gateway.core.session import Session
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.engine.admission import Admissions
from gateway.engine.bulkhead import bulkhead, report_crash
from gateway.engine.client_reader import ClientReader
from gateway.engine.connection import run_connection
from gateway.engine.draining import drain
from gateway.engine.group_commit import GroupCommit
from gateway.engine.heartbeat import Heartbeats
from gateway.engine.housekeeping import keep_house
from gateway.engine.identity_watch import IdentityWatch
from gateway.engine.message_rate import MessageRate
from gateway.engine.multiplexed import Joined, MultiplexedReader
from gateway.engine.relays import Relays
from gateway.engine.remote_connection import RemoteConnection
from gateway.engine.session_ownership import OwnedElsewhere, SessionOwnership
from gateway.engine.session_runner import SessionRunner, TurnStarter
from gateway.engine.session_socket import SessionSocket
from gateway.engine.shared_socket import SessionLane, SharedSocket
from gateway.engine.socket_census import OpenSocket, SocketCensus
from gateway.ports import (
    Admission,
    Authenticator,
    ClientConnection,
    Clock,
    ConnectionClosed,
    ResumePoint,
    SessionStore,
    Telemetry,
    UpgradeRequest,
)


class Hub:
    """Finds, loads, runs and retires sessions."""

    def __init__(
        self,
        *,
        store: SessionStore,
        admissions: Admissions,
        authenticator: Authenticator,
        run_turn: TurnStarter,
        limits: Limits,
        telemetry: Telemetry,
        clock: Clock,
        new_id: Callable[[], str],
        message_rate: RateLimiter,
        randomness: random.Random,
    ) -> None:
        self._store = store
        self._admissions = admissions
        self._authenticator = authenticator
        self._run_turn = run_turn
        self._limits = limits if store.is_durable else limits.of_one_process()
        self._telemetry = telemetry
        self._clock = clock
        self._new_id = new_id
        self._message_rate = message_rate
        self._random = randomness
        self._group_commit = GroupCommit(store, telemetry) if store.is_durable else None
        self._sessions: dict[str, SessionRunner] = {}
        self._loading: dict[str, trio.Event] = {}
        self._ownership = SessionOwnership(
            store.leases, self._sessions, find=self._recover_soon, telemetry=telemetry
        )
        self.sockets = SocketCensus(telemetry)
        self._nursery: trio.Nursery | None = None
        self.draining = False
        self.flow = Flow()
        """What has passed through; published by ``engine/pulse.py``."""
        self._heartbeats = Heartbeats(self._limits, telemetry)
        self._relays: Relays | None = None
        if (leases := store.leases) is not None:
            self._relays = Relays(leases.mail, self.serve, self.flow, self._heartbeats, telemetry)

    @property
    def session_count(self) -> int:
        """Sessions held in memory."""
        return len(self._sessions)

    @property
    def socket_count(self) -> int:
        """Open sockets, those that other nodes hold not among them."""
        return self.sockets.held_here

    @property
    def runners(self) -> Mapping[str, SessionRunner]:
        """The live sessions by id; changes under whoever awaits while reading it."""
        return self._sessions

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run every session until cancelled; first carry on what a crash left unfinished."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._heartbeats.run)
            if self._group_commit is not None:
                nursery.start_soon(self._group_commit.run)
                if self._relays is not None:
                    await nursery.start(self._relays.run)
                await nursery.start(self._ownership.run)
                for session_id in await self._store.unfinished():
                    await self._recover(session_id)
            nursery.start_soon(
                partial(
                    keep_house,
                    self._store,
                    self._sessions,
                    limits=self._limits,
                    telemetry=self._telemetry,
                    clock=self._clock,
                )
            )
            task_status.started()
            await trio.sleep_forever()

    async def _recover(self, session_id: str) -> None:
        """Carry on what a crash left unfinished in a session, unless another node does."""
        try:
            await self._find(session_id)
        except OwnedElsewhere:
            pass
        except GatewayError as error:
            # It is carried on when its client comes; the others must not wait for it.
            self._telemetry.error("session_not_recovered", session_id=session_id, cause=error)

    def _recover_soon(self, session_id: str) -> None:
        assert self._nursery is not None, "Hub.run has not started"
        if not self.draining:
            self._nursery.start_soon(self._recover, session_id)

    async def drain(self) -> None:
        """Stop: close all sockets with 1012, hand over or store what they showed; see ``draining.drain``.

        Returns within ``drain_timeout``; sockets that did not close by then are dropped by the caller's
        cancellation.
        """
        self.draining = True
        await drain(
            self.sockets,
            self._sessions,
            self._ownership,
            self._group_commit,
            limits=self._limits,
            telemetry=self._telemetry,
            randomness=self._random,
        )

    # ------------------------------------------------------------------ ConnectionGate

    async def admit(self, request: UpgradeRequest) -> Admission:
        """Decide about an upgrade. Raises ``GatewayError``."""
        if self.draining:
            raise Draining("This node is restarting. Reconnect.", retry_after=1)
        self._check_room()
        try:
            return await self._admissions.decide(request, check_room_of=self._check_room_of)
        except RateLimited:
            self._telemetry.count("gateway_rate_limited_total", what="upgrades")
            raise
        except (NotAuthenticated, Forbidden) as refusal:
            self._telemetry.count("gateway_auth_refusals_total", code=refusal.code)
            raise

    def _check_room(self) -> None:
        if len(self.sockets) >= self._limits.max_sockets:
            raise Overloaded("The gateway holds as many sockets as it may. Try again later.", retry_after=5)

    def _check_room_of(self, identity: Identity) -> None:
        is_person = not identity.sees_all and identity.subject != ANONYMOUS_SUBJECT
        if is_person and self.sockets.held_by(identity.subject) >= self._limits.max_sockets_per_subject:
            raise RateLimited("You hold as many sockets as you may. Close one first.", retry_after=5)

    async def serve(self, connection: ClientConnection, admission: Admission) -> None:
        """Live one socket's life."""
        started = trio.current_time()
        # What stands when this is cancelled, which only a server that stops does.
        code, reason = int(CloseCode.RESTARTING), "restarting; reconnect"
        # Written out and not ``with bulkhead``: a generator held for the life of a socket is 0.5 KB.
        try:
            try:
                code, reason = await self._serve(connection, admission)
            except GatewayError as error:
                code, reason = error.close_code, error.message
            except ConnectionClosed as closed:
                code, reason = closed.code, closed.reason
        except* Exception as group:
            code, reason = CloseCode.INTERNAL_ERROR, "internal error"
            report_crash(self._telemetry, "connection", group, **admission.log_fields)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._limits.close_timeout + 1):
                await connection.close(code if code >= 1000 and code not in (1005, 1006) else 1000, reason)
            duration = round(trio.current_time() - started, 3)
            if not isinstance(connection, RemoteConnection):  # which is counted where it is held
                self._telemetry.count("gateway_sockets_closed_total", code=str(code))
            self._telemetry.info("socket_closed", code=code, duration_s=duration, **admission.log_fields)

    async def _serve(self, connection: ClientConnection, admission: Admission) -> tuple[int, str]:
        if admission.session_id is None:
            return await self._serve_multiplexed(connection, admission)
        try:
            socket, runner = await self._join(connection, admission, admission.session_id, admission.dialect)
        except OwnedElsewhere as elsewhere:
            return await self._relay(connection, admission, elsewhere.node)
        self.sockets.add(socket, admission)
        try:
            identity = self._watch(admission, socket)
            reader = self._reader(connection, socket, runner, admission, identity)
            return await run_connection(connection, socket, reader, identity, self._heartbeats)
        finally:
            socket.leave()
            self.sockets.remove(socket, admission)

    async def _relay(self, connection: ClientConnection, admission: Admission, node: str) -> tuple[int, str]:
        """Have another node serve a socket of this one."""
        assert self._relays is not None, "without leases every session is here"
        if isinstance(connection, RemoteConnection):
            raise Draining("The session has moved. Reconnect.")
        self._check_room()
        with self._relays.open(connection, admission, node) as socket:
            self.sockets.add(socket, admission)
            try:
                self._telemetry.info("socket_opened", outcome="relayed", **admission.log_fields)
                return await socket.run()
            finally:
                self.sockets.remove(socket, admission)

    async def _serve_multiplexed(self, connection: ClientConnection, admission: Admission) -> tuple[int, str]:
        shared = SharedSocket(connection, admission.dialect, self._limits, self.flow)
        identity = self._watch(admission, shared)
        reader = MultiplexedReader(
            connection,
            shared,
            admission,
            identity=identity,
            join=partial(self._join_lane, identity),
            telemetry=self._telemetry,
            flow=self.flow,
            rate=self._rate(admission, shared),
        )
        self._check_room()
        self._check_room_of(admission.identity)
        self.sockets.add(shared, admission)
        try:
            self._telemetry.info("socket_opened", outcome="multiplexed", **admission.log_fields)
            return await run_connection(connection, shared, reader, identity, self._heartbeats)
        finally:
            self.sockets.remove(shared, admission)

    async def _join_lane(self, identity: IdentityWatch, lane: SessionLane, admission: Admission) -> Joined:
        assert admission.session_id is not None
        await self._admissions.check_owner(admission.session_id, identity.identity)
        try:
            socket, runner = await self._join(lane, admission, admission.session_id, Dialect.V2_JSON)
        except OwnedElsewhere as elsewhere:
            assert self._relays is not None, "without leases every session is here"
            relayed = self._relays.open_lane(lane, admission, identity, elsewhere.node)
            return Joined(relayed, relayed)
        return Joined(socket, self._reader(lane, socket, runner, admission, identity))

    async def _join(
        self, connection: ClientConnection, admission: Admission, session_id: str, dialect: Dialect
    ) -> tuple[SessionSocket, SessionRunner]:
        runner, had_session = await self._find(session_id, admission.resume)
        if self.draining and not isinstance(connection, RemoteConnection):
            # Admitted before, and loaded while the others were told to go. Who waits elsewhere may look on.
            raise Draining("This node is restarting. Reconnect.", retry_after=1)
        if not isinstance(connection, SessionLane):
            self._check_room()  # Many can be admitted before the first of them is counted.
        if not isinstance(connection, SessionLane | RemoteConnection):  # which is its holder's to count
            self._check_room_of(admission.identity)
        socket = SessionSocket(connection, runner, dialect, self._limits)
        outcome = socket.join(admission.resume, had_session=had_session)
        self._telemetry.count("gateway_resumes_total", outcome=outcome)
        self._telemetry.info("socket_opened", outcome=outcome, **admission.log_fields)
        return socket, runner

    def _watch(self, admission: Admission, socket: OpenSocket) -> IdentityWatch:
        return IdentityWatch(admission.identity, socket, authenticator=self._authenticator, clock=self._clock)

    def _reader(
        self,
        connection: ClientConnection,
        socket: SessionSocket,
        runner: SessionRunner,
        admission: Admission,
        identity: IdentityWatch,
    ) -> ClientReader:
        return ClientReader(
            connection,
            socket,
            runner,
            admission,
            identity=identity,
            telemetry=self._telemetry,
            rate=self._rate(admission, socket),
        )

    def _rate(self, admission: Admission, socket: OpenSocket) -> MessageRate:
        return MessageRate(self._message_rate, admission.client_address, socket, self._telemetry)

    # ------------------------------------------------------------------ sessions

    async def _find(self, session_id: str, resume: ResumePoint | None = None) -> tuple[SessionRunner, bool]:
        """The live session, loading or beginning it; and whether it existed before.

        Raises ``Overloaded``, ``StoreUnavailable``, ``OwnedElsewhere``. Nothing awaits between the return and
        the caller's ``join``, so that a session cannot retire in between.
        """
        while True:
            runner = self._sessions.get(session_id)
            if runner is not None and not runner.is_retired:
                if not self._ownership.is_doubted(runner, resume):
                    return runner, True
                await self._ownership.confirm(runner)
                resume = None  # Whatever is found now has all that nodes showed the client before.
            elif (loading := self._loading.get(session_id)) is not None:
                await loading.wait()
            else:
                return await self._load(session_id)

    async def _load(self, session_id: str) -> tuple[SessionRunner, bool]:
        if self.draining:  # What was given away must not come back by another node's letter, or on a lane.
            raise Draining("This node is restarting. Reconnect.", retry_after=1)
        if len(self._sessions) >= self._limits.max_sessions:
            raise Overloaded("The gateway holds as many sessions as it may. Try again later.", retry_after=5)
        assert self._nursery is not None, "Hub.run has not started"
        self._loading[session_id] = loaded = trio.Event()
        try:
            await self._ownership.acquire(session_id)
            stored = await self._store.load(session_id) if self._store.is_durable else None
            if self.draining:  # Since then: what waits in it is the next process's, or another node's.
                self._ownership.retired(session_id)
                raise Draining("This node is restarting. Reconnect.", retry_after=1)
            was_stored = stored is not None and stored.record is not None
            session = Session(
                session_id,
                limits=self._limits,
                new_id=self._new_id,
                stored=stored,
                keeps_commits=self._store.is_durable,
                now=self._clock.now(),
            )
            runner = SessionRunner(
                session,
                limits=self._limits,
                run_turn=self._run_turn,
                group_commit=self._group_commit,
                telemetry=self._telemetry,
                flow=self.flow,
                clock=self._clock,
                # A durable session leaves memory at the end of its grace and comes back from the store.
                linger=self._limits.detach_grace if self._store.is_durable else self._limits.kept_in_memory,
                was_stored=was_stored,
                start_branch=self._start_branch,
                retired=self._forget,
            )
            self._sessions[session_id] = runner
            runner.begin()
        finally:
            del self._loading[session_id]
            loaded.set()
        return runner, was_stored

    def _start_branch(self, runner: SessionRunner) -> None:
        assert self._nursery is not None, "Hub.run has not started"
        self._nursery.start_soon(self._run_session, runner)

    async def _run_session(self, runner: SessionRunner) -> None:
        ended = False
        with bulkhead(self._telemetry, "session", session_id=runner.session_id):
            await runner.run()
            ended = True
        if not ended:
            runner.end_sockets(CloseCode.INTERNAL_ERROR, "the session failed; reconnect")
            runner.retire()

    def _forget(self, runner: SessionRunner) -> None:
        if self._sessions.get(runner.session_id) is runner:
            del self._sessions[runner.session_id]
            self._ownership.retired(runner.session_id)
