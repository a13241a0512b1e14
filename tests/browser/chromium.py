"""A real browser: Debian's Chromium, driven by Playwright in a thread, for which each page is audited.

Playwright's objects belong to the loop of that thread, so that one browser serves the tests of a process,
each of which has a loop of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Coroutine
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Playwright,
    Request,
    async_playwright,
)

T = TypeVar("T")

# The first draws no window around the page, which is a third of the work.
PROGRAM = next(filter(shutil.which, ("chromium-headless-shell", "chromium")), "chromium")
FLAGS = ("--disable-gpu", "--disable-software-rasterizer")  # a tenth of the work
PICTURES = Path(__file__).parents[2] / "docs" / "images"
TAKE = "ENTREPOT_PICTURES"  # the environment variable with which the pictures of the documentation are taken
SIZE = {"width": 1040, "height": 620}
PATIENCE = 30_000.0  # milliseconds; only what never happens takes them
# What the rules find is the whole of WCAG 2.2 AA and axe's own best practices.
AXE = "async only => (await axe.run(document, {resultTypes: ['violations'], ...only})).violations"
COLORS = {"runOnly": ["color-contrast"]}


class Chromium:
    """The browser of a process of tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chromium", daemon=True)
        self._thread.start()
        self._contexts: dict[bool, BrowserContext] = {}
        self._playwright: Playwright
        self._browser: Browser

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in the loop of the browser."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> None:
        self._playwright = await async_playwright().start()
        self._browser = await self._playwright.chromium.launch(
            executable_path=shutil.which(PROGRAM),
            args=[*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])],
        )

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        await self._browser.close()
        await self._playwright.stop()

    async def open(self, url: str, *, scripts: bool = True) -> Tab:
        """A window without cookies, with or without scripts; `url` is that of the page."""

        async def make() -> Tab:
            if scripts not in self._contexts:  # one is for all tests: to make it costs a second of work
                self._contexts[scripts] = await self._browser.new_context(
                    viewport=SIZE,  # type: ignore[arg-type]
                    reduced_motion="reduce",
                    locale="en-GB",
                    timezone_id="UTC",
                    java_script_enabled=scripts,
                )
                self._contexts[scripts].set_default_timeout(PATIENCE)
            await self._contexts[scripts].clear_cookies()
            return Tab(self, await self._contexts[scripts].new_page(), url)

        return await self.run(make())


class Tab:
    """A window that shows the page of a server; made in the loop of the browser.

    `said` are the errors and warnings of its console, `outside` the requests that went to another server.
    """

    def __init__(self, browser: Chromium, page: Page, url: str) -> None:
        self._browser = browser
        self.page = page
        self.url = url.rstrip("/")
        self.said: list[str] = []
        self.outside: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", self._asked)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def _asked(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.outside.append(request.url)

    async def do(self, work: Callable[[Page], Coroutine[Any, Any, T]]) -> T:
        """Do something with the page, in the loop of the browser."""

        async def there() -> T:  # what `work` makes belongs to that loop, too
            return await work(self.page)

        return await self._browser.run(there())

    # What it shows

    async def open(self, screen: str = "") -> int:
        """Show a screen by its address below the page; the status of the answer."""

        async def go(page: Page) -> int:
            response = await page.goto(f"{self.url}/ui/{screen}")
            assert response is not None
            return response.status

        return await self.do(go)

    async def show(self, url: str) -> None:
        """Show a page that is none of the server's."""
        await self.do(lambda page: page.goto(url, timeout=4 * PATIENCE))  # it may have much to draw

    async def text(self, selector: str = "main") -> str:
        return await self.do(lambda page: page.locator(selector).first.inner_text())

    async def title(self) -> str:
        return await self.text("h1")

    async def see(self, text: str) -> None:
        """Wait until the screen shows this text."""
        await self.do(lambda page: page.get_by_text(text).first.wait_for())

    async def count(self, selector: str) -> int:
        return await self.do(lambda page: page.locator(selector).count())

    async def paint(self, scheme: Any) -> None:
        """Have it light or dark."""
        await self.do(lambda page: page.emulate_media(color_scheme=scheme))

    # What its user does

    async def click(self, name: str, role: Any = None) -> None:
        """Click the link or button with this name, and wait for what it leads to."""

        async def click(page: Page) -> None:
            found: Locator = page.get_by_role("link", name=name, exact=True)
            if role == "button" or not await found.count():
                found = page.get_by_role("button", name=name, exact=True)
            await found.first.click()
            await page.wait_for_load_state()

        await self.do(click)

    async def fill(self, label: str, value: str, within: str = "main") -> None:
        await self.do(lambda page: page.locator(within).get_by_label(label, exact=True).fill(value))

    async def press(self, *keys: str) -> None:
        async def press(page: Page) -> None:
            for each in keys:
                await page.keyboard.press(each)

        await self.do(press)

    async def focused(self) -> str:
        """The text, or the label, of what has the focus."""
        return await self.do(
            lambda page: page.evaluate(
                "() => { const at = document.activeElement;"
                " return at.getAttribute('aria-label') || at.labels?.[0]?.innerText || at.innerText || ''; }"
            )
        )

    # What is found of it

    async def violations(self, only: dict[str, Any] | None = None) -> list[str]:
        """What the audit of accessibility finds: the rule, and the places."""

        async def audit(page: Page) -> list[dict[str, Any]]:
            if await page.evaluate("() => typeof axe") == "undefined":  # else it was audited before
                await page.evaluate(_axe())
            found: list[dict[str, Any]] = await page.evaluate(AXE, only or {})
            return found

        return [
            f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']]}"
            for each in await self.do(audit)
        ]

    async def picture(self, name: str, part: str = "") -> None:
        """Take a picture for the documentation, if that is asked for: of the window, or of a part."""
        if os.environ.get(TAKE):
            PICTURES.mkdir(exist_ok=True)
            path = PICTURES / f"{name}.png"
            await self.do(
                lambda page: (page.locator(part) if part else page).screenshot(
                    path=path, animations="disabled"
                )
            )

    async def close(self) -> None:
        await self.do(lambda page: page.close())
        assert self.said == [], self.said
        assert self.outside == [], self.outside


@cache
def _axe() -> str:
    return files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
