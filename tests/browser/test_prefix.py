"""The page below a path of nginx, with the configuration of docs/web-ui.md but for its addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy.ui.rendering import NAVIGATION
from tests.browser.conftest import Open
from tests.browser.shop import open_shop
from tests.clients.processes import Process, free_port, require
from tests.clients.test_proxies import AROUND
from tests.conftest import Clock, Serve
from tests.upstream import Upstream

MANUAL = Path(__file__).parents[2] / "docs" / "web-ui.md"
TOKEN = "correct horse"


@contextmanager
def nginx(directory: Path, behind: int) -> Iterator[str]:
    """Its address."""
    require("nginx")
    port = free_port()
    (location,) = re.findall(r"(?s)```nginx\n(.*?)```", MANUAL.read_text())
    assert "127.0.0.1:5001" in location
    location = location.replace("127.0.0.1:5001", f"127.0.0.1:{behind}")
    file = directory / "nginx.conf"
    server = f"server {{ listen 127.0.0.1:{port};\n{location} }}"
    file.write_text(AROUND.format(directory=directory, server=server))
    process = Process(["nginx", "-c", file, "-p", directory, "-e", "stderr"], ready="start worker process ")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()


async def test_below_a_path(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, window: Open
) -> None:
    shop = await open_shop(serve, upstream, clock, tmp_path, admin_token=TOKEN)
    assert shop.site.app.admin_url is not None and shop.site.app.admin_url.port is not None
    with nginx(tmp_path, shop.site.app.admin_url.port) as address:
        tab = await window(f"{address}/cache")
        await tab.open("history?ref=web:3")
        await tab.fill("Admin token", TOKEN)
        await tab.click("Log in", "button")
        assert await tab.title() == "History"
        for path, name in NAVIGATION:
            await tab.click(name)
            assert (await tab.do(lambda page: page.evaluate("location.pathname"))) == f"/cache/ui/{path}"
        await tab.open("image?ref=web:3")
        await tab.click("Purge")
        await tab.click("Purge images", "button")
        assert "Done." in await tab.text()
        await tab.click("Log out", "button")
        assert await tab.title() == "Log in"
        await tab.open("storage")
        assert await tab.title() == "Log in"
