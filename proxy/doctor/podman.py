"""podman, buildah, skopeo and CRI-O, by registries.conf and what lies in registries.conf.d."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.host import Broken, Host
from proxy.setup.engines import CONTAINERS

CLIENT = "podman"
Tables = dict[str, Mapping[str, Any]]  # [[registry]] by prefix


def look(host: Host) -> list[Check]:
    """Nothing where there is none of them."""
    here = any(host.has(each, CONTAINERS) for each in ("podman", "skopeo", "buildah", "crio"))
    return list(_looked(host)) if here else []


def _looked(host: Host) -> Iterator[Check]:
    try:
        tables, searched = read(host)
    except Broken as error:
        yield failed("configuration", CLIENT, f"{error}: no pull works with it", "mend it by hand")
        return
    direct, bypassed, right = [], [], []
    for name in host.site.namespaces:
        table = tables.get(name)
        place = None if table is None else _place(host, name, table)
        if table is None or place is None:
            direct.append(name)
        elif fault := _fault(host, name, table, place):
            yield failed("configuration", f"{CLIENT}, {name}", fault, host.setup(CLIENT))
        else:
            right.append(name)
            if place is not table:
                bypassed.append(name)
            yield from _narrowed(host, name, table, place)
    if right:
        yield ok("configuration", CLIENT, f"{', '.join(right)}: asked of the server")
    if bypassed:
        yield host.goes_past(CLIENT, f"when the server fails, {', '.join(bypassed)} themselves are asked")
    if direct:
        every = len(direct) == len(host.site.namespaces)
        yield host.leaves_out(CLIENT, direct, host.setup(CLIENT), every)
    yield from _deeper(host, tables)
    if beside := [each for each in searched if each not in host.site.namespaces]:
        message = f"a name without a registry is looked for in {', '.join(beside)}, past the server"
        advice = "leave only mirrored ones in unqualified-search-registries of registries.conf"
        yield warning("unqualified", CLIENT, message, advice)


def read(host: Host) -> tuple[Tables, list[str]]:
    """The tables by prefix, and unqualified-search-registries.  Raises Broken, with the path."""
    tables: Tables = {}
    searched: list[str] = []
    for path in _files(host):
        try:
            tree = host.toml(path) or {}
        except Broken as error:
            raise Broken(f"{path}: {error}") from None
        if "registries" in tree:
            raise Broken(f"{path}: it is of version 1 ([registries.…]), and has no mirrors")
        found = tree.get("registry", [])
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise Broken(f"{path}: its registry is no array of tables")
        # A later file replaces what an earlier one says of the same prefix.
        tables |= {str(each.get("prefix") or each.get("location", "")): each for each in found}
        if isinstance(given := tree.get("unqualified-search-registries"), list):
            searched = [str(each) for each in given]
    return tables, searched


def _files(host: Host) -> list[Path]:
    """In the order in which they are read.  containers-registries.conf(5)"""
    first, directories = (
        host.path(f"{CONTAINERS}/registries.conf"),
        [host.path(f"{CONTAINERS}/registries.conf.d")],
    )
    if host.root == Path("/") and (home := os.environ.get("HOME")):
        own = Path(home) / ".config" / "containers"
        if (own / "registries.conf").exists():
            first = own / "registries.conf"
        directories.append(own / "registries.conf.d")
    more = [path for each in directories if each.is_dir() for path in sorted(each.glob("*.conf"))]
    return [first, *more]


def _place(host: Host, name: str, table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What leads to the server: the table itself, or one of its mirrors; None if nothing does."""
    mirrors = table.get("mirror", [])
    for each in [*(mirrors if isinstance(mirrors, list) else []), table]:
        if isinstance(each, Mapping) and str(each.get("location", "")).partition("/")[0] == host.site.host:
            return each
    return None


def _fault(host: Host, name: str, table: Mapping[str, Any], place: Mapping[str, Any]) -> str:
    path = str(place.get("location", "")).partition("/")[2]
    bare = name == DOCKER_HUB and host.site.hub
    if path != name and not (bare and not path):
        return f"its location ends in /{path}, where the server has /{name}"
    if host.site.plain and place.get("insecure") is not True:
        return "lacks insecure = true: it is asked by https, and the server has no TLS"
    if table.get("blocked") is True:
        return "is blocked: neither it nor its mirrors are asked"
    return ""


def _narrowed(host: Host, name: str, table: Mapping[str, Any], place: Mapping[str, Any]) -> Iterator[Check]:
    mirrors = table.get("mirror", [])
    first = mirrors[0] if isinstance(mirrors, list) and mirrors else table
    subject = f"{CLIENT}, {name}"
    if table.get("mirror-by-digest-only") is True or place.get("pull-from-mirror") == "digest-only":
        message = "only what is named by digest is asked of the server: tags go past it"
        advice = "take mirror-by-digest-only and pull-from-mirror out"
        yield warning("configuration", subject, message, advice)
    elif place.get("pull-from-mirror") == "tag-only":
        yield warning(
            "configuration", subject, "what is named by digest goes past it", "take pull-from-mirror out"
        )
    elif first is not place:
        message = f"{first.get('location') if isinstance(first, Mapping) else first} is asked before it"
        yield warning("configuration", subject, message, "put the server's mirror first")


def _deeper(host: Host, tables: Tables) -> Iterator[Check]:
    """Tables for a part of a registry, which go before that of all of it."""
    for prefix, table in tables.items():
        namespace = prefix.partition("/")[0]
        if namespace in host.site.namespaces and prefix != namespace and _place(host, prefix, table) is None:
            message = f"{prefix} has a table of its own, which does not lead to the server"
            yield warning(
                "namespaces", CLIENT, message, "give it the server for a mirror too, or take it out"
            )
