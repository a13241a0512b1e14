"""Who may use the page, and what a browser may do with it.

With an admin token a session is needed, which a login begins.  Without one the page is for this machine
alone, as the API is.  An act is a POST of a form with the token of its session.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import structlog
from aiohttp import web

from proxy.admin.api.app import check_body, check_page
from proxy.admin.api.audited import ADMITTED
from proxy.config.schema import Config
from proxy.namespaces.references import FieldInvalid
from proxy.ui.rendering import PREFIX, SESSION, STATIC, Renderer
from proxy.ui.sessions import COOKIE, LIFE, Sessions
from storage.concurrency import Cancelled
from storage.errors import RegistryError

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LOGIN, LOGOUT = "login", "logout"
# A screen with its query: what leads elsewhere begins with a scheme or a slash.
_SCREEN = re.compile(r"[a-z_-]*(\?[!-~]*)?")


class Protection:
    """The middlewares of the page, and its login."""

    def __init__(self, config: Config, sessions: Sessions, renderer: Renderer) -> None:
        self._sessions = sessions
        self._renderer = renderer
        self._token = config.admin_token is not None
        self._loopback = config.admin is not None and config.admin.loopback
        self._encrypted = config.admin_tls() is not None
        self._acts = config.admin_ui == "on"

    def middlewares(self) -> list[Any]:
        @web.middleware
        async def explained(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._explained(request, handler)

        @web.middleware
        async def admitted(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._admit(request) or await handler(request)

        return [explained, admitted]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/" + LOGIN, self._ask),
            web.post("/" + LOGIN, self._begin),
            web.post("/" + LOGOUT, self._end),
        ]

    # Admission

    async def _admit(self, request: web.Request) -> web.Response | None:
        """The way to the login, for a browser without a session.

        Raises HTTPException for a request that may not see the page, or may not act.
        """
        screen = request.path.removeprefix(PREFIX)
        if not self._token and not self._loopback:
            raise web.HTTPForbidden(
                reason="other machines reach this listener, and no token is configured: set admin_token"
            )
        if not self._token:
            check_page(request)
        session = self._sessions.read(request.cookies.get(COOKIE, ""))
        if session is not None:
            request[SESSION], request[ADMITTED] = session, True
        if request.method not in ("GET", "HEAD"):
            await self._check_act(request, screen)
        elif session is None and screen not in (LOGIN, *STATIC):
            return redirect(_login(request, screen))
        return None

    async def _check_act(self, request: web.Request, screen: str) -> None:
        check_body(request)
        if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise web.HTTPForbidden(reason="forms of other sites are refused")
        if screen == LOGIN:
            return  # whoever knows the token may do everything
        session = request.get(SESSION)
        if session is None:
            raise web.HTTPUnauthorized(reason="the session has ended: log in again")
        given = (await request.post()).get("csrf")
        if not isinstance(given, str) or not hmac.compare_digest(
            given.encode("utf-8", "replace"), session.form_token.encode()
        ):
            raise web.HTTPForbidden(reason="the form is not of this session: load the page again")
        if not self._acts and screen != LOGOUT:
            raise web.HTTPForbidden(reason="the page is read-only: admin_ui is read_only")

    # Login

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        target = _target(request.query.get("next", ""))
        if SESSION in request:
            return redirect(target)
        return self._renderer.page(request, "login.html", "Log in", next=target, wrong=False)

    async def _begin(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        target, token = _target(str(form.get("next", ""))), str(form.get("token", ""))
        if not self._token:
            return redirect(target)
        if (cookie := self._sessions.begin(token)) is None:
            return self._renderer.page(request, "login.html", "Log in", status=401, next=target, wrong=True)
        request[ADMITTED] = True
        response = redirect(target)
        # Without a path, the cookie is for the directory of this page, as the browser sees it.
        response.set_cookie(
            COOKIE,
            cookie,
            path="",
            max_age=LIFE,
            httponly=True,
            samesite="Strict",
            secure=self._encrypted or request.headers.get("X-Forwarded-Proto", "").lower() == "https",
        )
        return response

    async def _end(self, request: web.Request) -> web.StreamResponse:
        self._sessions.end(request[SESSION])
        response = redirect(LOGIN)
        response.set_cookie(COOKIE, "", path="", max_age=0)
        return response

    # Errors

    async def _explained(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The handler's answer, or a page that says why there is none."""
        try:
            return await handler(request)
        except web.HTTPRedirection as error:
            return redirect(error.headers["Location"])  # which the admin API would make an error
        except web.HTTPException as error:
            answer = self._fault(request, error.status, error.reason)
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except FieldInvalid as error:
            return self._fault(request, 400, str(error))
        except RegistryError as error:
            answer = self._fault(request, error.status, str(error))
            if error.retry_after is not None:
                answer.headers["Retry-After"] = str(math.ceil(error.retry_after))
            return answer
        except Cancelled:
            return self._fault(request, 503, "the server is shutting down: the operation was stopped")
        except Exception as error:
            log.exception("ui.failed", method=request.method, path=request.path[:300], error=str(error))
            return self._fault(request, 500, "internal error: see the log")

    def _fault(self, request: web.Request, status: int, sentence: str) -> web.Response:
        title = _TITLES.get(status, "This did not work")
        return self._renderer.page(request, "error.html", title, status=status, sentence=sentence)


_TITLES = {
    400: "This cannot be read",
    401: "Log in first",
    403: "Not allowed",
    404: "Not found",
    405: "Not allowed here",
    500: "The server failed",
    503: "Not available now",
}


def redirect(location: str) -> web.Response:
    """Lead from a form to a screen, by a relative address."""
    return web.Response(status=303, headers={"Location": location})


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Called before the head of each answer is sent."""
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def _login(request: web.Request, screen: str) -> str:
    """The login, which leads back to the screen."""
    query = f"?{request.query_string}" if request.query_string else ""
    there = screen + query
    root = "../" * screen.count("/")
    return f"{root}{LOGIN}?next={quote(there, safe='')}" if _SCREEN.fullmatch(there) else root + LOGIN


def _target(text: str) -> str:
    """A screen of ours to go to; the first if `text` names none."""
    return text if text and _SCREEN.fullmatch(text) and text != "login" else "./"
