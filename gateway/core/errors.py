"""Every failure that a client, an operator or a script can meet, as one tree.

    GatewayError
    ├── InvalidMessage          INVALID_MESSAGE          the client sent something that is not a message
    │   ├── MessageTooLarge     MESSAGE_TOO_LARGE        … over the size limit
    │   └── QueueFull           QUEUE_FULL               … more than the session may queue
    ├── HandshakeRefused        HANDSHAKE_REFUSED        the upgrade or the request line is malformed
    │   └── NotFound            NOT_FOUND                nothing is served at that path
    ├── NotAuthenticated        UNAUTHORIZED             no proof of who is calling
    │   └── InvalidToken        INVALID_TOKEN            a proof that does not hold
    ├── Forbidden               FORBIDDEN                known, but may not
    │   ├── InsufficientScope   INSUFFICIENT_SCOPE       … for want of a scope
    │   └── NotYours            NOT_YOURS                … because the session is another subject's
    ├── RateLimited             RATE_LIMITED             too much, too fast
    ├── Overloaded              OVERLOADED               the gateway is full; try later
    │   └── Draining            DRAINING                 this node is going away; reconnect
    ├── AlreadyDecided          ALREADY_DECIDED          the approval has its decision
    ├── NoSuchTurn              NO_SUCH_TURN             nothing to cancel under that id
    ├── StoreUnavailable        STORE_UNAVAILABLE        the store cannot be written or read
    │   └── StoreDelayed        STORE_DELAYED            … yet; the message is kept and will be carried out
    ├── ReplayTruncated         REPLAY_TRUNCATED         v1: events were dropped before the client came back
    ├── OutcomeUnknown          OUTCOME_UNKNOWN          a restart cut a turn that cannot be resumed
    └── AgentFailure            (upstream, protocol.md section 3)
        ├── AgentUnavailable    AGENT_UNAVAILABLE        connect refused, DNS, TLS: nothing was sent
        ├── AgentRefused        AGENT_ERROR              HTTP status ≥ 400
        ├── AgentProtocolError  AGENT_PROTOCOL_ERROR     not an event stream, or an event over the limit
        ├── AgentTimeout        AGENT_TIMEOUT            silence longer than allowed
        └── AgentStreamInterrupted AGENT_STREAM_INTERRUPTED  cut before its end

A leaf carries what each side needs to know: ``code`` (stable, for programs), ``retryable`` (may the very
same request succeed later), ``http_status`` (on REST or before an upgrade) and ``close_code`` (on a socket
that has to be closed for it). The message is written for a person: what happened, what to do. It is shown
to clients, so it never holds a secret, an upstream body or an internal address.
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """Base of all expected failures; ``str(error)`` is safe to show to the client."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    http_status: ClassVar[int] = 500
    close_code: ClassVar[int] = 1011
    retryable: bool = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds after which a retry makes sense; sent as ``Retry-After`` on REST."""


class InvalidMessage(GatewayError):
    """The client sent something that is not a message of the protocol; its socket stays open."""

    code = "INVALID_MESSAGE"
    http_status = 400
    close_code = 4400


class MessageTooLarge(InvalidMessage):
    """A message or body over its size limit."""

    code = "MESSAGE_TOO_LARGE"
    http_status = 413
    close_code = 1009


class QueueFull(InvalidMessage):
    """The session already holds as many waiting messages as it may."""

    code = "QUEUE_FULL"
    http_status = 429
    close_code = 4429
    retryable = True


class HandshakeRefused(GatewayError):
    """The request cannot be served as it was made (path, headers, subprotocol)."""

    code = "HANDSHAKE_REFUSED"
    http_status = 400
    close_code = 4400


class NotFound(HandshakeRefused):
    """Nothing is served at that path."""

    code = "NOT_FOUND"
    http_status = 404


class NotAuthenticated(GatewayError):
    """The caller gave no proof of identity where one is needed."""

    code = "UNAUTHORIZED"
    http_status = 401
    close_code = 4401


class InvalidToken(NotAuthenticated):
    """The caller's proof of identity does not hold: expired, forged, for somebody else."""

    code = "INVALID_TOKEN"


class Forbidden(GatewayError):
    """The caller is known and may not do this."""

    code = "FORBIDDEN"
    http_status = 403
    close_code = 4403


class InsufficientScope(Forbidden):
    """The caller's token lacks the scope that this needs."""

    code = "INSUFFICIENT_SCOPE"

    def __init__(self, scope: str) -> None:
        super().__init__(f"This needs the scope {scope!r}; get a token that carries it.")
        self.scope = scope


class NotYours(Forbidden):
    """The session belongs to another subject."""

    code = "NOT_YOURS"


class RateLimited(GatewayError):
    """The caller went over a limit of its own; ``retry_after`` says when to come back."""

    code = "RATE_LIMITED"
    http_status = 429
    close_code = 4429
    retryable = True


class Overloaded(GatewayError):
    """The gateway is at a limit that all callers share."""

    code = "OVERLOADED"
    http_status = 503
    close_code = 1013
    retryable = True


class Draining(Overloaded):
    """This node takes no new work because it is shutting down."""

    code = "DRAINING"
    close_code = 1012


class AlreadyDecided(GatewayError):
    """The approval was decided before, here or on another device."""

    code = "ALREADY_DECIDED"
    http_status = 409


class NoSuchTurn(GatewayError):
    """There is no running or queued turn of that id to cancel."""

    code = "NO_SUCH_TURN"
    http_status = 404


class StoreUnavailable(GatewayError):
    """The session store cannot be reached or written; nothing was accepted."""

    code = "STORE_UNAVAILABLE"
    http_status = 503
    close_code = 1013
    retryable = True


class StoreDelayed(StoreUnavailable):
    """A v1 message was taken but is not stored yet: it must not be sent again, for v1 has no ids."""

    code = "STORE_DELAYED"
    retryable = False

    def __init__(self) -> None:
        super().__init__(
            "The session store cannot be written just now. Your message is kept and is carried out as soon "
            "as it can; do not send it again."
        )


class ReplayTruncated(GatewayError):
    """A v1 client came back after more events than are kept; a gap is never silent."""

    code = "REPLAY_TRUNCATED"

    def __init__(self, lost: int) -> None:
        super().__init__(
            f"{lost} events of this conversation are no longer held and were not delivered. "
            "Read the session's history to see the whole answer."
        )


class OutcomeUnknown(GatewayError):
    """A restart cut a running turn whose stream cannot be resumed; the work may or may not be done."""

    code = "OUTCOME_UNKNOWN"


class AgentFailure(GatewayError):
    """The Agent Runtime did not answer as the upstream contract says (protocol.md section 3)."""

    http_status = 502


class AgentUnavailable(AgentFailure):
    """No connection to the Agent Runtime could be made; nothing of the request was sent."""

    code = "AGENT_UNAVAILABLE"
    retryable = True


class AgentRefused(AgentFailure):
    """The Agent Runtime answered with an HTTP status ≥ 400; retryable for 5xx."""

    code = "AGENT_ERROR"

    def __init__(self, status: int) -> None:
        advice = "Try again later." if status >= 500 else "Trying again will not help."
        super().__init__(f"The Agent Runtime answered with HTTP status {status}. {advice}")
        self.status = status
        self.retryable = status >= 500


class AgentProtocolError(AgentFailure):
    """The Agent Runtime's answer is not an event stream, or an event is over the size limit."""

    code = "AGENT_PROTOCOL_ERROR"


class AgentTimeout(AgentFailure):
    """The Agent Runtime was silent for longer than allowed."""

    code = "AGENT_TIMEOUT"
    http_status = 504
    retryable = True


class AgentStreamInterrupted(AgentFailure):
    """The Agent Runtime's stream was cut before its end."""

    code = "AGENT_STREAM_INTERRUPTED"
    retryable = True
