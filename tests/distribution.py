"""What the tests of the distribution API share: an image, and how answers are read."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from multidict import CIMultiDict

from tests.conftest import Site
from tests.upstream import Fault, Image, Request, Upstream, digest_of
from tests.upstream.messages import Answer

BODY = bytes(range(250)) * 20
ABSENT = digest_of(b"absent")
JSON = "application/json"
IMMUTABLE = "public, max-age=31536000, immutable"
ALPINE = "/v2/library/alpine"


def push_alpine(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BODY,))


@dataclass(frozen=True)
class Headers(Fault):
    """What a registry may send besides."""

    given: dict[str, str]

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers.update(self.given)
        return answer


async def head(site: Site, path: str, **headers: str) -> tuple[int, Any]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with site.request("HEAD", path, headers=given) as response:
        assert await response.read() == b""
        return response.status, response.headers


def code(body: bytes) -> str:
    (error,) = json.loads(body)["errors"]
    assert error["message"]
    return str(error["code"])


def lasting(headers: CIMultiDict[str]) -> dict[str, str]:
    """All headers but those that differ from one answer to the next."""
    found = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in found.items() if name not in ("date", "x-request-id")}


async def fills_ended() -> None:
    """Clients have all of a blob a moment before it is in its place."""
    tasks = asyncio.all_tasks()
    await asyncio.gather(*(task for task in tasks if "Fills._run" in str(task.get_coro())))
