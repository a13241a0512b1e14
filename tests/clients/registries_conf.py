"""registries.conf: how skopeo, podman and buildah learn of mirrors."""

from __future__ import annotations

from pathlib import Path

from tests.clients.site import Site


def write_mirrors(home: Path, site: Site) -> None:
    """Have `site` for a mirror of every registry that it stands before.

    Docker Hub's mirror is the bare address, any other's has the namespace for its path.  The file lies
    where all three programs look when HOME is `home`; skopeo 1.9 reads no variable that names another.
    """
    tables = [f'[[registry]]\nlocation = "{site.address}"\ninsecure = true\n']
    for namespace in site.upstreams:
        location = site.address if namespace == "docker.io" else f"{site.address}/{namespace}"
        tables.append(
            f'[[registry]]\nlocation = "{namespace}"\n'
            f'[[registry.mirror]]\nlocation = "{location}"\ninsecure = true\n'
        )
    directory = home / ".config" / "containers"
    directory.mkdir(parents=True)
    (directory / "registries.conf").write_text("\n".join(tables))
