"""The documentation on the admin listener: for everybody, and strict about what its pages may do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from proxy.ui.documentation import DRAWING, documentation
from proxy.ui.protection import HEADERS
from tests.conftest import Serve
from tests.upstream import Upstream

FILES = {
    "index.html": ("<!doctype html>é", "text/html; charset=utf-8"),
    "style.css": ("a { }", "text/css; charset=utf-8"),
    "search/index.json": ("{}", "application/json; charset=utf-8"),
    "files/entrepot.service": ("[Unit]", "text/plain; charset=utf-8"),
    "images/a.svg": ("<svg/>", "image/svg+xml; charset=utf-8"),
    "images/a.png": ("PNG", "image/png"),
}
Client = TestClient[web.Request, web.Application]


async def open_client(directory: Path) -> Client:
    admin = web.Application()
    admin.add_subapp("/docs", documentation(directory))
    client: Client = TestClient(TestServer(admin))
    await client.start_server()
    return client


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    site = tmp_path / "site"
    for name, (text, _) in FILES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (tmp_path / "secret").write_text("secret")
    made = await open_client(site)
    yield made
    await made.close()


@pytest.mark.parametrize("name", FILES)
async def test_files_have_their_types_and_the_headers_of_the_web_page(client: Client, name: str) -> None:
    async with client.get(f"/docs/{name}") as answer:
        assert (answer.status, await answer.text(), answer.headers["Content-Type"]) == (200, *FILES[name])
        drawing = {"Content-Security-Policy": DRAWING} if name.endswith(".svg") else {}
        assert {**HEADERS, **drawing}.items() <= dict(answer.headers).items()
        assert answer.headers["Cache-Control"] == "no-cache"


async def test_the_first_page_is_at_the_prefix(client: Client) -> None:
    async with client.get("/docs/") as answer:
        assert await answer.text() == FILES["index.html"][0]
    async with client.head("/docs/") as answer:
        assert (answer.status, answer.content_length) == (200, len(FILES["index.html"][0].encode()))


async def test_what_has_not_changed_is_not_sent_again(client: Client, tmp_path: Path) -> None:
    async with client.get("/docs/style.css") as answer:
        tag = answer.headers["ETag"]
    for given, status in ((tag, 304), (f'"x", W/{tag}', 304), ("*", 304), ('"x"', 200)):
        async with client.get("/docs/style.css", headers={"If-None-Match": given}) as answer:
            assert (answer.status, answer.headers["ETag"]) == (status, tag)
    (tmp_path / "site" / "style.css").write_text("b { }")  # as long as before
    async with client.get("/docs/style.css", headers={"If-None-Match": tag}) as answer:
        assert (answer.status, await answer.text()) == (200, "b { }")


FOREIGN = (
    "none.html",
    "search",
    "search/",
    "../secret",
    "%2e%2e/secret",
    "..%2fsecret",
    "files/../../secret",
    "{directory}/secret",
    "/etc/passwd",
    "%00",
    "a" * 5000,
)


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path[:20])
async def test_only_files_of_the_site_are_served(client: Client, tmp_path: Path, path: str) -> None:
    url = URL(f"/docs/{path.format(directory=tmp_path)}", encoded=True)
    async with client.get(url) as answer:
        assert (answer.status, await answer.text() == "secret") == (404, False)


async def test_an_installation_without_the_site_says_how_to_build_it(tmp_path: Path) -> None:
    client = await open_client(tmp_path / "site")
    async with client.get("/docs/index.html") as answer:
        assert (answer.status, answer.content_type) == (404, "text/plain")
        assert "python -m mkdocs build" in await answer.text()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("built")
    async with client.get("/docs/index.html") as answer:
        assert (answer.status, await answer.text()) == (200, "built")
    await client.close()


@pytest.mark.parametrize("top", [{}, {"admin_token": "t", "admin": "0.0.0.0:0"}])
async def test_the_admin_listener_has_it_for_everybody(
    serve: Serve, upstream: Upstream, top: dict[str, str]
) -> None:
    site = await serve(upstream, top={"admin_ui": "on", **top})
    async with aiohttp.ClientSession(str(site.app.admin_url)) as session:
        async with session.get("/docs/", headers={"Host": "admin.example"}) as answer:
            assert "documentation" in await answer.text()  # or what says that it is not built
            assert HEADERS.items() <= dict(answer.headers).items()
        async with session.get("/docs", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (302, "docs/")
        for method in ("POST", "PUT", "DELETE"):
            async with session.request(method, "/docs/", json={}) as answer:
                assert answer.status in (401, 405)
        async with session.get("/ui/login" if top else "/ui/") as answer:
            assert 'href="../docs/"' in await answer.text()


async def test_without_the_web_page_it_is_not_there(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"admin_ui": "off"})
    async with aiohttp.ClientSession(str(site.app.admin_url)) as session:
        for path in ("/docs", "/docs/"):
            async with session.get(path, allow_redirects=False) as answer:
                assert (answer.status, answer.content_type) == (404, "application/json")
