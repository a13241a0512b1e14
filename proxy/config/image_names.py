"""Image names as an operator writes them: `host/repository:tag@digest`.

The rules are those of container clients: a first component is a registry's host if it holds a dot or a
colon, or is localhost; a name without one is on Docker Hub, where a single word is below `library/`.  If a
name has a tag and a digest, the digest counts.

`parse` is the inverse of `storage.names.written`.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.config.hosts import is_host, parse_host
from proxy.config.wellknown import DOCKER_HUB, DOCKER_HUB_ALIASES
from storage.errors import RegistryError
from storage.names import is_glob, written
from storage.oci import Digest, Reference, Tag, parse_name


@dataclass(frozen=True, slots=True)
class ImageName:
    """A repository of a registry, and which image of it.  `repository` and `tag` may be globs."""

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def reference(self) -> Reference:
        return self.digest or Tag(self.tag or "latest")

    def __str__(self) -> str:
        return written(f"{self.host}/{self.repository}", self.reference)


def split(text: str) -> tuple[str, str | None, str | None]:
    """The name before the tag and the digest, the tag, and the digest, none of them checked."""
    named, at, digest = text.partition("@")
    start = named.rfind("/") + 1  # a colon before it belongs to a port
    name, colon, tag = named[start:].partition(":")
    return named[:start] + name, tag if colon else None, digest if at else None


def split_host(text: str) -> tuple[str, str]:
    """The registry's host, Docker Hub's if there is none, and the rest.  Raises ValueError."""
    host, slash, rest = text.partition("/")
    if not slash or not is_host(host):
        return DOCKER_HUB, text
    host = host.lower()
    try:
        host = parse_host(host)
    except ValueError:
        raise ValueError(f"{host!r} is not the host of a registry") from None
    return DOCKER_HUB if host in DOCKER_HUB_ALIASES else host, rest


def parse(text: str, *, globs: bool = False) -> ImageName:
    """Complete a name as clients do.  With `globs`, repository and tag may be globs.  Raises ValueError."""
    try:
        host, rest = split_host(text)
        repository, tag, digest = split(rest)
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        if not (globs and is_glob(repository)):
            parse_name(repository, "specification" if host == DOCKER_HUB else "any")
        if tag is not None and not (globs and is_glob(tag)):
            Tag.parse(tag)
        return ImageName(host, repository, tag, None if digest is None else Digest.parse(digest))
    except (ValueError, RegistryError) as error:
        raise ValueError(f"{text[:150]!r} is not an image name: {error}") from None
