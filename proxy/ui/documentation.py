"""The documentation as a site, which the admin listener serves below /docs/.

The pages are files of the package, if they were built before it was: docs/releasing.md says how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path, PurePath

from aiohttp import ETag, web

from proxy.ui.protection import set_headers

SITE = Path(str(files("proxy.ui"))) / "site"
FIRST = "index.html"
ABSENT = (
    "This installation has no documentation: the source that it was installed from had no site.\n"
    "In the source, run: pip install '.[docs]' && python -m mkdocs build\n"
    "Then install it again, unless it is installed in editable mode.\n"
)
DRAWING = "default-src 'none'; style-src 'unsafe-inline'"  # a drawing has its colors in itself
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def documentation(site: Path = SITE) -> web.Application:
    """The application, for whoever reaches the listener: what it shows is known to everybody."""
    application = web.Application()
    application.on_response_prepare.append(_set_headers)
    application.router.add_get("/{path:.*}", SiteFiles(site).answer)
    return application


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    await set_headers(request, response)
    if response.content_type == _TYPES[".svg"]:
        response.headers["Content-Security-Policy"] = DRAWING


class SiteFiles:
    """The files below a directory, by their paths, with the digests of their content as entity tags."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: Mapping[PurePath, Path] = {}

    async def answer(self, request: web.Request) -> web.Response:
        path = self._find(request.match_info["path"] or FIRST)
        if path is None:
            missing = "There is no such page of the documentation.\n" if self._known else ABSENT
            return web.Response(status=404, text=missing)
        body = path.read_bytes()
        tag = ETag(hashlib.sha256(body).hexdigest()[:32])
        known = request.if_none_match or ()
        unchanged = any(each.value in (tag.value, "*") for each in known)
        response = web.Response(status=304) if unchanged else web.Response(body=body)
        if not unchanged:
            response.content_type = _TYPES.get(path.suffix, "text/plain")
            response.charset = None if path.suffix == ".png" else "utf-8"
        response.etag = tag
        response.headers["Cache-Control"] = "no-cache"  # kept, but asked for each time
        return response

    def _find(self, name: str) -> Path | None:
        # What a request names is only looked up: it never becomes a path.
        if not self._known:
            self._known = {
                path.relative_to(self._directory): path
                for path in self._directory.rglob("*")
                if path.is_file()
            }
        return self._known.get(PurePath(name))
