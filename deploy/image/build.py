#!/usr/bin/env python3
"""Build the image of Entrepôt on Debian 12, without a registry.

    build.py fetch PACKAGES           download Debian's packages and the libraries
    build.py image PACKAGES LAYOUT    make the image by buildah: an OCI image layout, with its SBOM

Needs what build-requirements.txt has; fetch needs apt, and image needs buildah and root.  --architecture can
be repeated: several make an index.  The same commit makes the same digest from the same packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetch import NATIVE, PLATFORMS, fetch
from layout import INDEX, MANIFEST, NAME, Descriptor, ImageLayout
from trees import SOURCE, make_trees

SBOM = "application/vnd.cyclonedx+json"
BOM = Path("application/usr/share/sbom/entrepot.cdx.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, places in {
        "fetch": ["packages"],
        "trees": ["packages", "trees"],
        "image": ["packages", "layout"],
    }.items():
        command = commands.add_parser(name)
        for place in places:
            command.add_argument(place, type=lambda path: Path(path).resolve())  # steps run elsewhere
        command.add_argument("--architecture", action="append", choices=PLATFORMS)
        if name != "fetch":
            command.add_argument("--site", type=Path, help="the documentation; without this it is built")
    words = parser.parse_args()
    architectures = words.architecture or [NATIVE]
    if words.command == "fetch":
        fetch(words.packages, architectures)
    elif words.command == "trees":
        make_trees(words.packages, words.trees, architectures[0], epoch(), words.site)
    else:
        print(build(words.packages, words.layout, architectures, words.site))


def epoch() -> int:
    """The time of everything: $SOURCE_DATE_EPOCH, or else that of the commit."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct"))


def build(packages: Path, layout: Path, architectures: Sequence[str], site: Path | None = None) -> str:
    """Make the image in the new directory `layout`; returns its digest.  `site` is as in make_trees()."""
    made = ImageLayout(layout)
    images, boms = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for each in architectures:
            trees = Path(temporary, each)
            make_trees(packages, trees, each, epoch(), site)
            boms[f"entrepot-{each}.cdx.json"] = (trees / BOM).read_bytes()
            health = _buildah(Path(temporary, "storage"), trees, layout, each)
            images.append(_complete(made, made.descriptors()[-1], health))
    referrers = [
        made.attach(image, {name: bom}, SBOM) for image, (name, bom) in zip(images, boms.items(), strict=True)
    ]
    top = images[0]
    if len(images) > 1:
        annotations = made.read(top)["annotations"]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": images, "annotations": annotations}
        top = made.add_json(index, INDEX)
        referrers.append(made.attach(top, boms, SBOM))
    made.write_index([{**top, "annotations": {NAME: version()}}, *referrers])
    digest: str = top["digest"]
    return digest


def _buildah(place: Path, trees: Path, layout: Path, architecture: str) -> dict[str, Any]:
    """Run the last stage of the Dockerfile, and add its image to `layout`.  Returns its health check.

    place: for a storage of its own, which needs nothing of the kernel
    """
    buildah = ["buildah", f"--root={place}/root", f"--runroot={place}/run", "--storage-driver=vfs"]
    name = f"localhost/entrepot:{architecture}"
    words = [
        "--format=docker",  # that of OCI has no health check
        "--isolation=chroot",
        "--identity-label=false",
        f"--arch={architecture}",
        f"--timestamp={epoch()}",
        f"--build-context=trees={trees}",
        f"--build-arg=VERSION={version()}",
        f"--build-arg=REVISION={os.environ.get('REVISION') or _git('rev-parse', 'HEAD')}",
        f"--build-arg=TARGETARCH={architecture}",
        f"--file={SOURCE / 'deploy/image/Dockerfile'}",
        f"--tag={name}",
    ]
    _run(*buildah, "build", "--quiet", "--layers", *words, str(trees / "data"))
    inspected = json.loads(_run(*buildah, "inspect", "--type=image", name))
    _run(*buildah, "push", "--quiet", "--format=oci", name, f"oci:{layout}:{architecture}")
    health: dict[str, Any] = inspected["Docker"]["config"]["Healthcheck"]
    return health


def _complete(layout: ImageLayout, descriptor: Descriptor, health: dict[str, Any]) -> Descriptor:
    """Its descriptor after the image got its health check, which Docker reads, and annotations: its labels.

    The history loses the names that buildah gives to steps, which differ each time.
    """
    manifest = layout.read(descriptor)
    config = layout.read(manifest["config"])
    config["config"]["Healthcheck"] = health
    config["history"] = [
        {key: value for key, value in each.items() if key != "comment"} for each in config["history"]
    ]
    manifest["config"] = layout.add_json(config, manifest["config"]["mediaType"])
    manifest["mediaType"] = MANIFEST
    manifest["annotations"] = {
        **config["config"]["Labels"],
        "org.opencontainers.image.created": config["created"],
    }
    platform = {"architecture": config["architecture"], "os": config["os"]}
    return {**layout.add_json(manifest, MANIFEST), "platform": platform}


def version() -> str:
    """That of pyproject.toml."""
    found: str = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["version"]
    return found


def _git(*words: str) -> str:
    return _run("git", "-C", str(SOURCE), *words)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
