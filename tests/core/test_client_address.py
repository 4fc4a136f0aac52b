"""Whose address it is, with and without proxies."""

from __future__ import annotations

import ipaddress

import pytest

from gateway.core.client_address import client_address

TRUSTED = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1")]


@pytest.mark.parametrize(
    ("peer", "headers", "expected"),
    [
        ("192.0.2.9", [], "192.0.2.9"),
        ("192.0.2.9", [("x-forwarded-for", "203.0.113.5")], "192.0.2.9"),
        ("192.0.2.9", [("forwarded", "for=203.0.113.5")], "192.0.2.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [("x-forwarded-for", "203.0.113.5")], "203.0.113.5"),
        ("10.0.0.1", [("x-forwarded-for", "6.6.6.6, 203.0.113.5")], "203.0.113.5"),
        ("10.0.0.1", [("x-forwarded-for", "6.6.6.6, 203.0.113.5, 10.1.1.1")], "203.0.113.5"),
        ("10.0.0.1", [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "203.0.113.5")], "203.0.113.5"),
        ("10.0.0.1", [("x-forwarded-for", "203.0.113.5, rubbish")], "10.0.0.1"),
        ("10.0.0.1", [("x-forwarded-for", "rubbish, 10.2.2.2")], "10.2.2.2"),
        ("10.0.0.1", [("x-forwarded-for", "203.0.113.5:1234")], "203.0.113.5"),
        ("10.0.0.1", [("x-forwarded-for", "[2001:db8::5]:1234")], "2001:db8::5"),
        ("::1", [("x-forwarded-for", "2001:db8::5")], "2001:db8::5"),
        ("::ffff:10.0.0.1", [("x-forwarded-for", "203.0.113.5")], "203.0.113.5"),
        ("10.0.0.1", [("forwarded", 'proto=https;for="[2001:db8::5]:99";by=10.0.0.1')], "2001:db8::5"),
        ("10.0.0.1", [("forwarded", "for=6.6.6.6, For=203.0.113.5")], "203.0.113.5"),
        ("10.0.0.1", [("forwarded", "for=203.0.113.5, for=_hidden")], "10.0.0.1"),
        ("10.0.0.1", [("forwarded", "for=unknown")], "10.0.0.1"),
        ("10.0.0.1", [("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "203.0.113.5")], "203.0.113.5"),
        ("", [("x-forwarded-for", "203.0.113.5")], ""),
    ],
)
def test_believes_trusted_proxies_and_nobody_else(
    peer: str, headers: list[tuple[str, str]], expected: str
) -> None:
    """The address is the nearest one that is no trusted proxy; claims from beyond it count for nothing."""
    assert client_address(peer, headers, TRUSTED) == expected


def test_without_trusted_proxies_the_peer_counts() -> None:
    """By default no header changes an address."""
    assert client_address("127.0.0.1", [("x-forwarded-for", "6.6.6.6")], []) == "127.0.0.1"
