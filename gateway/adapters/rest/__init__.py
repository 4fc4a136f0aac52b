"""REST by Quart-Trio: a proxy to the Agent Runtime behind access control, and some routes of our own."""

from gateway.adapters.rest.app import create_app
from gateway.adapters.rest.lanes import agent_client

__all__ = ["agent_client", "create_app"]
