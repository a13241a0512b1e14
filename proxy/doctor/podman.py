"""The checks of podman, buildah, skopeo and CRI-O, by registries.conf and registries.conf.d."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.host import InvalidFile, Machine
from proxy.setup.engines import CONTAINERS

CLIENT = "podman"
Tables = dict[str, Mapping[str, Any]]  # [[registry]] by prefix


def check(host: Machine) -> list[Check]:
    """No checks if none of them is installed."""
    here = any(host.has(each, CONTAINERS) for each in ("podman", "skopeo", "buildah", "crio"))
    return list(_checks(host)) if here else []


def _checks(host: Machine) -> Iterator[Check]:
    try:
        tables, searched = read(host)
    except InvalidFile as error:
        yield failed("configuration", CLIENT, f"{error}: no pull works with it", "fix it by hand")
        return
    direct, bypassed, right = [], [], []
    for name in host.site.namespaces:
        table = tables.get(name)
        place = None if table is None else _find_server(host, name, table)
        if table is None or place is None:
            direct.append(name)
        elif fault := _find_fault(host, name, table, place):
            yield failed("configuration", f"{CLIENT}, {name}", fault, host.setup_command(CLIENT))
        else:
            right.append(name)
            if place is not table:
                bypassed.append(name)
            yield from _check_scope(host, name, table, place)
    if right:
        yield ok("configuration", CLIENT, f"{', '.join(right)}: pulled through the server")
    if bypassed:
        yield host.bypass_check(CLIENT, f"if the server fails, podman asks {', '.join(bypassed)} directly")
    if direct:
        every = len(direct) == len(host.site.namespaces)
        yield host.left_out_check(CLIENT, direct, host.setup_command(CLIENT), every)
    yield from _check_prefixes(host, tables)
    if beside := [each for each in searched if each not in host.site.namespaces]:
        message = f"a name without a registry is searched in {', '.join(beside)}, without the server"
        advice = "keep only mirrored registries in unqualified-search-registries of registries.conf"
        yield warning("unqualified", CLIENT, message, advice)


def read(host: Machine) -> tuple[Tables, list[str]]:
    """The tables by prefix, and unqualified-search-registries.  Raises InvalidFile, with the path."""
    tables: Tables = {}
    searched: list[str] = []
    for path in _files(host):
        try:
            tree = host.toml(path) or {}
        except InvalidFile as error:
            raise InvalidFile(f"{path}: {error}") from None
        if "registries" in tree:
            raise InvalidFile(f"{path}: it has version 1 ([registries.…]), which has no mirrors")
        found = tree.get("registry", [])
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise InvalidFile(f"{path}: registry is not an array of tables")
        # A later file replaces the table of an earlier one with the same prefix.
        tables |= {str(each.get("prefix") or each.get("location", "")): each for each in found}
        if isinstance(given := tree.get("unqualified-search-registries"), list):
            searched = [str(each) for each in given]
    return tables, searched


def _files(host: Machine) -> list[Path]:
    """The files in the order in which they are read.  containers-registries.conf(5)"""
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


def _find_server(host: Machine, name: str, table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The table or the mirror that names the server, or None."""
    mirrors = table.get("mirror", [])
    for each in [*(mirrors if isinstance(mirrors, list) else []), table]:
        if isinstance(each, Mapping) and str(each.get("location", "")).partition("/")[0] == host.site.host:
            return each
    return None


def _find_fault(host: Machine, name: str, table: Mapping[str, Any], place: Mapping[str, Any]) -> str:
    path = str(place.get("location", "")).partition("/")[2]
    bare = name == DOCKER_HUB and host.site.hub
    if path != name and not (bare and not path):
        return f"its location ends in /{path}, but the path at the server is /{name}"
    if host.site.plain and place.get("insecure") is not True:
        return "has no insecure = true, so podman uses https, but the server has no TLS"
    if table.get("blocked") is True:
        return "is blocked, so podman asks neither the registry nor its mirrors"
    return ""


def _check_scope(
    host: Machine, name: str, table: Mapping[str, Any], place: Mapping[str, Any]
) -> Iterator[Check]:
    mirrors = table.get("mirror", [])
    first = mirrors[0] if isinstance(mirrors, list) and mirrors else table
    subject = f"{CLIENT}, {name}"
    if table.get("mirror-by-digest-only") is True or place.get("pull-from-mirror") == "digest-only":
        message = "only digests are asked of the server, tags bypass it"
        advice = "remove mirror-by-digest-only and pull-from-mirror"
        yield warning("configuration", subject, message, advice)
    elif place.get("pull-from-mirror") == "tag-only":
        yield warning("configuration", subject, "digests bypass the server", "remove pull-from-mirror")
    elif first is not place:
        message = (
            f"{first.get('location') if isinstance(first, Mapping) else first} is asked before the server"
        )
        yield warning("configuration", subject, message, "move the server's mirror to the top")


def _check_prefixes(host: Machine, tables: Tables) -> Iterator[Check]:
    """Checks of tables for a part of a registry, which take precedence over the table of the registry."""
    for prefix, table in tables.items():
        namespace = prefix.partition("/")[0]
        if (
            namespace in host.site.namespaces
            and prefix != namespace
            and _find_server(host, prefix, table) is None
        ):
            message = f"{prefix} has its own table, which does not name the server"
            yield warning("namespaces", CLIENT, message, "add the server as its mirror, or remove it")
