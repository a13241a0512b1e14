"""Where the server sends clients for tokens, as the doctor looks at it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.doctor.checks import Check
from proxy.doctor.tokens import check
from proxy.setup.site import Site
from tests.clients.processes import free_port
from tests.conftest import Serve
from tests.upstream import Upstream


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        yield session


async def looked(
    serve: Serve, upstream: Upstream, session: aiohttp.ClientSession, endpoint: Any, **top: Any
) -> Check | None:
    access = {"token_endpoint": endpoint, "ping": "challenge", "api_keys": True}
    site = await serve(upstream, top={"access": access, **top})
    return await check(session, Site(URL(site.url), ()))


async def test_clients_get_tokens(serve: Serve, upstream: Upstream, session: aiohttp.ClientSession) -> None:
    found = await looked(serve, upstream, session, {})
    assert found is not None
    assert found.state == "ok"
    assert found.message.endswith("/token")


async def test_without_an_endpoint_there_is_nothing_to_say(
    serve: Serve, upstream: Upstream, session: aiohttp.ClientSession
) -> None:
    assert await looked(serve, upstream, session, None) is None


async def test_a_realm_that_does_not_answer(
    serve: Serve, upstream: Upstream, session: aiohttp.ClientSession
) -> None:
    realm = f"http://127.0.0.1:{free_port()}/token"
    found = await looked(serve, upstream, session, {"realm": realm})
    assert found is not None
    assert found.state == "failed"
    assert f"clients are sent to {realm}, which cannot be asked: " in found.message
    assert "access.token_endpoint.realm" in found.advice


async def test_a_realm_that_is_something_else(
    serve: Serve, upstream: Upstream, session: aiohttp.ClientSession
) -> None:
    found = await looked(serve, upstream, session, {"realm": f"{upstream.url}/nothing"})
    assert found is not None
    assert (found.state, found.message.rpartition(" ")[2]) == ("failed", "404")


async def test_passwords_are_not_sent_in_plain_text(
    serve: Serve, upstream: Upstream, session: aiohttp.ClientSession, identity: dict[str, str]
) -> None:
    found = await looked(serve, upstream, session, {}, tls=identity)
    assert found is not None
    assert (found.state, found.message.partition("://")[0]) == ("ok", "clients get tokens at https")
    found = await looked(serve, upstream, session, {"realm": "http://127.0.0.1/token"}, tls=identity)
    assert found is not None
    assert found.state == "failed"
    assert "in plain text" in found.message
