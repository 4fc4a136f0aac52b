"""What a client may say, validated: frozen values from decoded objects (protocol.md sections 2, 4, 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import field, frozen

from gateway.core.codec import replace_field
from gateway.core.errors import InvalidMessage

MAX_ID_LENGTH = 64
"""Longest ``id`` of a v2 message (protocol.md section 4)."""
MAX_CALL_ID_LENGTH = 256
ROLES = ("user", "assistant", "system", "tool")
DECISIONS = ("approve", "edit", "reject")


@frozen
class AgentBound:
    """A message whose turn is a POST to the Agent Runtime."""

    message_id: str | None
    """v2: ``id``, required. v1: ``message_id``, optional."""
    body: bytes = field(repr=False)
    """The JSON object for the Agent Runtime: the client's own bytes wherever nothing had to change."""

    @property
    def overtakes(self) -> bool:
        """Whether it goes before queued ``user_message``s: it continues work rather than asking for more."""
        return False


@frozen
class UserMessage(AgentBound):
    """``user_message``."""


@frozen
class SwitchAgent(AgentBound):
    """``switch_agent``: queued like a ``user_message``, for it starts work of its own."""


@frozen
class ToolResult(AgentBound):
    """``tool_result``."""

    call_id: str = ""

    @property
    def overtakes(self) -> bool:
        """True: the turn that asked for the tool waits for it."""
        return True


@frozen
class HitlDecision(AgentBound):
    """``hitl_decision``."""

    call_id: str = ""
    decision: str = ""
    """``approve``, ``edit`` or ``reject``."""

    @property
    def overtakes(self) -> bool:
        """True: a control message (protocol.md section 4)."""
        return True


@frozen
class Cancel:
    """``cancel``: stop the running turn, or the one named."""

    message_id: str | None
    turn_id: str | None


@frozen
class Ack:
    """v2: everything up to ``seq`` has arrived."""

    seq: int


@frozen
class Authenticate:
    """v2: a fresh token for this socket."""

    message_id: str | None
    token: str = field(repr=False)


@frozen
class Attach:
    """v2 multiplexed: begin or resume a session on this socket."""

    session_id: str
    epoch: str | None
    last_seq: int | None


@frozen
class Detach:
    """v2 multiplexed: stop receiving a session on this socket."""

    session_id: str


ClientMessage = (
    UserMessage | SwitchAgent | ToolResult | HitlDecision | Cancel | Ack | Authenticate | Attach | Detach
)


def message_id_of(message: Mapping[str, object], *, v2: bool) -> str | None:
    """The id that an answer to ``message`` refers to, also when the message is otherwise invalid."""
    value = message.get("id" if v2 else "message_id")
    return value if isinstance(value, str) and len(value) <= MAX_CALL_ID_LENGTH else None


def parse_client_message(message: Mapping[str, object], raw: bytes, *, v2: bool) -> ClientMessage:
    """Validate one decoded message whose JSON bytes are ``raw``. Raises ``InvalidMessage``."""
    kind = message.get("type")
    if not isinstance(kind, str):
        raise InvalidMessage("Missing field: type (a string that names the kind of message).")
    parse = (_PARSERS_V2 if v2 else _PARSERS_V1).get(kind)
    if parse is None:
        raise InvalidMessage(f"Unknown message type: {kind[:64]}")
    return parse(message, raw, v2)


_Fields = Mapping[str, object]


def _user_message(message: _Fields, raw: bytes, v2: bool) -> UserMessage:
    _string(message, "content", required=True)
    _string(message, "agent_type")
    role = message.get("role")
    if role is None:
        # The default is made explicit for runtimes that require the field.
        if "role" in message:
            raw = replace_field(raw, "role", "user")
        else:
            raw = b'{"role":"user",' + raw[1:].lstrip()
    elif role not in ROLES:
        raise InvalidMessage(f"Field role must be one of {', '.join(ROLES)}.")
    return UserMessage(_message_id(message, v2), raw)


def _switch_agent(message: _Fields, raw: bytes, v2: bool) -> SwitchAgent:
    _string(message, "agent_type", required=True, empty=False)
    _string(message, "content")
    _string(message, "reason")
    return SwitchAgent(_message_id(message, v2), raw)


def _tool_result(message: _Fields, raw: bytes, v2: bool) -> ToolResult:
    call_id = _call_id(message)
    _string(message, "tool_name")
    error = _string(message, "error")
    if error is not None and message.get("result") is not None:
        raise InvalidMessage("A tool_result carries result or error, not both.")
    if error is None and "result" not in message:
        raise InvalidMessage("Missing field: result (any JSON) or error (a string).")
    return ToolResult(_message_id(message, v2), raw, call_id)


def _hitl_decision(message: _Fields, raw: bytes, v2: bool) -> HitlDecision:
    call_id = _call_id(message)
    given = _string(message, "decision", required=True) or ""
    decision = given.lower()
    if decision not in DECISIONS:
        raise InvalidMessage(f"Field decision must be one of {', '.join(DECISIONS)}.")
    arguments = message.get("modified_arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise InvalidMessage("Field modified_arguments must be an object.")
    if decision == "edit" and arguments is None:
        raise InvalidMessage("Missing field: modified_arguments (an object; required for edit).")
    _string(message, "feedback")
    if decision != given:
        raw = replace_field(raw, "decision", decision)
    return HitlDecision(_message_id(message, v2), raw, call_id, decision)


def _cancel(message: _Fields, _raw: bytes, v2: bool) -> Cancel:
    return Cancel(_message_id(message, v2), _string(message, "turn_id"))


def _ack(message: _Fields, _raw: bytes, _v2: bool) -> Ack:
    return Ack(_sequence_number(message, "seq", required=True) or 0)


def _authenticate(message: _Fields, _raw: bytes, _v2: bool) -> Authenticate:
    token = _string(message, "token", required=True, empty=False) or ""
    return Authenticate(message_id_of(message, v2=True), token)


def _attach(message: _Fields, _raw: bytes, _v2: bool) -> Attach:
    session_id = _string(message, "session_id", required=True, empty=False) or ""
    return Attach(session_id, _string(message, "epoch"), _sequence_number(message, "last_seq"))


def _detach(message: _Fields, _raw: bytes, _v2: bool) -> Detach:
    return Detach(_string(message, "session_id", required=True, empty=False) or "")


_Parser = Callable[[_Fields, bytes, bool], ClientMessage]
_PARSERS_V1: dict[str, _Parser] = {
    "user_message": _user_message,
    "tool_result": _tool_result,
    "switch_agent": _switch_agent,
    "hitl_decision": _hitl_decision,
    "cancel": _cancel,
}
_PARSERS_V2: dict[str, _Parser] = {
    **_PARSERS_V1,
    "ack": _ack,
    "authenticate": _authenticate,
    "attach": _attach,
    "detach": _detach,
}


def _message_id(message: _Fields, v2: bool) -> str | None:
    name, limit = ("id", MAX_ID_LENGTH) if v2 else ("message_id", MAX_CALL_ID_LENGTH)
    value = _string(message, name, required=v2, empty=False)
    if value is not None and len(value) > limit:
        raise InvalidMessage(f"Field {name} is longer than {limit} characters.")
    return value


def _call_id(message: _Fields) -> str:
    value = _string(message, "call_id", required=True, empty=False) or ""
    if len(value) > MAX_CALL_ID_LENGTH:
        raise InvalidMessage(f"Field call_id is longer than {MAX_CALL_ID_LENGTH} characters.")
    return value


def _string(message: _Fields, name: str, *, required: bool = False, empty: bool = True) -> str | None:
    value = message.get(name)
    if value is None:
        if required:
            raise InvalidMessage(f"Missing field: {name} (a string).")
        return None
    if not isinstance(value, str):
        raise InvalidMessage(f"Field {name} must be a string.")
    if not value and not empty:
        raise InvalidMessage(f"Field {name} must not be empty.")
    return value


def _sequence_number(message: _Fields, name: str, *, required: bool = False) -> int | None:
    value = message.get(name)
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidMessage(f"Field {name} must be a whole number, 0 or more.")
    return value
