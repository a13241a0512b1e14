"""The software bill of materials of the image: CycloneDX, JSON, by the library of its makers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.parser import HeaderParser
from importlib.metadata import Distribution, MetadataPathFinder
from pathlib import Path

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot5
from packageurl import PackageURL

ROOT = "entrepot"


def make(debian: Path, python: Sequence[Path], epoch: int) -> str:
    """The document for the packages declared in the directory `debian`, and installed in those of `python`.

    The same packages make the same document.
    """
    bom = Bom()
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    components = [*_debian(debian), *_python(python)]
    (root,) = (each for each in components if each.name == ROOT)
    root.type = ComponentType.APPLICATION
    components.remove(root)
    bom.metadata.component = root
    bom.components.update(components)
    bom.register_dependency(root, components)
    names = sorted(str(each.purl) for each in (root, *components))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, "\n".join([str(epoch), *names]))
    return JsonV1Dot5(bom).output_as_string(indent=1) + "\n"


def _debian(directory: Path) -> Iterator[Component]:
    for path in sorted(directory.iterdir()):
        fields = HeaderParser().parsestr(path.read_text())
        qualifiers = {"arch": fields["Architecture"], "distro": "debian-12"}
        purl = PackageURL("deb", "debian", fields["Package"], fields["Version"], qualifiers)
        yield Component(
            name=fields["Package"],
            version=fields["Version"],
            purl=purl,
            bom_ref=str(purl),
            description=fields["Description"].splitlines()[0],
        )


def _python(directories: Sequence[Path]) -> Iterator[Component]:
    found: list[Distribution] = []
    for directory in directories:
        found += MetadataPathFinder.find_distributions(MetadataPathFinder.Context(path=[str(directory)]))
    for each in sorted(found, key=lambda distribution: distribution.name):
        purl = PackageURL("pypi", None, re.sub(r"[-_.]+", "-", each.name.lower()), each.version)
        licence = each.metadata["License-Expression"] or each.metadata["License"]
        yield Component(
            name=each.name,
            version=each.version,
            purl=purl,
            bom_ref=str(purl),
            description=each.metadata["Summary"],
            licenses=[LicenseFactory().make_from_string(licence.splitlines()[0])] if licence else [],
        )
