"""Caddy and nginx before the server, with the configurations of docs/tls.md, but for addresses and files."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.authority import Authority
from tests.clients.conftest import Images
from tests.clients.images import digest_of
from tests.clients.processes import Process, environment, free_port, require, run
from tests.clients.site import Site

MANUAL = Path(__file__).parent.parent.parent / "docs" / "tls.md"
PATIENCE = 20.0  # seconds; only a proxy that waits for what it should pass on takes them
MiB = 1 << 20

# What keeps Caddy from the trust, the ports and the sockets of this machine.
_ALONE = "{\n\tskip_install_trust\n\tauto_https disable_redirects\n\tadmin off\n}\n"
AROUND = """
daemon off;
user root;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr notice;
events {{}}
http {{
access_log off;
client_body_temp_path {directory}/body;
proxy_temp_path {directory}/proxy;
fastcgi_temp_path {directory}/fastcgi;
uwsgi_temp_path {directory}/uwsgi;
scgi_temp_path {directory}/scgi;
{server}
}}
"""


class Proxy:
    """At https://127.0.0.1:`port`; `ca` is whom its clients are to trust."""

    def __init__(self, port: int, ca: Path) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._context = ssl.create_default_context(cafile=ca)
        self.certificates = ca.parent / "trusted"
        self.certificates.mkdir()
        shutil.copyfile(ca, self.certificates / "ca.crt")

    def connect(self) -> HTTPSConnection:
        return HTTPSConnection("127.0.0.1", self.port, context=self._context, timeout=PATIENCE)

    def wire(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        return self._context.wrap_socket(plain, server_hostname="127.0.0.1")


def documented(kind: str, changes: dict[str, str]) -> str:
    """The one block of that kind in the manual, with each of `changes` made."""
    text: str
    (text,) = re.findall(rf"(?s)```{kind}\n(.*?)```", MANUAL.read_text())
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@contextmanager
def caddy(directory: Path, behind: int) -> Iterator[Proxy]:
    require("caddy", root=False)
    port = free_port()
    changes = {"registry.example.com": f"127.0.0.1:{port}", "127.0.0.1:5000": f"127.0.0.1:{behind}"}
    file = directory / "Caddyfile"
    file.write_text(_ALONE + documented("caddyfile", changes))
    places = {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    command = ["caddy", "run", "--config", file, "--adapter", "caddyfile"]
    process = Process(command, environment(directory, **places), ready="serving initial configuration")
    try:
        process.wait_for("certificate obtained successfully")
        proxy = Proxy(port, directory / "caddy/pki/authorities/local/root.crt")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                proxy.wire().close()
                break
            except ssl.SSLError:  # it says so a moment before it uses it, and says nothing then
                assert time.monotonic() < deadline
        yield proxy
    finally:
        process.stop()


@contextmanager
def nginx(directory: Path, behind: int) -> Iterator[Proxy]:
    require("nginx")
    port = free_port()
    authority = Authority(directory)
    files = authority.issue("server")
    lives = "/etc/letsencrypt/live/registry.example.com"
    server = documented(
        "nginx",
        {
            f"{lives}/fullchain.pem": files["certificate"],
            f"{lives}/privkey.pem": files["key"],
            "registry.example.com": "127.0.0.1",
            "listen 443": f"listen 127.0.0.1:{port}",
            "127.0.0.1:5000": f"127.0.0.1:{behind}",
        },
    )
    file = directory / "nginx.conf"
    file.write_text(AROUND.format(directory=directory, server=server))
    process = Process(["nginx", "-c", file, "-p", directory, "-e", "stderr"], ready="start worker process ")
    try:
        yield Proxy(port, authority.ca)
    finally:
        process.stop()


Before = Callable[[int], Proxy]


@pytest.fixture(params=[caddy, nginx], ids=["caddy", "nginx"])
def before(request: pytest.FixtureRequest, home: Path) -> Iterator[Before]:
    """Start a proxy before a port of 127.0.0.1."""
    started = []

    def start(behind: int) -> Proxy:
        place = home / "proxy"
        place.mkdir()
        started.append(request.param(place, behind))
        proxy: Proxy = started[-1].__enter__()
        return proxy

    yield start
    for each in started:
        each.__exit__(None, None, None)


def test_pull_and_push(site: Site, home: Path, before: Before, pushed: Images) -> None:
    require("skopeo", root=False)
    proxy = before(site.port)

    def copy(source: str, destination: str) -> None:
        trusted = [f"--{end}-cert-dir={proxy.certificates}" for end in ("src", "dest")]
        command = ["skopeo", "--insecure-policy", "copy", "--all", *trusted, source, destination]
        run(command, environment(home))

    def held(directory: Path) -> set[str]:
        files = [path for path in directory.iterdir() if path.name != "version"]
        return {digest_of(path.read_bytes()) for path in files}

    for name in ("platforms", "layers"):
        copy(f"docker://{proxy.address}/docker.io/library/{name}:1", f"dir:{home}/{name}")
        expected = {part.digest for part in getattr(pushed, name).parts()}
        assert held(home / name) == expected
        copy(f"dir:{home}/{name}", f"docker://{proxy.address}/local/team/{name}:1")
        copy(f"docker://{proxy.address}/local/team/{name}:1", f"dir:{home}/{name}-again")
        assert held(home / f"{name}-again") == expected


def test_places_and_ranges(site: Site, before: Before) -> None:
    content = bytes(range(256)) * 4096
    proxy = before(site.port)
    with closing(proxy.connect()) as connection:

        def ask(
            method: str, target: str, body: bytes = b"", **headers: str
        ) -> tuple[int, dict[str, str], bytes]:
            connection.request(method, target, body or None, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

        uploads = "/v2/local/team/app/blobs/uploads/"
        status, headers, _ = ask("POST", uploads)  # a client that gives no name of its own
        whole = urlsplit(headers["Location"])
        assert (status, whole.scheme, whole.netloc) == (202, "https", proxy.address)
        assert ask("DELETE", whole.path)[0] == 204
        status, headers, _ = ask("POST", uploads, **{"User-Agent": "docker/28.1"})
        assert status == 202
        place = headers["Location"]
        assert place.startswith(uploads)  # relative: right behind any name
        joint = "&" if "?" in place else "?"
        status, headers, _ = ask("PUT", f"{place}{joint}digest={digest_of(content)}", content)
        assert (status, headers["Location"]) == (201, f"/v2/local/team/app/blobs/{digest_of(content)}")

        status, headers, body = ask("GET", headers["Location"], Range="bytes=1000-1009")
        assert (status, body) == (206, content[1000:1010])
        assert headers["Content-Range"] == f"bytes 1000-1009/{len(content)}"
        place = f"/v2/local/team/app/blobs/{digest_of(content)}"
        status, headers, body = ask("GET", place, Range="bytes=0-1,-2")
        assert (status, headers["Content-Type"].split(";")[0]) == (206, "multipart/byteranges")
        assert content[:2] in body
        assert content[-2:] in body
        status, headers, body = ask("HEAD", place)
        assert (status, headers["Content-Length"], body) == (200, str(len(content)), b"")
        # Errors are those of the server, not a page of the proxy's.
        status, headers, body = ask("GET", "/v2/local/team/app/manifests/none")
        assert (status, json.loads(body)["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")


def test_what_the_server_gets_and_when(before: Before) -> None:
    """Whatever its size, an upload is passed on as it comes; and so is what comes back."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        proxy = before(server.getsockname()[1])
        with proxy.wire() as client:
            first = "PATCH /v2/local/app/blobs/uploads/1 HTTP/1.1"
            lies = "X-Forwarded-For: 192.0.2.7\r\nForwarded: for=192.0.2.7\r\n"
            head = f"{first}\r\nHost: {proxy.address}\r\n{lies}Content-Length: {2 * MiB}\r\n\r\n"
            client.sendall(head.encode() + b"x" * MiB)
            served, _ = server.accept()
            with served, served.makefile("rb") as come:
                served.settimeout(PATIENCE)
                asked = come.readline()
                headers = dict(line.decode().lower().split(": ", 1) for line in iter(come.readline, b"\r\n"))
                assert len(come.read(MiB)) == MiB
                client.sendall(b"x" * MiB)  # the rest, and not before
                assert len(come.read(MiB)) == MiB
                served.sendall(b"HTTP/1.1 202 Accepted\r\nContent-Length: 3\r\n\r\n12")
                answer = client.recv(MiB)
                while not answer.endswith(b"\r\n\r\n12"):
                    more = client.recv(MiB)
                    assert more
                    answer += more
    assert asked == b"PATCH /v2/local/app/blobs/uploads/1 HTTP/1.1\r\n"
    assert headers["x-forwarded-for"].split(",")[-1].strip() == "127.0.0.1"
    assert "forwarded" not in headers
    assert headers["x-forwarded-proto"].strip() == "https"
    assert headers["host"].strip() == proxy.address
    assert headers["content-length"].strip() == str(2 * MiB)
