"""Connections that outlive what opened them: obstore closes its own in a thread, once their store is gone."""

from __future__ import annotations

from pathlib import Path

PORTS: set[int] = set()  # of the servers of buckets
KEPT: set[str] = set()  # other descriptors that are kept, as their links in /proc are


def is_kept_open(descriptor: str) -> bool:
    """Whether it is kept, or a connection to one of these servers, at either end, or one that was reset.

    `descriptor` ends as its link in /proc does.
    """
    if any(descriptor.endswith(each) for each in KEPT):
        return True
    if not PORTS or "socket:[" not in descriptor:
        return False
    inode = descriptor.rpartition("[")[2].rstrip("]")
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            row = line.split()
            if row[9] == inode:
                return any(int(end.rpartition(":")[2], 16) in PORTS for end in row[1:3])
    unix = Path("/proc/self/net/unix").read_text().splitlines()[1:]
    return all(line.split()[6] != inode for line in unix)
