"""The namespace, and so the registry, that a repository belongs to.

A repository's full name is `<namespace>/<repository>`.  Clients have five ways to choose a namespace;
`qualify` turns each into the full name, and every method of the registry takes full names.

- What a client sends is a key to look up, never an address to connect to: a namespace that is not in the
  configuration is NameUnknown, even if there is a default.
- A name without a namespace belongs to the default namespace.  `foo.example/app` has one: its first
  component is a host.  Docker Hub could only answer with another publisher's image.
- A plain word (`edge`) may be a namespace, or a user's name in the registry that the client takes this server
  for: by ns, by a Host that is the registry's name, or by a prefix.  So if one of these chose a namespace,
  only a host in the name is taken for a namespace and removed.  At every other address of this server, such
  as one of `hosts`, `edge/app` is the same repository.
- A namespace with a port has one more name, for clients that accept no colon in a path: `my.example_5000` is
  `my.example:5000`, unless another namespace has that name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from proxy.cache.refresh import Refreshable
from proxy.config.hosts import canonical_host, is_host, normal_host, path_of
from proxy.config.registry_hosts import registry_host
from proxy.namespaces.full_names import (
    MemberSettings,
    full_name,
    is_host_of,
    refuse,
    refuse_without_namespace,
    without_v2,
)
from proxy.namespaces.mounts import copy_blob
from storage.conditions import ALWAYS, Conditions
from storage.errors import BlobUnknown, Denied, Unsupported
from storage.oci import (
    Descriptor,
    Digest,
    Manifest,
    NameGrammar,
    Reference,
    Span,
    Tag,
)
from storage.registry import Blob, Held, Located, Registry, Upload, Validity, everything


@dataclass(frozen=True, slots=True)
class Member:
    """A namespace and its registry.

    aliases: further names of it
    hosts: Host headers that choose it
    library: a repository of one component is an official image of Docker Hub: alpine is library/alpine
    names: the grammar of its repositories' names
    """

    registry: Registry
    name: str
    aliases: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    library: bool = False
    names: NameGrammar = "specification"


class OtherNamespaces(Protocol):
    """Namespaces that are made when a client asks for them."""

    def settings(self, host: str) -> MemberSettings | None:
        """Those of the namespace for a host as a client writes it; None if it has none.  Nothing is made."""

    def member(self, name: str) -> Member | None:
        """The namespace of that name; None if there is none.  Raises Unavailable if there are too many."""


class Namespaces(Registry):
    """The registries of all namespaces as one.  Its methods take full names only: see qualify()."""

    def __init__(
        self,
        members: Iterable[Member],
        default: str | None = None,
        catalogs: Sequence[Registry] = (),
        *,
        hosts_named: bool = True,
        others: OtherNamespaces | None = None,
    ) -> None:
        """Raises ValueError if two members claim one name or host, or if no member has the name `default`.

        catalogs: registries that list full names, instead of the members; close() does not close them
        hosts_named: whether a first component that is a host is always taken for the name of a namespace
        others: namespaces besides the members, which a Host header does not choose
        """
        self._members: dict[str, Member] = {}
        self._by_name: dict[str, Member] = {}
        self._by_host: dict[str, Member] = {}
        self._catalogs, self._hosts_named, self._others = catalogs, hosts_named, others
        for member in members:
            _claim(self._members, member.name, member)
            for name in (member.name, *member.aliases):
                _claim(self._by_name, normal_host(name), member)
                _claim(self._by_host, normal_host(name), member)
            for host in member.hosts:
                _claim(self._by_host, host.lower(), member)
        for member in self._members.values():
            for name in filter(None, map(path_of, (member.name, *member.aliases))):
                self._by_name.setdefault(name, member)
        if default is not None and default not in self._members:
            raise ValueError(f"the default namespace {default!r} is not configured")
        self._default = None if default is None else self._members[default]
        self._remembered = lru_cache(maxsize=4096)(self._qualify)

    def qualify(self, name: str, *, ns: str | None = None, host: str | None = None, prefix: str = "") -> str:
        """The full name of what a client calls `name`.  The first of these that applies decides:

        1. `ns`, from the query (containerd);
        2. `host`, the Host header, if it is a namespace's name;
        3. the first component of `name`, if it is a namespace's name and more follows;
           beside a prefix only if it is also a host; v2/, which kaniko needs before a host, is ignored;
        4. `host`, if it is one of a namespace's `hosts`;
        5. `prefix`, the component before /v2 in the path;
        6. the default namespace.

        A second name of the chosen namespace that is a host is removed: a mirror configured by path
        (override_path) or by prefix (Testcontainers) receives it twice.  `<host>/v2/<repository>`,
        which containerd makes of a mirror's path without override_path, is `<host>/<repository>`; a
        repository whose name begins with v2/ is reached by ns, Host or prefix, without the host in front.

        Raises NameUnknown, NameInvalid.
        """
        # Clients send the same names again and again.
        return self._remembered(name, ns, host, prefix)

    def _qualify(self, name: str, ns: str | None, host: str | None, prefix: str) -> str:
        first, _, rest = name.partition("/")
        named = self._found(first, host) if rest else None
        hosted = self._hosted(host) if host else None
        member: MemberSettings
        if ns is not None:
            member = self._found(ns, host) or refuse(ns)
        elif host and hosted and self._is_name(host):
            member = hosted
        elif named and (not prefix or is_host_of(named, first)):
            rest = without_v2(named, rest)
            return full_name(named, rest) if prefix else self._qualify(rest, first, host, prefix)
        elif first == "v2" and self._hosts_named and "/" in rest and is_host(rest.split("/")[0]):
            return self._qualify(rest, None, host, prefix)
        elif hosted:
            member = hosted
        elif prefix:
            member = self._found(prefix, host) or refuse(prefix)
        elif rest and is_host(first) and self._hosts_named:
            refuse(first)
        elif self._default:
            return full_name(self._default, name)
        else:
            refuse_without_namespace(name)
        if named and named.name == member.name and is_host_of(named, first):
            name = without_v2(member, rest)
        return full_name(member, name)

    def alone(self, name: str) -> Namespaces:
        """The namespace of that name without the others, as the default one."""
        return Namespaces([self._members[name]], name, hosts_named=False)

    def chosen(self, *, ns: str | None = None, host: str | None = None, prefix: str = "") -> str | None:
        """The namespace that a request without a repository chooses, by the rules of qualify()."""
        member = (
            (self._found(ns, host) if ns is not None else None)
            or (self._hosted(host) if host else None)
            or (self._found(prefix, host) if prefix else None)
        )
        return member.name if member else None

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        member, relative = self._split(repository)
        return await member.registry.get_blob(relative, digest, span)

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        member, relative = self._split(repository)
        return await member.registry.locate_blob(relative, digest)

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        member, relative = self._split(repository)
        return await member.registry.resolve_blob(relative, digest)

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        member, relative = self._split(repository)
        return await member.registry.get_manifest(relative, reference)

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        member, relative = self._split(repository)
        return await member.registry.resolve_manifest(relative, reference)

    def hold_blob(self, repository: str, digest: Digest) -> Held | None:
        member, relative = self._split(repository)
        return self._of_member(member, repository, member.registry.hold_blob(relative, digest))

    def hold_manifest(self, repository: str, reference: Reference) -> Held | None:
        member, relative = self._split(repository)
        return self._of_member(member, repository, member.registry.hold_manifest(relative, reference))

    def _of_member(self, member: Member, repository: str, held: Held | None) -> Held | None:
        """What a member holds; one of the others, as long as it is the same, and serving it uses it."""
        if held is None or member.name in self._members:
            return held

        def validity() -> Validity | None:
            return held.validity() if self._split(repository)[0] is member else None

        return replace(held, validity=validity)

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        member, relative = self._split(repository)
        return await member.registry.tags(relative, last, limit)

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        member, relative = self._split(repository)
        return await member.registry.referrers(relative, digest, artifact_type, last, limit)

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """Full names.  Without catalogs, members that cannot list repositories are left out."""
        if self._catalogs:
            listed = [await each.repositories(last, limit) for each in self._catalogs]
            return sorted(set().union(*listed))[:limit]
        found: list[str] = []
        # Sorted with the slash: "a-b/x" comes before "a/x".
        for start, member in sorted((f"{name}/", member) for name, member in self._members.items()):
            left = None if limit is None else limit - len(found)
            if left == 0:
                break
            if not last.startswith(start) and start < last:
                continue  # all of its names are before `last`
            try:
                names = await member.registry.repositories(last[len(start) :] if start < last else "", left)
            except (Unsupported, Denied):
                continue
            found += [start + name for name in names]
        return found

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        member, relative = self._split(repository)
        return await member.registry.start_upload(relative, size, algorithm)

    async def resume_upload(self, repository: str, id: str) -> Upload:
        member, relative = self._split(repository)
        return await member.registry.resume_upload(relative, id)

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        """Mount within one namespace, or copy the blob from a cache into a store.

        From any other namespace it raises BlobUnknown, and the client uploads.
        """
        member, relative = self._split(repository)
        if source is not None:
            other, source = self._split(source)
            if other is not member:
                if not isinstance(other.registry, Refreshable) or isinstance(member.registry, Refreshable):
                    raise BlobUnknown(f"{digest} cannot be mounted from another namespace, {other.name!r}")
                return await copy_blob(
                    other.registry, source, member.registry, relative, digest, f"{other.name}/{source}"
                )
        return await member.registry.mount_blob(
            relative, digest, source, lambda each: visible(f"{member.name}/{each}")
        )

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
    ) -> Descriptor:
        member, relative = self._split(repository)
        return await member.registry.push_manifest(relative, reference, manifest, tags, when)

    async def delete_blob(self, repository: str, digest: Digest, when: Conditions = ALWAYS) -> None:
        member, relative = self._split(repository)
        await member.registry.delete_blob(relative, digest, when)

    async def delete_manifest(self, repository: str, reference: Reference, when: Conditions = ALWAYS) -> None:
        member, relative = self._split(repository)
        await member.registry.delete_manifest(relative, reference, when)

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        """Raises Unsupported if the namespace is not a cache."""
        cache, relative = self._cache(repository)
        return await cache.revalidate(relative, tag)

    async def fill_blob(self, repository: str, digest: Digest) -> int:
        """Raises Unsupported if the namespace is not a cache."""
        cache, relative = self._cache(repository)
        return await cache.fill_blob(relative, digest)

    def prepare(self, namespace: str) -> None:
        """Make the namespace now if it is made when it is asked for.  Raises NameUnknown, Unavailable."""
        self._split(namespace)

    def spare(self, repository: str, reference: Reference) -> None:
        """See Cache.spare().  Raises Unsupported if the namespace is not a cache."""
        cache, relative = self._cache(repository)
        cache.spare(relative, reference)

    def _cache(self, repository: str) -> tuple[Refreshable, str]:
        member, relative = self._split(repository)
        if not isinstance(member.registry, Refreshable):
            raise Unsupported(f"{member.name} is not a cache: it has no upstream to refresh from")
        return member.registry, relative

    async def close(self) -> None:
        """Close every registry once, even if one fails; then raise that failure."""
        registries = {id(member.registry): member.registry for member in self._members.values()}
        closing = (registry.close() for registry in registries.values())
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _split(self, repository: str) -> tuple[Member, str]:
        namespace, _, relative = repository.partition("/")
        member = self._members.get(namespace)
        if member is None and self._others is not None:
            member = self._others.member(namespace)
        return member or refuse(namespace), relative

    def _found(self, text: str, host: str | None) -> MemberSettings | None:
        """The namespace that a client names.  Its own name for this server is none of the others."""
        if (found := self._named(text)) is not None or self._others is None:
            return found
        other = self._others.settings(text)
        return None if other is not None and other.name == registry_host(host or "") else other

    def _named(self, text: str) -> Member | None:
        # One look-up in the common case: a name as it is configured.
        return self._by_name.get(text) or self._by_name.get(normal_host(text))

    def _is_name(self, host: str) -> bool:
        """Whether a Host header is a namespace's name: the client takes this server for that registry."""
        return self._named(host) is not None or self._named(host.rpartition(":")[0]) is not None

    def _hosted(self, text: str) -> Member | None:
        text = canonical_host(text.lower()) or text.lower()
        return self._by_host.get(text) or self._by_host.get(text.rpartition(":")[0])


def _claim(table: dict[str, Member], key: str, member: Member) -> None:
    if table.setdefault(key, member) is not member:
        raise ValueError(f"{key!r} is claimed by the namespaces {table[key].name!r} and {member.name!r}")
