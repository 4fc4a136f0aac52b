"""One Prometheus page out of those of several processes: every series says whose it is.

Format: the Prometheus text exposition format 0.0.4, as ``prometheus_client.generate_latest`` writes it. All
lines of a family have to be together, so the pages are taken apart by family and put together again.
"""

from __future__ import annotations

from collections.abc import Mapping

_LABEL = b'worker="'


def merge_pages(pages: Mapping[str, bytes]) -> bytes:
    """All families of ``pages`` (by process), each series with the label ``worker``.

    A series that has the label already keeps it: that is what a supervisor says of a worker.
    """
    heads: dict[bytes, list[bytes]] = {}
    series: dict[bytes, list[bytes]] = {}
    for process, page in pages.items():
        label = _LABEL + process.encode() + b'"'
        family = b""
        for line in page.splitlines():
            if line.startswith(b"# HELP "):
                family = line.split(b" ", 3)[2]
                if family not in heads:
                    heads[family], series[family] = [], []
                    heads[family].append(line)
            elif line.startswith(b"#"):
                if len(heads[family]) < 2:
                    heads[family].append(line)
            elif line:
                series[family].append(_labelled(line, label))
    lines = [line for family, head in heads.items() if series[family] for line in (*head, *series[family])]
    return b"".join(line + b"\n" for line in lines)


def _labelled(line: bytes, label: bytes) -> bytes:
    """``name{a="b"} 1`` or ``name 1``; a name holds neither a brace nor a space."""
    name, brace, rest = line.partition(b"{")
    if not brace or b" " in name:
        name, _, value = line.partition(b" ")
        return b"%s{%s} %s" % (name, label, value)
    if rest.startswith(_LABEL):
        return line
    return b"%s{%s,%s" % (name, label, rest)
