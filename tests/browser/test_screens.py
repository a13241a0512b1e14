"""Every screen in a browser: what it shows, and that all can be read without a script."""

from __future__ import annotations

from proxy.ui.rendering import NAVIGATION
from tests.browser.chromium import COLORS
from tests.browser.conftest import Open
from tests.browser.shop import Shop, layer, shop
from tests.upstream import digest_of

__all__ = ["shop"]  # a fixture

WEB = "docker.io/library/web"
BASE = f"web@{digest_of(layer('base', 900_000))}"  # a layer of it
# Of each screen: its address, something that it must show, and the name of its picture.
SCREENS = {
    "transfers": ("Came in last", ""),
    "history?ref=web:3": ("What changed", "history"),
    "diff?ref=web:3": ("RUN make step-1", "diff"),
    "storage?limit=1MiB": ("Evicted next", "storage"),
    "policy?ref=redis": ("pull a release by its tag", "policy"),
    "access": ("repository:docker.io/team/*:pull", "access"),
    "audit": ("Acts, the latest first", "audit"),
    "acts": ("Begin a drill", ""),
    "confirm?act=purge&pattern=web:3": ("What would be done", "confirm"),
    "confirm?act=create-key": ("Valid for", ""),
    "confirm?act=override&reference=redis": ("Reason", ""),
    "why?ref=web:3": ("the tag is stale", "why"),
    "": ("Hit ratio", "overview"),
    "repositories?q=lib&sort=size": ("library/web", "repositories"),
    "repository?name=docker.io/library/web": ("1 tag", ""),
    "image?ref=web:3": ("RUN make step-1", ""),
    "image?ref=db:16": ("linux/arm64", "image"),
    "files?ref={layer}": ("usr/bin/base", "files"),
}


def test_every_screen_of_the_navigation_is_looked_at() -> None:
    assert {path for path, _ in NAVIGATION} <= {each.partition("?")[0] for each in SCREENS}


async def keys(shop: Shop) -> None:
    """API keys, of which one was used, and one has ended."""
    scopes = ["repository:docker.io/team/*:pull", "repository:local/*:pull,push"]
    key = (await shop.api("POST", "keys", name="ci", scopes=scopes, seconds=90 * 86400.0))["key"]
    await shop.api("POST", "keys", name="old", scopes=scopes[:1], seconds=60)
    locked = ["docker.io/library/base:1@" + "sha256:" + "0" * 64]
    await shop.api("POST", "keys", name="edge", lock=locked)
    shop.clock.advance(3600)
    status, _, _ = await shop.site.get("/v2/local/app/tags/list", Authorization=f"Bearer {key}")
    assert status == 404  # a use of the key


async def test_every_screen(shop: Shop, window: Open) -> None:
    """Light, and dark, in which only the colors differ."""
    await shop.api("POST", "overrides", reference="redis:latest", seconds=7200, reason="hotfix 4711")
    await shop.site.get("/v2/library/redis/manifests/latest")
    await shop.api("POST", "pins", pattern="web:3", keep_fresh=3600)
    await keys(shop)
    tab = await window(shop.admin)
    for address, (shown, picture) in SCREENS.items():
        await tab.paint("light")
        assert await tab.open(address.format(layer=BASE)) == 200, address
        assert shown in await tab.text(), address
        assert await tab.violations() == [], address
        if picture:
            await tab.picture(picture)
        await tab.paint("dark")
        assert await tab.violations(COLORS) == [], address
        if picture == "storage":
            await tab.picture("storage-dark")


async def test_without_script_all_can_be_read_and_done(shop: Shop, window: Open) -> None:
    await keys(shop)
    tab = await window(shop.admin, scripts=False)
    for address, (shown, _) in SCREENS.items():
        assert await tab.open(address.format(layer=BASE)) == 200
        assert shown in await tab.text(), address
    await tab.open("transfers")
    await tab.click("Load it again")
    assert WEB in await tab.text()
    await tab.open("acts")
    await tab.fill("Reference or pattern", "web:3", "#purge")
    await tab.click("Purge images…")
    assert f"{WEB}:3" in await tab.text()
    await tab.click("Purge images")
    assert "Done." in await tab.text()
    assert await shop.api("GET", "images?match=web:3") == await shop.api("GET", "images?match=nothing:1")


async def test_the_history_of_a_tag_leads_to_what_changed(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    await tab.open()
    await tab.click("History")
    await tab.fill("Tag", "web:3")
    await tab.press("Enter")
    await tab.see(f"What {WEB}:3 stood for")
    rows = await tab.count("main tbody tr")
    assert rows == 2
    await tab.do(lambda page: page.get_by_text("What changed").click())
    await tab.see("linux/amd64")
    found = await tab.text()
    for shown in ("added", "removed", "same", "MODE", "slow", "VERSION", "RUN make step-2"):
        assert shown in found, shown
    await tab.open("history?ref=web:3")
    await tab.click("Compare")
    await tab.see("linux/amd64")
    assert await tab.open("history?ref=web:4") == 404
    assert "was never pulled" in await tab.text()
    tab.said.clear()  # the browser says that the answer was 404
