"""Sessions of browsers: a cookie that only somebody who knows the admin token can have obtained.

A cookie is signed with a key derived from the token, and nothing is stored: it holds in every process of a
server, after a restart, and in every replica with the same token.  A new token ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

COOKIE = "entrepot_session"
LIFE = 12 * 3600  # seconds
_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # a stolen cookie is no help to guess a short token


@dataclass(frozen=True, slots=True)
class BrowserSession:
    """A browser that may use the page; `form_token` proves that a form came from it."""

    name: str
    form_token: str


@cache
def _derived(token: str) -> bytes:
    return hashlib.scrypt(token.encode(), salt=b"entrepot session", **_SCRYPT)


class Sessions:
    """Begins, reads and ends sessions.  Without a `token` there are none to begin: all share one."""

    def __init__(self, token: str | None, clock: Callable[[], float]) -> None:
        self._token = token
        self._clock = clock
        self._ended: dict[str, float] = {}  # names of sessions that were ended, and when they would have

    def begin(self, token: str) -> str | None:
        """The value of a new session's cookie; None if the token is wrong."""
        given = token.strip().encode("utf-8", "replace")
        if self._token is None or not hmac.compare_digest(given, self._token.encode()):
            return None
        content = f"{int(self._clock()) + LIFE}.{secrets.token_hex(16)}"
        return f"{content}.{self._sign('session', content)}"

    def read(self, cookie: str) -> BrowserSession | None:
        """The session of a cookie's value; None if it is not ours, too old, or was ended."""
        if self._token is None:
            return BrowserSession("", self._sign("form", ""))
        content, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(
            signature.encode("utf-8", "replace"), self._sign("session", content).encode()
        ):
            return None
        expires, _, name = content.partition(".")
        left = int(expires) - self._clock()
        if not 0 < left <= LIFE or name in self._ended:  # a clock that was set back makes no session longer
            return None
        return BrowserSession(name, self._sign("form", name))

    def end(self, session: BrowserSession) -> None:
        now = self._clock()
        self._ended = {name: end for name, end in self._ended.items() if end > now}
        self._ended[session.name] = now + LIFE

    @cached_property
    def _key(self) -> bytes:
        if self._token is None:
            return secrets.token_bytes(32)
        return _derived(self._token)

    def _sign(self, kind: str, content: str) -> str:
        message = f"{kind} {content}".encode("utf-8", "replace")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()
