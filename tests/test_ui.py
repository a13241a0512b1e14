"""The web page: who may see it, what browsers are told, and that it works under any path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import aiohttp
import pytest

from proxy.ui.sessions import COOKIE, LIFE, Sessions
from tests.conftest import Clock, Serve
from tests.upstream import Upstream

TOKEN = "correct horse"


class Page(HTMLParser):
    """The elements of a page: the attributes of each by its name, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def links(self) -> list[str]:
        """All that the page leads to or loads."""
        named = {"a": "href", "link": "href", "script": "src", "img": "src", "form": "action"}
        found = (each.get(name) for tag, name in named.items() for each in self.elements.get(tag, []))
        return [each for each in found if each is not None]

    @property
    def form_token(self) -> str:
        return next(str(each["value"]) for each in self.elements["input"] if each["name"] == "csrf")


class Browser:
    """A client that keeps cookies, and follows no redirect by itself."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, str]:
        async with self.session.request(
            method, self.url + path, allow_redirects=False, **options
        ) as response:
            return response.status, response.headers, await response.text()

    async def see(self, path: str, status: int = 200) -> Page:
        found, _, text = await self.ask("GET", path)
        assert found == status, text
        return Page(text)

    async def login(self, token: str = TOKEN, **more: str) -> tuple[int, Any, str]:
        return await self.ask("POST", "/ui/login", data={"token": token, **more})


Open = Callable[..., Awaitable[Browser]]


@pytest.fixture
async def browse(serve: Serve, upstream: Upstream) -> AsyncIterator[Open]:
    """A browser, and the server that it shows; the arguments are keys of the configuration."""
    sessions = []

    async def start(**top: Any) -> Browser:
        site = await serve(upstream, top={"admin_ui": "on", **top})
        session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        sessions.append(session)
        return Browser(session, str(site.app.admin_url).rstrip("/"))

    yield start
    for each in sessions:
        await each.close()


SCREENS = ("", "repositories", "why", "why?ref=alpine:3")


# Who may see it


async def test_this_machine_needs_no_token(browse: Open) -> None:
    browser = await browse()
    for path in ("/", "/ui"):
        status, headers, _ = await browser.ask("GET", path)
        assert (status, urljoin(f"http://x/below{path}", headers["Location"])) == (302, "http://x/below/ui/")
    for screen in SCREENS:
        page = await browser.see(f"/ui/{screen}")
        assert "form" not in page.elements or "logout" not in page.links


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
async def test_a_page_of_another_site_sees_nothing(browse: Open, headers: dict[str, str]) -> None:
    status, _, text = await (await browse()).ask("GET", "/ui/", headers=headers)
    assert status == 403
    assert "Hit ratio" not in text


async def test_without_a_token_other_machines_see_nothing(browse: Open) -> None:
    browser = await browse(admin="0.0.0.0:0")
    assert "set admin_token" in (await browser.see("/ui/", 403)).text


async def test_a_session_begins_by_the_token_and_ends_by_a_logout(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    status, headers, _ = await browser.ask("GET", "/ui/why?ref=alpine:3")
    assert (status, headers["Location"]) == (303, "login?next=why%3Fref%3Dalpine%3A3")
    login = await browser.see("/ui/" + headers["Location"])
    assert {"name": "next", "value": "why?ref=alpine:3", "type": "hidden"} in login.elements["input"]
    status, headers, text = await browser.login("wrong", next="why?ref=alpine:3")
    assert (status, "Set-Cookie" in headers) == (401, False)
    assert "not the admin token" in text
    status, headers, _ = await browser.login(next="why?ref=alpine:3")
    assert (status, headers["Location"]) == (303, "why?ref=alpine:3")
    flags = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", f"Max-Age={LIFE}"} <= set(flags)
    assert not [each for each in flags if each.startswith(("Path", "Domain", "Secure"))]
    page = await browser.see("/ui/why?ref=alpine:3")
    kept = flags[0].partition("=")[2]
    status, headers, _ = await browser.ask("POST", "/ui/logout", data={"csrf": page.form_token})
    assert (status, headers["Location"]) == (303, "login")
    assert (await browser.ask("GET", "/ui/"))[0] == 303
    stolen = {"Cookie": f"{COOKIE}={kept}"}
    assert (await browser.ask("GET", "/ui/", headers=stolen))[0] == 303


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/", "javascript:alert(1)", "why?a\r\nX: y", "..", ""],
)
async def test_a_login_leads_to_a_screen_only(browse: Open, target: str) -> None:
    _, headers, _ = await (await browse(admin_token=TOKEN)).login(next=target)
    assert headers["Location"] == "./"


async def test_the_cookie_is_secure_where_the_proxy_uses_tls(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    headers = {"X-Forwarded-Proto": "https"}
    _, given, _ = await browser.ask("POST", "/ui/login", data={"token": TOKEN}, headers=headers)
    assert "Secure" in given["Set-Cookie"].split("; ")


async def test_a_form_needs_the_token_of_its_session(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    assert (await browser.ask("POST", "/ui/logout", data={"csrf": ""}))[0] == 401
    await browser.login()
    page = await browser.see("/ui/")
    for data in ({}, {"csrf": ""}, {"csrf": "0" * 64}, {"csrf": "é"}):
        assert (await browser.ask("POST", "/ui/logout", data=data))[0] == 403, data
    foreign = {"Sec-Fetch-Site": "cross-site"}
    data = {"csrf": page.form_token}
    assert (await browser.ask("POST", "/ui/logout", data=data, headers=foreign))[0] == 403
    assert (await browser.ask("POST", "/ui/logout", data=data))[0] == 303


async def test_the_api_takes_no_session(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    await browser.login()
    assert (await browser.ask("GET", "/api/v1/pins"))[0] == 401


async def test_there_may_be_no_page(browse: Open) -> None:
    browser = await browse(admin_ui="off")
    for path in ("/", "/ui", "/ui/", "/ui/why"):
        assert (await browser.ask("GET", path))[0] == 404


# Sessions


def test_a_session_holds_for_twelve_hours_in_all_processes(clock: Clock) -> None:
    cookie = Sessions(TOKEN, clock).begin(TOKEN)
    assert cookie is not None
    other = Sessions(TOKEN, clock)
    session = other.read(cookie)
    assert session is not None
    assert session == Sessions(TOKEN, clock).read(cookie)
    assert Sessions("another", clock).read(cookie) is None
    clock.advance(LIFE - 1)
    assert other.read(cookie) == session
    clock.advance(1)
    assert other.read(cookie) is None


def test_a_clock_that_is_set_back_makes_no_session_longer(clock: Clock) -> None:
    sessions = Sessions(TOKEN, clock)
    cookie = sessions.begin(TOKEN)
    assert cookie is not None
    clock.advance(-60)
    assert sessions.read(cookie) is None


@pytest.mark.parametrize("change", ["", "x", "..", "é.é.é", "1.2.3", "9999999999.a." + "0" * 64])
def test_what_we_did_not_sign_is_no_session(clock: Clock, change: str) -> None:
    assert Sessions(TOKEN, clock).read(change) is None


def test_no_part_of_a_cookie_can_be_changed(clock: Clock) -> None:
    sessions = Sessions(TOKEN, clock)
    cookie = str(sessions.begin(TOKEN))
    for at in range(len(cookie)):
        changed = cookie[:at] + ("1" if cookie[at] != "1" else "2") + cookie[at + 1 :]
        assert sessions.read(changed) is None
    assert sessions.read(cookie) is not None


def test_sessions_have_form_tokens_of_their_own(clock: Clock) -> None:
    sessions = Sessions(TOKEN, clock)
    first, second = (sessions.read(str(sessions.begin(TOKEN))) for _ in range(2))
    assert first is not None and second is not None
    assert first.form_token != second.form_token
    assert Sessions(None, clock).read("") != Sessions(None, clock).read("")  # of two servers


# What browsers are told


async def test_every_answer_forbids_what_the_page_does_not_do(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    anonymous = [await browser.ask("GET", f"/ui/{path}") for path in ("", "login", "a/b", "style.css")]
    await browser.login()
    answers = [await browser.ask("GET", f"/ui/{path}") for path in (*SCREENS, "nowhere", "page.js")]
    for status, headers, text in (*anonymous, *answers):
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("DENY", "nosniff")
        kept = status == 200 and headers["Content-Type"].partition(";")[0] != "text/html"
        assert ("no-store" in headers["Cache-Control"]) != kept
        if headers.get("Content-Type", "").startswith("text/html"):
            page = Page(text)
            assert all(each.get("src") for each in page.elements.get("script", []))
            assert not [each for tags in page.elements.values() for each in tags if "style" in each]


@pytest.mark.clients
async def test_links_are_relative_and_lead_somewhere(browse: Open) -> None:
    browser = await browse(admin_token=TOKEN)
    await browser.login()
    for screen in (*SCREENS, "a/b/c"):
        page = await browser.see(f"/ui/{screen}", 404 if "/" in screen else 200)
        assert page.links
        for link in page.links:
            there = urljoin(f"http://x/below/ui/{screen}", link)
            if there == "http://x/below/docs/":  # the documentation, which may not be built
                continue
            assert there.startswith("http://x/below/ui/"), link
            if not there.endswith("/logout") and not link.startswith("#"):
                status, _, _ = await browser.ask(
                    "GET", there.removeprefix("http://x/below").partition("#")[0]
                )
                assert status == 200, link


async def test_errors_are_pages(browse: Open) -> None:
    browser = await browse()
    assert "Not found" in (await browser.see("/ui/nowhere", 404)).text
    status, headers, text = await browser.ask("DELETE", "/ui/why")
    assert (status, headers["Content-Type"]) == (403, "text/html; charset=utf-8")
    assert "load the page again" in text
    page = await browser.see("/ui/why?ref=%3Cscript%3Ealert(1)%3C/script%3E", 400)
    assert len(page.elements["script"]) == 1
