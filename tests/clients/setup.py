"""Clients are configured by `entrepot setup`, and its output is used as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxy.cli.main import main
from tests.clients.site import Site


def write(home: Path, client: str, site: Site, *words: str | Path) -> None:
    """Have it put in place, `home` being /: for all registries that `site` stands before.

    The command runs in this process: it does less than it would take to start another.
    """
    authority = ["--ca-file", site.ca] if site.ca else []
    options = ["--config", site.config, "--write", "--root", home, "--url", site.url, *authority, *words]
    command = ["setup", client, *map(str, options)]
    done = CliRunner().invoke(main, command, env={"HOME": str(home)})
    if done.exit_code:
        pytest.fail(f"{' '.join(command)}: exit status {done.exit_code}\n{done.output}")


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
