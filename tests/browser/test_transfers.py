"""Transfers, seen live in a browser: from the start of a server to one's first pull in two clicks."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from proxy.admin import fill_feed
from tests.browser.conftest import Open
from tests.browser.shop import Shop, layer, shop
from tests.processes import Place, place
from tests.upstream import Hold, Upstream

__all__ = ["place", "shop"]  # fixtures

ROW = "main tbody tr"


async def test_a_pull_is_seen_as_it_comes(shop: Shop, window: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_feed, "INTERVAL", 0.05)
    tab = await window(shop.admin)
    await tab.open()
    await tab.click("Transfers")
    await tab.see("Live")
    assert "Nothing is being transferred" in await tab.text()
    content = layer("slow", 4_000_000)
    shop.image("library/slow", "1", content)
    digest = shop.upstream.blob("library/slow", content)
    hold = Hold(asyncio.Event(), after=1_500_000)
    shop.upstream.next("GET", digest, hold)
    pulling = asyncio.create_task(shop.pull("library/slow", "1"))
    await hold.reached.wait()
    await tab.see("docker.io/library/slow")
    shop.clock.advance(2)
    await tab.do(lambda page: page.get_by_text(re.compile(r"\d KiB/s")).first.wait_for())
    await tab.do(lambda page: page.get_by_text(re.compile(r"1\.4 MiB of 3\.8 MiB")).first.wait_for())
    assert await tab.violations() == []
    await tab.picture("transfers")
    hold.gate.set()
    await pulling
    await tab.see("Nothing is being transferred")
    row = await tab.text(f"{ROW}:has-text('library/slow')")
    assert "fetched" in row
    assert "3.8 MiB" in row


async def test_the_first_pull_through_a_new_server_in_two_clicks(
    place: Place, window: Open, upstream: Upstream, tmp_path: Path
) -> None:
    """The banner leads to the page, and that to the transfers, whichever worker they are in."""
    content = layer("first", 3_000_000)
    digest = upstream.blob("library/first", content)
    hold = Hold(asyncio.Event(), after=1_000_000)
    upstream.next("GET", digest, hold)
    server = await place.start()
    tab = await window(server.admin_url)
    await tab.open()  # the first click: the address in the banner
    await tab.click("Transfers")
    await tab.see("Live")
    program = (
        "import sys, urllib.request\n"
        f"content = urllib.request.urlopen('{server.url}/v2/library/first/blobs/{digest}').read()\n"
        f"sys.exit(len(content) != {len(content)})"
    )
    clients = [await asyncio.create_subprocess_exec(sys.executable, "-c", program) for _ in range(2)]
    await hold.reached.wait()
    await tab.see("docker.io/library/first")
    hold.gate.set()
    assert [await each.wait() for each in clients] == [0, 0]
    await tab.see("fetched")
    await tab.see("Nothing is being transferred")
    await server.stop()
    await tab.see("Connecting again")
    tab.said.clear()  # the browser says that its connection was refused


async def test_a_session_that_has_ended_is_not_live(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    await tab.open("transfers")
    await tab.see("Live")
    # A stream that is answered with anything else is not tried again.
    await tab.do(
        lambda page: page.route(
            "**/events", lambda route: route.fulfill(status=303, headers={"Location": "login"})
        )
    )
    await tab.do(lambda page: page.reload())
    await tab.see("Not live: load the page again")
    tab.said.clear()
