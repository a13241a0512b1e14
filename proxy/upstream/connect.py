"""How connections to an upstream are made."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import aiohttp

from proxy.connections.trust import client_context, insecure_context, shared_context
from proxy.upstream.socket_body import LEAST

HEADER_LIMIT = 64 << 10  # bytes of one header: signed URLs in Location are long
READ = 1 << 20  # bytes buffered of a body before its socket is paused


@dataclass(frozen=True)
class Connect:
    """How to connect to an upstream; times are in seconds.

    `header_timeout` covers connecting and waiting for the response's headers, `progress_timeout` each wait
    for more of the response's body, or for a chunk of the request's body to be sent.  `write_timeout` covers
    the wait for the response to a request that writes, once its body is sent: registries hash and move
    content before they answer.  Without `private_home` the upstream itself must not have a private address.
    Its certificate is for `server_name`, by default for the host of its URL.  With `trace`, requests to it
    say of which trace they are.  A server that sends nothing for `silence` is pinged: see liveness.py.
    Bodies of `least` bytes or more are read by threads: see socket_body.py.
    """

    ca_file: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    proxy: str | None = None
    plain_http: bool = False
    private_redirects: bool = False
    private_home: bool = True
    insecure_skip_verify: bool = False
    server_name: str | None = None
    trace: bool = False
    connect_timeout: float = 3.0
    header_timeout: float = 10.0
    progress_timeout: float = 60.0
    write_timeout: float = 300.0
    silence: float | None = None
    least: int = LEAST

    def ssl_context(self) -> ssl.SSLContext:
        """Raises OSError if a file cannot be read, ssl.SSLError if it is invalid."""
        if not (self.ca_file or self.client_certificate or self.insecure_skip_verify):
            return shared_context()
        context = (insecure_context if self.insecure_skip_verify else client_context)(self.ca_file)
        if self.client_certificate is not None:
            context.load_cert_chain(self.client_certificate, self.client_key)
        return context


def open_session(
    context: ssl.SSLContext, new_socket: Callable[[Any], socket] | None
) -> aiohttp.ClientSession:
    """A pool of connections, whose sockets are made by `new_socket`."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=0, ttl_dns_cache=30, socket_factory=new_socket),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        requote_redirect_url=False,
        read_bufsize=READ,
        max_line_size=HEADER_LIMIT,
        max_field_size=HEADER_LIMIT,
        headers={"User-Agent": "entrepot", "Accept-Encoding": "identity"},
    )
    session._retry_connection = False  # its own silent retry would double each of ours
    return session
