"""Which address a request comes from, when there may be proxies in front."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FOR = re.compile(r"""(?:^|;)\s*for\s*=\s*(?:"([^"]*)"|([^;"\s]*))""", re.IGNORECASE)


def client_address(peer: str, headers: Iterable[tuple[str, str]], trusted_proxies: Sequence[Network]) -> str:
    """The nearest address that is not a trusted proxy.

    ``headers`` are (lower-case name, value) in the order received. ``X-Forwarded-For``, or without it
    ``Forwarded`` (RFC 7239), is read from the right, and only as far as trusted proxies wrote it: what
    stands left of the first stranger is what that stranger claims. The proxy must remove the one of the two
    headers that it does not write itself.
    """
    current = _parse(peer)
    if current is None or not _is_trusted(current, trusted_proxies):
        return peer
    fields = list(headers)
    hops = _elements(value for name, value in fields if name == "x-forwarded-for")
    if not hops:
        elements = _elements(value for name, value in fields if name == "forwarded")
        matches = [_FOR.search(element) for element in elements]
        hops = [(match[1] or match[2] or "") if match else "" for match in matches]
    for hop in reversed(hops):
        address = _parse(hop)
        if address is None:
            break
        current = address
        if not _is_trusted(current, trusted_proxies):
            break
    return str(current)


def _elements(values: Iterable[str]) -> list[str]:
    joined = ",".join(values)
    return [element.strip() for element in joined.split(",")] if joined else []


def _parse(text: str) -> Address | None:
    """An address with or without port: 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1]:80."""
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_trusted(address: Address, trusted_proxies: Sequence[Network]) -> bool:
    return any(address in network for network in trusted_proxies)
