"""Clients are configured by `entrepot setup`, and its output is used as it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme

from tests.clients.processes import Process, environment, run
from tests.clients.site import Site


def write(home: Path, client: str, site: Site, *words: str | Path, url: str = "") -> None:
    """Have it put in place, `home` being /: for all registries that `site` stands before."""
    command = [
        sys.executable,
        "-m",
        "proxy",
        "setup",
        client,
        "--config",
        site.config,
        "--write",
        "--root",
        home,
    ]
    run([*command, "--url", url or f"http://{site.address}", *words], environment(home))


def write_mirrors(home: Path, site: Site, *words: str | Path, url: str = "") -> None:
    """For podman, buildah and skopeo, where all three look when HOME is `home`.

    Of drop-ins skopeo 1.9 knows only the system's: so it is the user's main file.
    """
    write(home, "podman", site, *words, url=url)
    made, own = home / "etc" / "containers", home / ".config" / "containers"
    own.mkdir(parents=True)
    shutil.copyfile(made / "registries.conf.d" / "entrepot.conf", own / "registries.conf")
    if (made / "certs.d").exists():
        shutil.copytree(made / "certs.d", own / "certs.d")


@contextmanager
def tls(site: Site, home: Path) -> Iterator[tuple[str, Path]]:
    """The site behind TLS: its URL, and a file with the authority that has issued its certificate."""
    authority = trustme.CA()
    pair, ca = home / "pair.pem", home / "ca.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pair))
    authority.cert_pem.write_to_path(str(ca))
    front = Process([sys.executable, "-m", "tests.clients.front", pair, site.port], ready="listening at")
    try:
        yield f"https://127.0.0.1:{front.wait_for('listening at').rpartition(' ')[2]}", ca
    finally:
        front.stop()
