"""An issuer of OpenID Connect for tests: it rotates its keys, answers wrong things, and dies."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from functools import cache
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jws
from joserfc.jwk import ECKey, RSAKey

from tests.conftest import Clock

AUDIENCE = "registry.example"
PATIENCE = 20.0  # seconds; only what never comes takes them
METADATA = "/.well-known/openid-configuration"


@cache
def rsa_key(number: int = 0, bits: int = 2048) -> Any:
    return rsa.generate_private_key(65537, bits)


def public(key: Any, **members: Any) -> dict[str, Any]:
    """The key as a member of a JWKS."""
    return {**key.as_dict(private=False), **members}


class Issuer:
    """Its keys by their names; the last one signs.  It is to be started before its URL is known.

    answers: for a path, the status, the headers and the body in place of what it says by itself
    gate: closed, nobody is answered
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.signing: dict[str, Any] = {}
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.headers: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.authorizations: list[str | None] = []
        self.conditions: list[str | None] = []
        self.gate: asyncio.Event | None = None
        self._came = asyncio.Event()
        self._port = 0
        self._scheme = "http"
        self._runner: web.ServerRunner | None = None
        self.rotate("first")

    @property
    def url(self) -> str:
        return f"{self._scheme}://localhost:{self._port}"

    def rotate(self, kid: str, *, keep: bool = True) -> None:
        """Sign by a new key from now on; without `keep` the former ones are gone."""
        if not keep:
            self.signing.clear()
        self.signing[kid] = ECKey.import_key(ec.generate_private_key(ec.SECP256R1()))

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        """After stop() on the same port as before."""
        self._scheme = "https" if context else "http"
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def was_asked(self, number: int, path: str = "/keys") -> None:
        async with asyncio.timeout(PATIENCE):
            while self.asked[path] < number:
                self._came.clear()
                await self._came.wait()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked[request.path] += 1
        self.authorizations.append(request.headers.get("Authorization"))
        self.conditions.append(request.headers.get("If-None-Match"))
        self._came.set()
        if self.gate is not None:
            await self.gate.wait()
        if request.path in self.answers:
            status, headers, body = self.answers[request.path]
            return web.Response(status=status, headers=headers, body=body)
        if request.path == METADATA:
            document: Any = {"issuer": self.url, "jwks_uri": f"{self.url}/keys", "other": [1]}
        elif request.path == "/keys":
            document = {"keys": [public(key, kid=kid) for kid, key in self.signing.items()]}
        else:
            return web.Response(status=404)
        if request.headers.get("If-None-Match", "-") == self.headers.get("ETag"):
            return web.Response(status=304, headers=self.headers)
        return web.Response(body=json.dumps(document).encode(), headers=self.headers)

    def claims(self, **given: Any) -> dict[str, Any]:
        now = self._clock.now
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "repo:acme/app:ref:refs/heads/main",
            "repository_owner": "acme",
            "repository": "acme/app",
            "exp": now + 300,
            "nbf": now,
            "iat": now,
        }
        return {name: value for name, value in {**claims, **given}.items() if value is not None}

    def issue(self, kid: str | None = None, header: dict[str, Any] | None = None, **given: Any) -> str:
        """A token by the last key, or that named `kid`."""
        name = kid or list(self.signing)[-1]
        return signed(self.signing[name], self.claims(**given), {"kid": name, "typ": "JWT", **(header or {})})


def signed(key: Any, claims: dict[str, Any], header: dict[str, Any], algorithm: str = "ES256") -> str:
    headers = {"alg": algorithm, **{name: each for name, each in header.items() if each is not None}}
    registry = jws.JWSRegistry(algorithms=[headers["alg"]], strict_check_header=False)
    return jws.serialize_compact(headers, json.dumps(claims), key, [headers["alg"]], registry=registry)


def rsa_jwk(number: int = 0, bits: int = 2048) -> RSAKey:
    return RSAKey.import_key(rsa_key(number, bits))


def server_context(files: dict[str, str]) -> ssl.SSLContext:
    """That of a server with a certificate of tests.authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["certificate"], files["key"])
    return context
