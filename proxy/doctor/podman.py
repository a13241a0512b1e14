"""The checks of podman, buildah, skopeo and CRI-O, by registries.conf and registries.conf.d."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.machine import InvalidFile, Machine
from proxy.setup.engines import CONTAINERS, mirror_paths

CLIENT = "podman"
Tables = dict[str, Mapping[str, Any]]  # [[registry]] by prefix


def check(machine: Machine) -> list[Check]:
    """All checks; none if none of these clients is installed."""
    installed = any(machine.has(each, CONTAINERS) for each in ("podman", "skopeo", "buildah", "crio"))
    return list(_checks(machine)) if installed else []


def _checks(machine: Machine) -> Iterator[Check]:
    try:
        tables, searched = read(machine)
    except InvalidFile as error:
        yield failed("configuration", CLIENT, f"{error}: no pull works with it", "fix it by hand")
        return
    direct, bypassed, mirrored = [], [], []
    for name in machine.site.namespaces:
        table = tables.get(name)
        server = None if table is None else _find_server(machine, table)
        if table is None or server is None:
            direct.append(name)
        elif fault := _find_fault(machine, name, table, server):
            yield failed("configuration", f"{CLIENT}, {name}", fault, machine.setup_command(CLIENT))
        else:
            mirrored.append(name)
            if server is not table and table.get("blocked") is not True:  # its mirrors are not blocked
                bypassed.append(name)
            yield from _check_scope(machine, name, table, server)
    if mirrored:
        yield ok("configuration", CLIENT, f"{', '.join(mirrored)}: pulled through the server")
    if bypassed:
        yield machine.bypass_check(CLIENT, f"if the server fails, podman asks {', '.join(bypassed)} directly")
    if direct:
        every = len(direct) == len(machine.site.namespaces)
        yield machine.left_out_check(CLIENT, direct, machine.setup_command(CLIENT), every)
    yield from _check_prefixes(machine, tables)
    if unmirrored := [each for each in searched if each not in machine.site.namespaces]:
        message = f"a name without a registry is searched in {', '.join(unmirrored)}, without the server"
        advice = "keep only mirrored registries in unqualified-search-registries of registries.conf"
        yield warning("unqualified", CLIENT, message, advice)


def read(machine: Machine) -> tuple[Tables, list[str]]:
    """The tables by prefix, and unqualified-search-registries.  Raises InvalidFile, with the path."""
    tables: Tables = {}
    searched: list[str] = []
    for path in _files(machine):
        try:
            tree = machine.toml(path) or {}
        except InvalidFile as error:
            raise InvalidFile(f"{path}: {error}") from None
        if "registries" in tree:
            raise InvalidFile(f"{path}: it has version 1 ([registries.…]), which has no mirrors")
        found = tree.get("registry", [])
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise InvalidFile(f"{path}: registry is not an array of tables")
        # A later file replaces the table of an earlier one with the same prefix.
        tables |= {str(each.get("prefix") or each.get("location", "")): each for each in found}
        if isinstance(names := tree.get("unqualified-search-registries"), list):
            searched = [str(each) for each in names]
    return tables, searched


def _files(machine: Machine) -> list[Path]:
    """The files in the order in which they are read.  containers-registries.conf(5)"""
    first, directories = (
        machine.path(f"{CONTAINERS}/registries.conf"),
        [machine.path(f"{CONTAINERS}/registries.conf.d")],
    )
    if machine.root == Path("/") and (home := os.environ.get("HOME")):
        own = Path(home) / ".config" / "containers"
        if (own / "registries.conf").exists():
            first = own / "registries.conf"
        directories.append(own / "registries.conf.d")
    more = [path for each in directories if each.is_dir() for path in sorted(each.glob("*.conf"))]
    return [first, *more]


def _find_server(machine: Machine, table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first mirror that names the server, or else the table if it does, or None."""
    return next(_servers(machine, table), None)


def _servers(machine: Machine, table: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    mirrors = table.get("mirror", [])
    for each in [*(mirrors if isinstance(mirrors, list) else []), table]:
        if isinstance(each, Mapping) and str(each.get("location", "")).partition("/")[0] == machine.site.host:
            yield each


def _find_fault(machine: Machine, name: str, table: Mapping[str, Any], server: Mapping[str, Any]) -> str:
    """Why podman cannot pull through the server, or ""."""
    path = str(server.get("location", "")).partition("/")[2]
    bare = name == DOCKER_HUB and machine.site.hub
    right = mirror_paths(machine.site).get(name)
    if right is None:
        return "no location at the server has a mirror of it for podman: give the namespace an alias"
    if path != right and not (bare and not path):
        return f"its location ends in /{path}, but the path at the server is /{right}"
    if machine.site.plain and server.get("insecure") is not True:
        return "has no insecure = true, so podman uses https, but the server has no TLS"
    return ""


def _check_scope(
    machine: Machine, name: str, table: Mapping[str, Any], server: Mapping[str, Any]
) -> Iterator[Check]:
    mirrors = table.get("mirror", [])
    first = mirrors[0] if isinstance(mirrors, list) and mirrors else table
    subject = f"{CLIENT}, {name}"
    kinds = {each.get("pull-from-mirror") or "all" for each in _servers(machine, table)}
    if table.get("mirror-by-digest-only") is True or kinds == {"digest-only"}:
        message = "only digests are asked of the server, tags bypass it"
        advice = "remove mirror-by-digest-only and pull-from-mirror"
        yield warning("configuration", subject, message, advice)
    elif kinds == {"tag-only"}:
        yield warning("configuration", subject, "digests bypass the server", "remove pull-from-mirror")
    elif first is not server:
        message = (
            f"{first.get('location') if isinstance(first, Mapping) else first} is asked before the server"
        )
        yield warning("configuration", subject, message, "move the server's mirror to the top")


def _check_prefixes(machine: Machine, tables: Tables) -> Iterator[Check]:
    """Checks of tables for a part of a registry, which take precedence over the table of the registry."""
    for prefix, table in tables.items():
        namespace = prefix.partition("/")[0]
        if (
            namespace in machine.site.namespaces
            and prefix != namespace
            and _find_server(machine, table) is None
        ):
            message = f"{prefix} has its own table, which does not name the server"
            yield warning("namespaces", CLIENT, message, "add the server as its mirror, or remove it")
