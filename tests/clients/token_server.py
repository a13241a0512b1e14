"""A token server, after Distribution's "Token Authentication Specification": a login gets what it wants."""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jws
from joserfc.jwk import ECKey

SERVICE, ISSUER = "registry.example", "tokens.example"


class TokenServer:
    """Its public key is in `keys`.  Nobody in particular gets a token that grants nothing."""

    def __init__(self, directory: Path, user: str, password: str) -> None:
        private = ec.generate_private_key(ec.SECP256R1())
        self.keys = directory / "token-keys.pem"
        self.keys.write_bytes(
            private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._key = ECKey.import_key(pem)
        self._right = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._user = user
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                server.asked.append(self.path)
                status, body = server.issue(self.headers.get("Authorization", ""), query)
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:  # OAuth: clients then take the other way
                self.send_error(404)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def issue(self, authorization: str, query: dict[str, list[str]]) -> tuple[int, object]:
        scheme, _, given = authorization.partition(" ")
        known = scheme == "Basic" and given == self._right
        if scheme and not known:
            return 401, {"details": "incorrect user name or password"}
        scopes = [scope.rpartition(":") for each in query.get("scope", []) for scope in each.split()]
        access = [
            {"type": kind, "name": name, "actions": actions.split(",")}
            for what, _, actions in scopes
            for kind, _, name in [what.partition(":")]
        ]
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": query.get("service", [""])[0],
            "sub": self._user if known else "",
            "exp": now + 300,
            "nbf": now,
            "iat": now,
            "jti": str(len(self.asked)),
            "access": access if known else [],
        }
        header = {"typ": "JWT", "alg": "ES256", "kid": "some"}
        token = jws.serialize_compact(header, json.dumps(claims), self._key)
        return 200, {"token": token, "expires_in": 300}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
