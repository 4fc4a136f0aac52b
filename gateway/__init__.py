"""Gateway: carries conversations between IDEs (WebSocket, REST) and an Agent Runtime (SSE)."""

__version__ = "0.1.0"
