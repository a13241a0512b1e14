"""The sources and the destination of a copy, and which image is copied where."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from proxy.config import image_names
from proxy.config.hosts import is_loopback
from proxy.config.image_names import ImageName
from proxy.config.wellknown import DOCKER_HUB, WELL_KNOWN
from proxy.transfer.blob_copy import RetryPolicy
from storage.errors import NameUnknown
from storage.graph import is_fallback_tag
from storage.names import is_glob, literal_prefix, written
from storage.oci import Digest, Reference, Tag
from storage.registry import Registry


@dataclass(frozen=True, slots=True)
class CopySource:
    """A source or destination of a copy; `repository` and `tag` may be globs.

    With `below`, `repository` is the prefix of the names of several repositories, and may be empty.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None
    plain_http: bool = False
    below: bool = False

    @property
    def url(self) -> str:
        if self.host == DOCKER_HUB:
            return WELL_KNOWN[DOCKER_HUB]
        return f"{'http' if self.plain_http else 'https'}://{self.host}"

    @property
    def base(self) -> str:
        """The path before the first path element with a wildcard, as in `team/` for `team/*`."""
        literal = literal_prefix(self.repository)
        return literal[: literal.rfind("/") + 1] if self.wild else ""

    @property
    def wild(self) -> bool:
        """Whether the repository is a glob."""
        return is_glob(self.repository)


def parse_source(text: str, plain_http: bool = False) -> CopySource:
    """Complete a name as clients do; one that ends with a slash is all below it.  Raises ValueError.

    Plain http is used for http://, and without a scheme if `plain_http` is true or the host is this machine.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    if scheme not in ("", "http", "https", "docker"):
        raise ValueError(f"{text}: {scheme}:// is not supported: expected registry/repository:tag")
    if below := rest.endswith("/"):
        host, repository = image_names.split_host(rest)
        name = ImageName(host, repository.rstrip("/"))
    else:
        name = image_names.parse(rest, globs=True)
    plain = scheme == "http" or (scheme != "https" and (plain_http or _loopback(name.host)))
    return CopySource(name.host, name.repository, name.tag, name.digest, plain, below)


def _loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    return is_loopback(name.strip("[]"))


@dataclass(frozen=True, slots=True)
class CopyItem:
    """One image to be copied from `repository` to `target`, with its `tags` there.

    `listed` are all tags of the repository, if they were listed.
    """

    copied_from: CopySource
    repository: str
    reference: Reference
    target: str
    tags: tuple[Tag, ...]
    listed: frozenset[str] | None = None

    @property
    def source(self) -> str:
        return written(f"{self.copied_from.host}/{self.repository}", self.reference)


def check(sources: Sequence[CopySource], destination: CopySource, all_tags: bool) -> None:
    """Raise ValueError for sources and a destination that do not fit together."""
    if destination.wild or is_glob(destination.tag or ""):
        raise ValueError("the destination must not be a glob")
    if destination.digest is not None:
        raise ValueError("the destination must not have a digest: the digest is that of the source")
    for each in sources:
        several = all_tags or is_glob(each.tag or "")
        if each.below:
            base = f"{each.host}/{each.repository}".rstrip("/")
            raise ValueError(f"{base}/ is not a repository; {base}/* means all repositories below it")
        if several and each.digest is not None:
            raise ValueError(f"{written(each.repository, each.digest)} is one manifest, not all tags")
        if several and destination.tag is not None:
            raise ValueError(f"tag {destination.tag} cannot be all of the tags of {each.repository}")
        if (each.wild or len(sources) > 1) and not destination.below:
            raise ValueError(
                "several repositories need a destination that ends with /, to which their names are appended"
            )


async def items(
    source: CopySource,
    registry: Registry,
    destination: CopySource,
    retries: RetryPolicy,
    *,
    all_tags: bool = False,
    referrers: bool = True,
) -> AsyncIterator[CopyItem]:
    """The images of a source; those of a glob are looked up in its registry.  Raises RegistryError."""
    repositories = [source.repository]
    if source.wild:
        repositories = [
            each
            for each in await retries.persist(registry.repositories)
            if fnmatchcase(each, source.repository)
        ]
        if not repositories:
            raise NameUnknown(f"{source.host} lists no repository that matches {source.repository}")
    for repository in repositories:
        target = destination.repository
        if destination.below:
            name = repository.removeprefix(source.base)
            target = f"{target}/{name}" if target else name
        pattern = source.tag or ("*" if all_tags else "latest")
        if source.digest is not None:
            named = tuple(map(Tag, filter(None, [destination.tag or source.tag])))
            yield CopyItem(source, repository, source.digest, target, named)
        elif not is_glob(pattern):
            yield CopyItem(source, repository, Tag(pattern), target, (Tag(destination.tag or pattern),))
        else:
            listed = frozenset(await retries.persist(partial(registry.tags, repository)))
            tags = sorted(each for each in listed if fnmatchcase(each, pattern))
            for tag in tags:
                # A fallback tag is copied with the subject whose referrers it lists.
                if not (referrers and is_fallback_tag(tag)):
                    yield CopyItem(source, repository, Tag(tag), target, (Tag(tag),), listed)
            if not tags and not source.wild:
                raise NameUnknown(f"{source.host}/{repository} has no tag that matches {pattern}")
