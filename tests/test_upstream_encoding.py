"""Content codings that an upstream applies although identity was requested."""

from __future__ import annotations

import gzip
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.upstream.encoding import MAX_MEMBERS, decoded
from storage.errors import OriginFailed

CONTENT = b'{"schemaVersion": 2}'
MEMBERS = [gzip.compress(part, mtime=0) for part in (CONTENT[:7], b"", CONTENT[7:])]


def decode(content: bytes, encoding: str = "gzip", limit: int = 1000) -> bytes:
    response: Any = SimpleNamespace(headers={"Content-Encoding": encoding})
    return decoded("up", response, content, limit)


@pytest.mark.parametrize("count", [1, 2, 3, MAX_MEMBERS])
def test_all_members_are_read(count: int) -> None:
    assert decode(gzip.compress(b"x" * 10, mtime=0) * count) == b"x" * 10 * count


def test_content_that_is_cut_into_members() -> None:
    assert decode(b"".join(MEMBERS)) == CONTENT
    assert decode(b"".join(MEMBERS), limit=len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    "content",
    [
        b"".join(MEMBERS)[:-1],
        b"".join(MEMBERS) + b"garbage",
        MEMBERS[0] * (MAX_MEMBERS + 1),
        gzip.compress(b"x" * 1001, mtime=0),
        gzip.compress(b"x" * 600, mtime=0) * 2,
        b"",
    ],
    ids=["cut", "garbage", "many members", "large", "large together", "nothing"],
)
def test_what_is_refused(content: bytes) -> None:
    with pytest.raises(OriginFailed):
        decode(content)
