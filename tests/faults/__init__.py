"""The fault harness: real processes and sockets, kills and cuts at random points, and a checker.

Nothing here imports the gateway: it is started as a process, spoken to with ``websockets``' protocol code,
and judged by what the clients received and what the Agent Runtime was asked.
"""
