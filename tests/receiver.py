"""Somebody who is told by webhooks: a server on a socket of its own, which answers as a test says."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from aiohttp import web

from proxy.webhooks.formats import CLOUDEVENTS, REGISTRY

PATIENCE = 20.0  # seconds; only what never comes takes them


class Notice:
    """One POST."""

    def __init__(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self.path = path
        self.headers = headers
        self.body = body
        self.media_type = headers["Content-Type"]

    @property
    def event(self) -> dict[str, Any]:
        found = json.loads(self.body)
        if self.media_type == REGISTRY:
            (found,) = found["events"]
        else:
            assert self.media_type == CLOUDEVENTS
        return dict(found)


class Receiver:
    """`answers` are given one after the other, then `answer`: a status, with or without headers."""

    def __init__(self) -> None:
        self.answer: int | tuple[int, dict[str, str]] = 200
        self.answers: list[int | tuple[int, dict[str, str]]] = []
        self.gate: asyncio.Event | None = None  # closed: nobody is answered
        self.notices: list[Notice] = []  # of those that it has taken
        self.asked = 0
        self.at_once = self.most_at_once = 0
        self._came = asyncio.Event()
        self._port = 0
        self._runner: web.ServerRunner | None = None
        self._context: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://localhost:{self._port}/hook?token=hidden"

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        """After stop() on the same port as before."""
        self._context = context
        self._runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.method == "POST"
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            notice = Notice(request.path_qs, request.headers.copy(), await request.read())
            self.asked += 1
            answer = self.answers.pop(0) if self.answers else self.answer
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            if 200 <= status < 300:
                self.notices.append(notice)
            self._came.set()
            if self.gate is not None:
                await self.gate.wait()
            return web.Response(status=status, headers=headers)
        finally:
            self.at_once -= 1

    async def asked_for(self, number: int) -> None:
        """Wait until so many have come, taken or not."""
        async with asyncio.timeout(PATIENCE):
            while self.asked < number:
                self._came.clear()
                await self._came.wait()

    async def took(self, number: int) -> list[dict[str, Any]]:
        """Wait until it has taken so many; the events of all."""
        async with asyncio.timeout(PATIENCE):
            while len(self.notices) < number:
                self._came.clear()
                await self._came.wait()
        return [each.event for each in self.notices]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.start()
    yield receiver
    await receiver.stop()
