"""The pure heart: messages, codec, SSE parser, session state; no I/O, no Trio, no clock."""
