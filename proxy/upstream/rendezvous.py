"""Rendezvous hashing: which replica of a fleet owns a key, without any agreement between them.

Each key gives each replica a score, and the one with the highest owns it.  A replica that comes or goes takes
or leaves its own keys only.  The score depends on key and replica alone, so that replicas which know
different lists still put any two replicas in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def score(key: str, replica: str) -> tuple[bytes, str]:
    """The score of a replica for a key; no two replicas have the same."""
    return hashlib.blake2b(f"{key}\n{replica}".encode(), digest_size=8).digest(), replica


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas, the owner of the key first."""
    return sorted(replicas, key=lambda each: score(key, each), reverse=True)
