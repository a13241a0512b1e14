"""A site: real upstream registries and Entrepôt before them, each a process of its own."""

from __future__ import annotations

import itertools
import json
import re
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests.clients.processes import Process, free_port, own_address

Pulled = TypeVar("Pulled")

SERVER = (sys.executable, "-m", "proxy", "serve", "--config")

# Everybody may do all.
OPEN = {"rules": [{"who": ["anonymous"], "may": ["pull", "push", "delete"]}]}
_REQUEST = re.compile(r'"((?:GET|HEAD|POST|PUT|PATCH|DELETE) \S+) HTTP/1\.1"')


class DockerRegistry:
    """Debian's docker-registry, its content in the directory `root`."""

    def __init__(self, root: Path, directory: Path):
        self.url = f"http://127.0.0.1:{free_port()}"
        self._marks = itertools.count()
        config = directory / f"{root.name}.yml"
        config.write_text(
            json.dumps(  # JSON is YAML
                {
                    "version": "0.1",
                    "log": {"level": "info", "formatter": "text"},
                    "storage": {"filesystem": {"rootdirectory": str(root)}},
                    "http": {"addr": self.url.removeprefix("http://"), "secret": "of no worth"},
                }
            )
        )
        self._process = Process(["docker-registry", "serve", config], ready="listening on")

    def requests(self) -> list[str]:
        """What was asked of it so far, as "METHOD target", in the order of the answers."""
        # Its log is written behind its answers: one request more, told from all others, and wait for it.
        mark = f"/v2/?mark={next(self._marks)}."
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url + mark, timeout=30):
            pass
        self._process.wait_for(f"GET {mark} ")
        found = (_REQUEST.search(line) for line in self._process.lines)
        return [request[1] for request in found if request and "/v2/?mark=" not in request[1]]

    def stop(self) -> None:
        self._process.stop()


class Gone:
    """An upstream that nobody reaches."""

    url = "http://127.0.0.1:9"

    def requests(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass


class Site:
    """Entrepôt at `address` (host:port), a namespace for each of `upstreams`; the first is the default.

    What is pushed goes to the namespace `local`, which is also meant by the host `localhost`, and alone at
    the address `store`.  `config` is its configuration, `admin` the URL of its admin listener, if it is to
    have one.  With `tls` it is at another address than 127.0.0.1, where docker takes any certificate; `ca`
    is who has issued its own.  `offline` and `fresh_for` as there.
    `shared` and `redirect` as there.  With `listed`, its only cache is the namespace `*` with that upstream.
    """

    def __init__(
        self,
        upstreams: Mapping[str, DockerRegistry | Gone],
        directory: Path,
        admin: bool = True,
        access: Mapping[str, Any] = OPEN,
        tls: Mapping[str, str] | None = None,
        ca: Path | None = None,
        offline: bool = False,
        fresh_for: str = "10m",
        listed: Mapping[str, Any] | None = None,
        shared: Mapping[str, Any] | None = None,
        redirect: Mapping[str, Any] | None = None,
    ):
        self.upstreams = upstreams
        self.ca = ca
        self.port = free_port()
        self.address = f"{own_address() if tls else '127.0.0.1'}:{self.port}"
        self.store = f"{self.address.partition(':')[0]}:{free_port()}"
        self.url = f"{'https' if tls else 'http'}://{self.address}"
        where = f"127.0.0.1:{free_port()}" if admin else "off"
        self.admin = f"http://{where}"
        self.config = directory / "entrepot.yml"
        caches = {"*": listed} if listed else {name: {"url": each.url} for name, each in upstreams.items()}
        self.config.write_text(
            json.dumps(
                {
                    "listen": self.address,
                    "admin": where,
                    "tls": tls and dict(tls),
                    "disk": {"path": str(directory / "cache")},
                    "shared": shared or {},
                    "redirect": redirect,
                    "access": access,
                    "offline": offline,
                    "default_namespace": None if listed else next(iter(upstreams)),
                    "namespaces": {
                        namespace: {"upstream": upstream, "fresh_for": fresh_for}
                        for namespace, upstream in caches.items()
                    }
                    | {"local": {"store": {}, "hosts": ["localhost"], "listen": self.store}},
                }
            )
        )
        self._process = Process([*SERVER, self.config], ready="listening")

    def requests(self) -> dict[str, list[str]]:
        """What reached the upstream of each namespace so far."""
        return {namespace: upstream.requests() for namespace, upstream in self.upstreams.items()}

    @property
    def log(self) -> list[str]:
        """The lines that the server has logged so far."""
        return list(self._process.lines)

    def go_offline(self) -> None:
        for upstream in self.upstreams.values():
            upstream.stop()

    def stop(self) -> None:
        self._process.stop()
        print(*self._process.lines, sep="\n")  # shown with a test that failed
        errors = [line for line in self._process.lines if '"level":"error"' in line or "Traceback" in line]
        assert not errors, "the server met with an error"


def pull_cold_warm_offline(site: Site, pull: Callable[[], Pulled], expected: Pulled) -> None:
    """Pull through an empty cache, a full one, and a full one whose upstreams are gone.

    `pull` starts from a client that holds nothing, and returns what it came to hold.  The warm pull
    must not reach an upstream at all, the cold one ask for each blob once.
    """
    assert pull() == expected
    cold = site.requests()
    asked = [request for requests in cold.values() for request in requests]
    assert asked, "the pull did not come through the cache"
    blobs = [request for request in asked if request.startswith("GET ") and "/blobs/" in request]
    assert len(blobs) == len(set(blobs)), "a blob was fetched more than once"

    assert pull() == expected
    assert site.requests() == cold

    site.go_offline()
    assert pull() == expected
