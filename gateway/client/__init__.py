"""A client of the gateway's protocol v2: each event exactly once, each message done once, over any network.

async with open_session("http://127.0.0.1:8000", session_id="s1") as session:
    await session.send_user_message("create hello.py that prints hello")
    async for event in session.events():
        print(event.type, event.token)
"""

from gateway.client.connection import Session, open_session
from gateway.client.errors import (
    ClientError,
    MessageRefused,
    MessageTooLarge,
    OutcomeUnknown,
    SessionEnded,
)
from gateway.client.events import (
    Accepted,
    Connected,
    Connecting,
    ConnectionState,
    Ended,
    Reconnecting,
    ResumePoint,
    SessionEvent,
    Welcome,
)

__all__ = [
    "Accepted",
    "ClientError",
    "Connected",
    "Connecting",
    "ConnectionState",
    "Ended",
    "MessageRefused",
    "MessageTooLarge",
    "OutcomeUnknown",
    "Reconnecting",
    "ResumePoint",
    "Session",
    "SessionEnded",
    "SessionEvent",
    "Welcome",
    "open_session",
]
