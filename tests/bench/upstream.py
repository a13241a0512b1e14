"""The registry that the peers cache: static files behind nginx, which is never the bottleneck.

Five ports serve the same tree: `port` logs every request, `tls_port` too and speaks TLS, `slow_port` too and
limits the rate of each connection, `direct_port` logs nothing (nginx as a peer), and `link_port` leads to
`port` through a link of limited bandwidth and some latency that all connections share (link.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.authority import Authority
from tests.bench.clients import get
from tests.bench.peers import Process, free_port

REPOSITORY = "library/bench"
TAG = "latest"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
SLOW_RATE = 60 << 20  # bytes per second of one connection to slow_port
LINK_RATE = 100 << 20  # bytes per second of all connections through link_port together
LINK_DELAY = 0.02  # seconds, one way
LAYERS = 5
QUIET = 0.3  # seconds without a request, longer than one can be on the link, mean that no more will come
MIB = 1 << 20

_CONFIGURATION = """
{user}
worker_processes auto;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
    log_format served '$request_method $status $body_bytes_sent $uri';
    access_log {directory}/access.log served;
    client_body_temp_path {directory}/temporary;
    proxy_temp_path {directory}/temporary;
    fastcgi_temp_path {directory}/temporary;
    scgi_temp_path {directory}/temporary;
    uwsgi_temp_path {directory}/temporary;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    root {directory}/tree;
    server {{ listen 127.0.0.1:{port}; include {directory}/registry.conf; }}
    server {{
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {directory}/server.crt;
        ssl_certificate_key {directory}/server.key;
        include {directory}/registry.conf;
    }}
    server {{ listen 127.0.0.1:{slow_port}; limit_rate {slow_rate}; include {directory}/registry.conf; }}
    server {{ listen 127.0.0.1:{direct_port}; access_log off; include {directory}/registry.conf; }}
    server {{ listen 127.0.0.1:{status_port}; access_log off; location / {{ stub_status; }} }}
}}
"""
_REGISTRY = """
add_header Docker-Distribution-Api-Version registry/2.0 always;
location = /v2/ {{ default_type application/json; return 200 '{{}}'; }}
location ~ ^/v2/.+/blobs/(?<digest>sha256:[0-9a-f]+)$ {{
    default_type application/octet-stream;
    add_header Docker-Content-Digest $digest;
}}
location ~ ^/v2/.+/manifests/.+[.]sig$ {{ default_type {manifest_type}; }}
location ~ "^/v2/.+/manifests/(sha256:)?(?<image>[0-9a-f]{{64}})$" {{
    default_type {manifest_type};
    add_header Docker-Content-Digest sha256:$image;
}}
location ~ ^/v2/.+/manifests/ {{
    default_type {manifest_type};
    add_header Docker-Content-Digest {manifest_digest};
}}
"""


@dataclass(frozen=True)
class Content:
    digest: str
    size: int
    file: Path

    @property
    def path(self) -> str:
        return f"/v2/{REPOSITORY}/blobs/{self.digest}"

    def remove(self) -> None:
        self.file.unlink()


@dataclass(frozen=True)
class Image(Content):
    """Its manifest, by a tag, and its layers."""

    tag: str
    layers: tuple[Content, ...]

    @property
    def path(self) -> str:
        return f"/v2/{REPOSITORY}/manifests/{self.tag}"

    def remove(self) -> None:
        for layer in self.layers:
            layer.remove()


@dataclass(frozen=True)
class Traffic:
    """What upstream has sent: requests with and without a body, and bytes of bodies."""

    gets: int
    others: int
    bytes: int


class Upstream:
    """Runs until close(); everything it writes is below `directory`."""

    def __init__(self, directory: Path, slow_rate: int = SLOW_RATE) -> None:
        self.directory = directory
        self._slow_rate = slow_rate
        self._tree = directory / "tree" / "v2" / REPOSITORY
        (self._tree / "blobs").mkdir(parents=True)
        (self._tree / "manifests").mkdir()
        self.image = self.add_image(LAYERS * MIB, TAG)
        self._sign()
        self.port, self.slow_port, self.direct_port, self._status_port = (free_port() for _ in range(4))
        self.link_port, self.tls_port = free_port(), free_port()
        authority = Authority(directory)
        authority.issue("server")
        os.environ["SSL_CERT_FILE"] = str(authority.ca)  # of all peers
        self._write_configuration()
        self.process = Process("nginx", ["nginx", "-c", str(directory / "nginx.conf")], directory)
        link = [sys.executable, str(Path(__file__).with_name("link.py"))]
        link += [str(self.link_port), str(self.port), str(LINK_RATE), str(LINK_DELAY)]
        self._link = Process("link", link, directory)
        try:
            self.process.wait_ready(self.port)
            self._link.wait_ready(self.link_port)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._link.stop()
        self.process.stop()

    def cpu_seconds(self) -> float:
        """User and system time of all that it runs."""
        return self.process.cpu_seconds() + self._link.cpu_seconds()

    def add_blob(self, size: int) -> Content:
        """Content that nobody has seen: one random MiB over and over, each time with another number in it."""
        block, file, digest = bytearray(os.urandom(MIB)), self._tree / "blobs" / "new", hashlib.sha256()
        with file.open("wb") as target:
            for number in range(size // MIB):
                block[:8] = number.to_bytes(8, "big")
                digest.update(block)
                target.write(block)
        name = f"sha256:{digest.hexdigest()}"
        return Content(name, size // MIB * MIB, file.rename(file.with_name(name)))

    def add_file(self, path: Path) -> Content:
        """A copy of a file."""
        return self.add(path.read_bytes())

    def add(self, content: bytes) -> Content:
        name = f"sha256:{hashlib.sha256(content).hexdigest()}"
        file = self._tree / "blobs" / name
        file.write_bytes(content)
        return Content(name, len(content), file)

    def take_log(self) -> Traffic:
        """What was asked since the last call.  Waits until none is under way."""
        quiet_since = time.monotonic()
        while time.monotonic() < quiet_since + QUIET:
            time.sleep(0.02)
            # Requests are logged when they end; "Writing" counts those not ended, this one included.
            if not re.search(rb"Writing: 1 ", get(self._status_port, "/")[1]):
                quiet_since = time.monotonic()
        log = self.directory / "access.log"
        lines = [line.split() for line in log.read_text().splitlines()]
        os.truncate(log, 0)
        gets = [line for line in lines if line[0] == "GET"]
        return Traffic(len(gets), len(lines) - len(gets), sum(int(line[2]) for line in gets))

    def add_image(self, size: int, tag: str | None = None) -> Image:
        """An image that nobody has seen, in LAYERS layers of `size` bytes together.

        Without a tag, the tag is the digest without its algorithm.
        """
        layers = tuple(self.add_blob(size // LAYERS) for _ in range(LAYERS))
        rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
        config = self.add(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())

        def descriptor(kind: str, blob: Content) -> dict[str, str | int]:
            return {
                "mediaType": f"application/vnd.oci.image.{kind}",
                "digest": blob.digest,
                "size": blob.size,
            }

        content = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor("config.v1+json", config),
            "layers": [descriptor("layer.v1.tar", layer) for layer in layers],
        }
        body = json.dumps(content, indent=2).encode()
        encoded = hashlib.sha256(body).hexdigest()
        digest, tag = f"sha256:{encoded}", tag or encoded
        for name in (tag, digest):
            (self._tree / "manifests" / name).write_bytes(body)
        return Image(digest, len(body), self._tree / "manifests" / digest, tag, layers)

    def _sign(self) -> None:
        """Sign the image in the classic form of cosign, by a key whose public part BENCH_SIGNER names."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = self.directory / "signer.pub"
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        os.environ["BENCH_SIGNER"] = str(public)
        image = {"docker-manifest-digest": self.image.digest}
        payload = json.dumps(
            {"critical": {"image": image, "type": "cosign container image signature"}}
        ).encode()
        signature = base64.b64encode(key.sign(payload, ec.ECDSA(SHA256()))).decode()
        digest = f"sha256:{hashlib.sha256(payload).hexdigest()}"
        (self._tree / "blobs" / digest).write_bytes(payload)
        layer = {
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "digest": digest,
            "size": len(payload),
            "annotations": {"dev.cosignproject.cosign/signature": signature},
        }
        content = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": [layer]}
        tag = f"{self.image.digest.replace(':', '-')}.sig"
        (self._tree / "manifests" / tag).write_text(json.dumps(content))

    def _write_configuration(self) -> None:
        main = _CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",
            directory=self.directory,
            port=self.port,
            tls_port=self.tls_port,
            slow_port=self.slow_port,
            slow_rate=self._slow_rate,
            direct_port=self.direct_port,
            status_port=self._status_port,
        )
        registry = _REGISTRY.format(manifest_type=MANIFEST_TYPE, manifest_digest=self.image.digest)
        (self.directory / "nginx.conf").write_text(main)
        (self.directory / "registry.conf").write_text(registry)
