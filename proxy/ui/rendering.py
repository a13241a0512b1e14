"""Templates, and what all of them show: the navigation, the form token, numbers for people."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.admin.notices import warnings
from proxy.config.quantities import (
    format_duration,
    format_past,
    format_share,
    format_size,
    format_time,
    plural,
)
from proxy.ui.listing import link
from proxy.ui.sessions import BrowserSession

if TYPE_CHECKING:
    from jinja2 import Environment

SESSION = web.RequestKey("session", BrowserSession)
PREFIX = "/ui/"
SHORT = 12  # characters of a digest
ACTS = "acts"  # the screen of what changes something
# The screens in the navigation: their path below the prefix, and their name.
NAVIGATION = (
    ("", "Overview"),
    ("repositories", "Repositories"),
    ("transfers", "Transfers"),
    ("history", "History"),
    ("storage", "Storage"),
    ("policy", "Policy"),
    ("access", "Access"),
    ("audit", "Audit"),
    ("why", "Why"),
    (ACTS, "Actions"),
)
SECTIONS = {
    "repository": "repositories",
    "image": "repositories",
    "files": "repositories",
    "diff": "history",
    "confirm": ACTS,
    "act": ACTS,
}
STATIC = {
    "style.css": "text/css",
    "page.js": "text/javascript",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class Renderer:
    """Makes pages of templates.  `acts` says whether the page may change anything, `login` whether a token is
    needed.

    All links are relative, and all screens are one level below the prefix: so the page works under any path.
    """

    def __init__(self, clock: Callable[[], float], *, acts: bool, login: bool) -> None:
        self._clock = clock
        self._acts = acts
        self._login = login

    def page(
        self, request: web.Request, template: str, title: str, *, status: int = 200, **values: object
    ) -> web.Response:
        """A template as an answer; `values` are what it names, beside what base.html says."""
        session = request.get(SESSION)
        path = request.path.removeprefix(PREFIX)
        common: dict[str, object] = {
            "title": title,
            "here": path,
            "section": SECTIONS.get(path, path),
            "root": "../" * path.count("/"),
            "navigation": [each for each in NAVIGATION if self._acts or each[0] != ACTS] if session else (),
            "csrf": session.form_token if session else "",
            "acts": self._acts and session is not None,
            "login": self._login and session is not None,
            "version": self.version,
            "now": self._clock(),
            "warnings": warnings(),
        }
        text = self._templates.get_template(template).render(common | values)
        # What clients and upstreams say may hold characters that cannot be encoded.
        body = text.encode("utf-8", "replace")
        return web.Response(body=body, status=status, content_type="text/html", charset="utf-8")

    def part(self, template: str, **values: object) -> str:
        """A template that is a part of a page, as text."""
        return self._templates.get_template(template).render(values)

    @cached_property
    def version(self) -> str:
        """Changes with the files that browsers keep."""
        return hashlib.sha256(b"".join(map(static, STATIC))).hexdigest()[:SHORT]

    @cached_property
    def _templates(self) -> Environment:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # only a server whose page is used

        from proxy.ui.bytecode import BYTECODE

        made = Environment(
            loader=PackageLoader("proxy.ui"),
            bytecode_cache=BYTECODE,
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        made.filters |= {
            "size": format_size,
            "share": format_share,
            "duration": format_duration,
            "number": lambda count: "?" if count is None else f"{count:,}",
            "plural": plural,
            "ago": lambda time: format_past(time, self._clock()),
            "when": lambda time: format_time(time, self._clock()),
            "iso": iso,
            "short": short,
            "host": lambda url: url.partition("//")[2],
            "media": media,
            "mode": stat.filemode,
        }
        made.globals["link"] = link
        return made


def static(name: str) -> bytes:
    """The content of a file that every page uses."""
    return files("proxy.ui").joinpath("static", name).read_bytes()


def iso(time: float) -> str:
    """Seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def short(digest: str) -> str:
    """The algorithm and first characters of a digest."""
    algorithm, colon, encoded = digest.partition(":")
    return f"{algorithm}:{encoded[:SHORT]}" if colon else digest


def media(kind: str | None) -> str:
    """A media type without what all of them begin with."""
    return (kind or "").removeprefix("application/").removeprefix("vnd.")
