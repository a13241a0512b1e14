"""What is shown is text, whoever wrote it; and the page works below any path of a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from tests.browser.conftest import Open
from tests.browser.shop import Shop, layer, open_shop, shop
from tests.conftest import Clock, Serve
from tests.upstream import Hold, Upstream

__all__ = ["shop"]  # a fixture

TOKEN = "correct horse"
SCRIPT = "<img src=x onerror='document.title=\"taken\"'><script>document.title='taken'</script>"


async def test_names_and_configurations_are_text(shop: Shop, window: Open) -> None:
    """Images, users' agents and operators' reasons may have markup in them."""
    shop.image("library/web", "3", layer("web"), env=(f"EVIL={SCRIPT}",))
    shop.clock.advance(3600)
    await shop.pull("library/web", "3")
    await shop.api("POST", "overrides", reference="redis", seconds=60, reason=SCRIPT)
    await shop.site.get("/v2/library/redis/manifests/latest", User_Agent=SCRIPT)
    tab = await window(shop.admin)
    for screen in ("diff?ref=web:3", "policy?ref=redis", "audit", f"audit?match={SCRIPT}", "acts"):
        await tab.open(screen)
        title = await tab.do(lambda page: page.title())
        assert "taken" not in title
        assert await tab.count("main img, main script:not([src])") == 0, screen
        assert (SCRIPT in await tab.text()) == (screen != "acts" and "match" not in screen), screen
    for screen in (f"history?ref={SCRIPT}", f"diff?ref=web:3&other={SCRIPT}", f"confirm?act={SCRIPT}"):
        assert await tab.open(screen) == 400
        assert await tab.count("main img, main script:not([src])") == 0
    tab.said.clear()  # the browser says that the answers were errors


@asynccontextmanager
async def below(path: str, behind: str) -> AsyncIterator[str]:
    """The URL of a proxy that serves what is at `behind` below a path, as it comes."""
    async with ClientSession(auto_decompress=False) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            url = behind + request.path_qs.removeprefix(path)
            body = await request.read()
            async with session.request(
                request.method, url, headers=request.headers, data=body, allow_redirects=False
            ) as answer:
                response = web.StreamResponse(status=answer.status, headers=answer.headers)
                response.headers.popall("Transfer-Encoding", None)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                return response

        application = web.Application()
        application.router.add_route("*", path + "/{rest:.*}", forward)
        async with TestServer(application, shutdown_timeout=0.1) as server:
            yield f"http://127.0.0.1:{server.port}{path}"


async def test_below_a_path_of_a_proxy(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, window: Open
) -> None:
    shop = await open_shop(serve, upstream, clock, tmp_path, admin_token=TOKEN)
    content = layer("slow", 3_000_000)
    shop.image("library/slow", "1", content)
    hold = Hold(asyncio.Event(), after=1_000_000)
    upstream.next("GET", upstream.blob("library/slow", content), hold)
    async with below("/tools/cache", shop.admin) as url:
        tab = await window(url)
        await tab.open("transfers")
        await tab.fill("Admin token", TOKEN)
        await tab.click("Log in", "button")
        await tab.see("Live")
        pulling = asyncio.create_task(shop.pull("library/slow", "1"))
        await hold.reached.wait()
        await tab.see("docker.io/library/slow")
        hold.gate.set()
        await pulling
        await tab.open("confirm?act=pin&pattern=web:3")
        await tab.click("Pin images", "button")
        assert "Done." in await tab.text()
        await tab.click("Storage")
        assert "docker.io/library/web:3" in await tab.text()
        await tab.click("Log out", "button")
        assert await tab.title() == "Log in"
        await tab.open("storage")
        assert await tab.title() == "Log in"
