"""The documentation in a browser: read, searched and audited, in light and dark; the console stays silent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from playwright.async_api import Page

from proxy.ui.documentation import documentation
from tests.browser.chromium import COLORS
from tests.browser.conftest import Open
from tests.documentation import ROOT, site

__all__ = ["site"]  # a fixture

SEARCHED = (
    "words => new URLSearchParams(location.search).get('q') === words"
    " && document.getElementById('found').textContent.includes('section')"
)
DRAWINGS = sorted(path.name for path in (ROOT / "docs" / "images").glob("*.svg"))
# The texts that are wider than the smallest box around their middle, or than the drawing.
SPILLED = """() => {
  const placed = (each) => each.getBoundingClientRect();
  const boxes = [...document.querySelectorAll('rect'), document.documentElement].map(placed);
  return [...document.querySelectorAll('text')].filter((each) => {
    const text = placed(each), x = (text.left + text.right) / 2, y = (text.top + text.bottom) / 2;
    const around = boxes.filter((box) => box.left < x && x < box.right && box.top < y && y < box.bottom);
    const [box] = around.sort((a, b) => a.width * a.height - b.width * b.height);
    return !box || text.left < box.left || text.right > box.right;
  }).map((each) => each.textContent);
}"""
FOUND = "access.html#kubernetes"


async def icon(request: web.Request) -> web.Response:
    return web.Response(status=204)  # a drawing has no link to one


@pytest.fixture
async def address(site: Path) -> AsyncIterator[str]:
    """Of a listener that serves the site; it outlives the windows of the test."""
    listener = web.Application()
    listener.router.add_get("/favicon.ico", icon)
    listener.add_subapp("/ui", documentation(site))  # where windows open their pages
    async with TestServer(listener) as server:
        yield str(server.make_url(""))


async def test_it_is_read_and_searched(address: str, window: Open) -> None:
    tab = await window(address)
    for name in DRAWINGS:
        await tab.open(f"images/{name}")
        assert await tab.do(lambda page: page.evaluate(SPILLED)) == [], name
    await tab.open()
    assert await tab.title() == "Entrepôt"
    await tab.open("tracing.html")
    assert await tab.violations() == []
    await tab.click("Architecture")
    assert await tab.title() == "Architecture"
    for words in (
        "nothing:here *",
        "~ ^2 +-",
        "<b>x</b> &amp;",
        "imagePullSecrets",
    ):  # and marks of queries
        await tab.fill("Search", words, "header")
        await tab.press("Enter")
        await tab.do(partial(Page.wait_for_function, expression=SEARCHED, arg=words))
    assert "no imagePullSecrets are needed" in await tab.text("#results")
    await tab.do(lambda page: page.locator("#results a").first.click())
    assert await tab.do(lambda page: page.evaluate("location.href.split('/').pop()")) == FOUND
    await tab.open("search.html?q=eviction")
    await tab.see("sections")
    assert await tab.violations() == []
    for scheme in ("dark", "light"):
        await tab.paint(scheme)
        assert await tab.violations(COLORS) == []
        await tab.open("tls.html")
