"""Acts in a browser: each by its form, confirmed, done, recorded; and refused where the page may not act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxy.ui.acts import ACTS
from tests.browser.conftest import Open
from tests.browser.shop import Shop, open_shop, shop
from tests.conftest import Clock, Serve
from tests.upstream import Upstream

__all__ = ["shop"]  # a fixture

WEB, API = "docker.io/library/web", "docker.io/team/api"
TOKEN = "correct horse"

# Of each act: what is filled in, what the page shows then, and what the audit log says of its arguments.
DONE: dict[str, tuple[dict[str, str], str, dict[str, Any]]] = {
    "warm": ({"Reference": "web:3"}, WEB, {"reference": "web:3", "referrers": True}),
    "refresh": ({"Reference": "web:3"}, WEB, {"reference": "web:3"}),
    "pin": (
        {"Reference or pattern": "web:3", "Refresh every": "1h"},
        f"{WEB}:3",
        {"pattern": "web:3", "keep_fresh": 3600.0},
    ),
    "unpin": ({"Pattern of the pin": "web:3"}, f"{WEB}:3", {"pattern": "web:3"}),
    "scrub": ({}, "running", {}),
    "tag": (
        {"Image": "web:3", "New tag": "local/web:stable"},
        "local/web",
        {"source": "web:3", "target": "local/web:stable"},
    ),
    "delete": (
        {"Reference or pattern": "local/web:stable"},
        "local/web:stable",
        {"pattern": "local/web:stable"},
    ),
    "collect": ({}, "begun", {}),
    "override": (
        {"Reference": "redis", "For": "2h", "Reason": "hotfix 4711"},
        "hotfix 4711",
        {"reference": "redis", "seconds": 7200.0, "reason": "hotfix 4711"},
    ),
    "end-override": ({"Reference": "redis"}, "hotfix 4711", {"reference": "redis"}),
    "drill": (
        {"For": "10m", "Namespaces": "docker.io"},
        "docker.io",
        {"seconds": 600.0, "namespaces": ["docker.io"]},
    ),
    "end-drill": ({}, "docker.io", {}),
    "create-key": (
        {"Name": "deploy", "What it may do": "repository:docker.io/team/*:pull", "Valid for": "30d"},
        "It is not shown again",
        {"name": "deploy", "scopes": ["repository:docker.io/team/*:pull"], "seconds": 30 * 86400.0},
    ),
    "revoke-key": ({"Name": "deploy"}, "deploy", {"name": "deploy"}),
    "purge": ({"Reference or pattern": "web:3"}, f"{WEB}:3", {"pattern": "web:3", "force": False}),
    "evict": ({"Until this much is left": "1KiB"}, "blobs", {"to": 1024}),
}


def test_every_act_is_tried() -> None:
    assert DONE.keys() | {"approve", "reject"} == ACTS.keys()


async def test_each_act_is_confirmed_done_and_recorded(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    for name, (fields, shown, arguments) in DONE.items():
        act, before = ACTS[name], len(shop.acts())
        # By its form; the page that confirms it has its fields, too, if it shows no preview.
        if act.preview or any(each.flag for each in act.fields):
            await tab.open("acts")
            for label, value in fields.items():
                await tab.fill(label, value, f"#{name}")
            await tab.click(f"{act.title}…")
        else:
            await tab.open(f"confirm?act={name}")
            for label, value in fields.items():
                await tab.fill(label, value)
        assert await tab.title() == act.title
        assert len(shop.acts()) == before, name  # nothing has happened yet
        await tab.click(act.title, "button")
        found = await tab.text()
        assert "Done." in found, (name, found)
        assert shown in found, (name, found)
        *_, record = shop.acts()
        assert (record["operation"], record["result"]) == (act.operation, "done"), name
        assert arguments.items() <= record.get("arguments", {}).items(), name
    assert [each["since"] for each in await shop.api("GET", "pins")] == [None]  # that of the configuration
    assert (await shop.api("GET", "images?match=web:3"))["images"] == []


async def test_a_key_is_shown_once_and_revoked_from_the_list(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    await tab.open()
    await tab.click("Access")
    assert "There are no API keys." in await tab.text()
    await tab.click("Make an API key…")
    await tab.fill("Name", "deploy", "#create-key")
    await tab.fill("What it may do", "repository:local/*:pull", "#create-key")
    await tab.click("Make an API key…", "button")
    await tab.click("Make an API key", "button")
    key = await tab.text(".secret")
    bearer = {"Authorization": f"Bearer {key}"}
    assert (await shop.site.get("/v2/local/app/tags/list", **bearer))[0] == 404
    await tab.click("Access")
    found = await tab.text()
    assert "deploy" in found and "in 90 d" in found and key not in found
    for screen in ("acts", "transfers", "audit"):
        await tab.open(screen)
        assert key not in await tab.do(lambda page: page.content())
    assert key not in shop.audit.read_text()
    await tab.open("access")
    await tab.click("Revoke the key deploy")
    await tab.click("Revoke an API key", "button")
    assert "Done." in await tab.text()
    await tab.click("Access")
    assert "There are no API keys." in await tab.text()
    assert (await shop.site.get("/v2/local/app/tags/list", **bearer))[0] == 401
    # A name that is taken, and no scope: said, and nothing made.
    for form, fault in (("name=x&scopes=", "give at least one"), ("name=x&scopes=nonsense", "nonsense")):
        await tab.open(f"confirm?act=create-key&{form}")
        await tab.click("Make an API key", "button")
        assert fault in await tab.text()
    assert await shop.api("GET", "keys") == []
    tab.said.clear()  # the browser says that the answers were errors


async def test_a_tag_that_is_held_is_rejected_and_approved(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    (held,) = await shop.api("GET", "held")
    for name, kind in (("Reject", "reject"), ("Approve", "approve")):
        await tab.open("policy")
        await tab.click(f"{name} the move of {API}:2")
        assert await tab.do(lambda page: page.get_by_label("Tag and digest").input_value()) == (
            f"{API}:2@{held['candidate']}"
        )
        await tab.click(ACTS[kind].title, "button")
        assert "Done." in await tab.text()
        assert shop.acts()[-1]["operation"] == kind
        assert await tab.violations() == []
    assert await shop.api("GET", "held") == []
    assert (await shop.api("GET", "images?match=docker.io/team/api:2"))["images"][0]["digest"] == held[
        "candidate"
    ]


async def test_by_the_keyboard_alone(shop: Shop, window: Open) -> None:
    """From the first screen to a purge: the link that skips the navigation, links, fields and buttons."""
    tab = await window(shop.admin)
    await tab.open()
    await tab.press("Tab")
    assert await tab.focused() == "Skip to the content"
    await reach(tab, "Storage")
    await tab.press("Enter")
    await tab.see("Evicted next")
    await reach(tab, "Purge…")
    await tab.press("Enter")
    await tab.see("Each is shown again before anything happens.")
    await tab.do(lambda page: page.locator("#purge").get_by_label("Reference or pattern").focus())
    await tab.do(lambda page: page.keyboard.type("web:3"))
    await tab.press("Enter")
    await tab.see("What would be done")
    await reach(tab, "Purge images")
    await tab.press("Space")
    await tab.see("Done.")
    assert shop.acts()[-1]["operation"] == "purge"


async def reach(tab: Any, name: str) -> None:
    """Press the tabulator until this has the focus."""
    for _ in range(60):
        await tab.press("Tab")
        if await tab.focused() == name:
            return
    raise AssertionError(f"{name} cannot be reached")


# What is asked for, and why it cannot be done.
WRONG = (
    ("act=purge&pattern=", "Reference or pattern: is required"),
    ("act=drill&seconds=soon", "such as 1h30m"),
    ("act=evict&to=much", "expected a size"),
    ("act=delete&pattern=local/x:1&keep=-1", "expected a number"),
    ("act=nonsense", "there is no such act"),
    ("act=purge&pattern=web:3&dry_run=yes", "dry_run: there is no such field"),
    ("act=purge&pattern=web:4", "nothing that is stored matches"),
)


async def test_what_cannot_be_done_is_said_before(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    for form, fault in WRONG:
        assert await tab.open(f"confirm?{form}") >= 400
        assert fault in await tab.text()
        assert await tab.count("form[action=act] button") == 0
    tab.said.clear()  # the browser says that the answers were errors


async def test_what_fails_says_why(shop: Shop, window: Open) -> None:
    tab = await window(shop.admin)
    await tab.open("confirm?act=warm&reference=nowhere/at-all:1&referrers=yes")
    await tab.click("Warm an image", "button")
    assert "Done." not in await tab.text()
    assert await tab.count("[role=alert]") == 1
    await tab.open("transfers")
    assert "failed" in await tab.text("main tr:has-text('nowhere/at-all:1')")
    await tab.open("confirm?act=unpin&pattern=nowhere:1")
    await tab.click("Remove a pin", "button")
    assert "nowhere:1 is not pinned" in await tab.text()
    assert shop.acts()[-1]["result"] == "failed"
    tab.said.clear()


async def test_a_page_that_is_read_only_does_nothing(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, window: Open
) -> None:
    shop = await open_shop(serve, upstream, clock, tmp_path, admin_ui="read_only")
    tab = await window(shop.admin)
    for screen in ("storage", "policy?ref=redis", "transfers", "history?ref=web:3", ""):
        assert await tab.open(screen) == 200
        assert await tab.count("form[method=post], a[href*=confirm], a[href*=acts]") == 0, screen
    for screen in ("acts", "confirm?act=purge&pattern=web:3"):
        assert await tab.open(screen) == 403
        assert "read-only" in await tab.text()
    tab.said.clear()
    before = await shop.api("GET", "pins")
    async with shop.site.session.post(
        f"{shop.admin}/ui/act", data={"act": "pin", "pattern": "web:3"}
    ) as response:
        assert response.status == 403
    assert await shop.api("GET", "pins") == before
    assert shop.acts()[-1]["result"] == "refused"


async def test_a_form_of_another_site_does_nothing(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, window: Open
) -> None:
    """Another page on this machine, in the browser that has a session, sends a form to the page."""
    shop = await open_shop(serve, upstream, clock, tmp_path, admin_token=TOKEN)
    tab = await window(shop.admin)
    assert await tab.open("confirm?act=purge&pattern=web:3") == 200
    assert await tab.title() == "Log in"
    await tab.fill("Admin token", TOKEN)
    await tab.click("Log in", "button")
    assert await tab.title() == "Purge images"
    attack = (
        f'<form method="post" action="{shop.admin}/ui/act"><input name="act" value="purge">'
        '<input name="pattern" value="web:3"><input name="csrf" value=""></form>'
        "<script>document.forms[0].submit()</script>"
    )
    evil = f"http://localhost:{shop.site.app.admin_url.port}/evil"  # type: ignore[union-attr]

    async def visit(page: Any) -> str:
        await page.route("**/evil", lambda route: route.fulfill(body=attack, content_type="text/html"))
        await page.goto(evil)
        await page.wait_for_url("**/ui/act")
        return str(await page.locator("main").inner_text())

    assert "refused" in await tab.do(visit) or "Log in" in await tab.text("body")
    tab.said.clear()
    tab.outside.clear()
    lines = [json.loads(each) for each in shop.audit.read_text().splitlines()]
    assert not [each for each in lines if each.get("operation") == "purge" and each["result"] == "done"]
    await tab.open("confirm?act=purge&pattern=web:3")
    await tab.click("Purge images", "button")
    assert "Done." in await tab.text()
