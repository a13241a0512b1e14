"""The full names of repositories, `<namespace>/<repository>`, and what is said of those that are refused."""

from __future__ import annotations

from typing import NoReturn, Protocol

from proxy.config.hosts import is_host, path_of
from storage.errors import NameInvalid, NameUnknown
from storage.oci import NAME_LIMIT, NameGrammar, parse_name


class MemberSettings(Protocol):
    """How names in a namespace are read."""

    @property
    def name(self) -> str: ...

    @property
    def library(self) -> bool: ...

    @property
    def names(self) -> NameGrammar: ...


def is_host_of(member: MemberSettings, name: str) -> bool:
    """Whether one of the names of a namespace is a host, with `_` in place of a colon too."""
    return is_host(name) or (":" in member.name and name.lower() == path_of(member.name))


def without_v2(member: MemberSettings, repository: str) -> str:
    """The name that a client writes behind that of the namespace, without v2/ if that is a mirror's path."""
    # In a namespace named by a plain word, most likely a private one, v2/ is as good a name as any.
    return repository.removeprefix("v2/") if is_host(member.name) else repository


def full_name(member: MemberSettings, repository: str) -> str:
    """The full name of a repository of the namespace.  Raises NameInvalid."""
    if member.library and "/" not in repository:
        repository = f"library/{repository}"
    full = f"{member.name}/{repository}"
    if len(full) > NAME_LIMIT:
        raise NameInvalid(f"{full[:80]!r}… is longer than the {NAME_LIMIT} characters a name may have")
    try:
        parse_name(repository, member.names)
    except NameInvalid:
        raise NameInvalid(f"{repository[:80]!r} is not a repository name") from None
    return full


def refuse_without_namespace(name: str) -> NoReturn:
    """Raises NameUnknown: the name has no namespace."""
    raise NameUnknown(
        f"{name[:80]!r} names no namespace and there is no default: write <namespace>/<repository>,"
        " or set default_namespace: in the configuration"
    )


def refuse(namespace: str) -> NoReturn:
    """Raises NameUnknown: there is no such namespace."""
    raise NameUnknown(
        f"{namespace[:80]!r} is not a configured namespace: add it under namespaces: in the configuration"
    )
