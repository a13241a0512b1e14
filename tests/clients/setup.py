"""Clients are configured by `entrepot setup`, and its output is used as it is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.clients.processes import environment, run
from tests.clients.site import Site


def write(home: Path, client: str, site: Site, *words: str | Path) -> None:
    """Have it put in place, `home` being /: for all registries that `site` stands before."""
    authority = ["--ca-file", site.ca] if site.ca else []
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
    run([*command, "--url", site.url, *authority, *words], environment(home))


def write_mirrors(home: Path, site: Site, *words: str | Path) -> None:
    """For podman, buildah and skopeo, where all three look when HOME is `home`.

    Of drop-ins skopeo 1.9 knows only the system's: so it is the user's main file.
    """
    write(home, "podman", site, *words)
    made, own = home / "etc" / "containers", home / ".config" / "containers"
    own.mkdir(parents=True)
    shutil.copyfile(made / "registries.conf.d" / "entrepot.conf", own / "registries.conf")
    if (made / "certs.d").exists():
        shutil.copytree(made / "certs.d", own / "certs.d")
