"""The checks of containerd, by the files below its config_path.

If a hosts.toml is invalid, containerd logs that and ignores the file, so that pulls bypass the server
unnoticed.  Therefore each file is read here as containerd reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarl import URL

from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.machine import InvalidFile, Machine, origin
from proxy.setup.engines import CONTAINERD, CRI, PULL

CLIENT = "containerd"
CAPABILITIES = frozenset(("pull", "resolve", "push", "referrers"))
DEFAULT = "_default"


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A registry host that a hosts.toml names."""

    url: URL
    capabilities: frozenset[str]
    override_path: bool
    authorities: tuple[str, ...]


def check(machine: Machine) -> list[Check]:
    """All checks; none if containerd is not installed."""
    return list(_checks(machine)) if machine.has("containerd", CONTAINERD) else []


def _checks(machine: Machine) -> Iterator[Check]:
    directories, check = config_path(machine)
    yield check
    files: dict[Path | None, list[str]] = {}
    for name in machine.site.namespaces:
        files.setdefault(find_hosts_file(machine, directories, name), []).append(name)
    bypassing: list[str] = []
    for path, names in files.items():
        if path is None:
            bypassing += names
        else:
            yield from _check_file(machine, path, names)
    if bypassing:
        yield machine.left_out_check(CLIENT, bypassing, machine.setup_command(CLIENT), every=len(files) == 1)


def config_path(machine: Machine) -> tuple[list[Path], Check]:
    """The directories of the hosts.toml files, and a check whether Kubernetes (CRI) uses them."""
    path = machine.path(f"{CONTAINERD}/config.toml")
    usual = [machine.path(f"{CONTAINERD}/certs.d")]
    try:
        tree = machine.toml(path) or {}
    except InvalidFile as error:
        advice = "fix it by hand: containerd does not start with it"
        return usual, failed("configuration", CLIENT, f"{path}: {error}", advice)
    for plugin in CRI.values():
        registry = _table(_table(tree, "plugins"), plugin).get("registry")
        if not isinstance(registry, Mapping):
            continue
        found = registry.get("config_path")
        if isinstance(found, str) and found:
            if registry.get("mirrors") or registry.get("configs"):
                message = f"{path} has registry.mirrors or registry.configs beside config_path"
                advice = "remove them: with both, containerd offers Kubernetes no registry at all"
                return usual, failed("configuration", CLIENT, message, advice)
            message = f"{path} has config_path = {found}"
            return [machine.path(each) for each in found.split(":")], ok("configuration", CLIENT, message)
    message = f"{path} has no config_path: Kubernetes ignores {CONTAINERD}/certs.d, nerdctl does not"
    advice = "if Kubernetes runs here, add it as entrepot setup containerd shows; since 2.2 it is the default"
    return usual, warning("configuration", CLIENT, message, advice)


def unread(machine: Machine) -> str:
    """Why Kubernetes (CRI) does not read the files that setup writes, or nothing if it does."""
    directories, found = config_path(machine)
    if found.state != "ok":
        return f"{found.message}; {found.advice}"
    ours = machine.path(f"{CONTAINERD}/certs.d")
    # Below a root that a container sees, it may be in another place than on the node: k3s has it elsewhere.
    if any(each.parts[-2:] == ours.parts[-2:] for each in directories):
        return ""
    return f"{found.message}, but setup writes to {ours}: Kubernetes reads none of its files"


def _table(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def find_hosts_file(machine: Machine, directories: list[Path], name: str) -> Path | None:
    """The hosts.toml of a registry, from the first directory that exists for it; None if that has none."""
    names = [name, DEFAULT]
    if ":" in name:
        before, _, port = name.rpartition(":")
        names.insert(0, f"{before}_{port}_")
    for directory in directories:
        for each in names:
            if (directory / each).is_dir():
                path = directory / each / "hosts.toml"
                return path if path.exists() else None
    return None


def _check_file(machine: Machine, path: Path, names: list[str]) -> Iterator[Check]:
    subject = f"{CLIENT}, {', '.join(names)}"
    try:
        tree = machine.toml(path) or {}
        servers = parse(tree)
    except InvalidFile as error:
        message = f"{path}: {error}: containerd logs that and bypasses the server"
        yield failed(
            "configuration", subject, message, f"fix it, or run {machine.setup_command(CLIENT)} --force"
        )
        return
    if "host" not in tree:
        message = f"{path} has no [host]: older versions of containerd, such as 1.6, ignore it"
        yield warning("configuration", subject, message, "add an empty [host] at its end")
    ours = [each for each in servers if each.url.origin() == machine.site.url.origin()]
    if not ours:
        message = f"{path} does not name {machine.site.base}"
        yield failed("configuration", subject, message, f"{machine.setup_command(CLIENT)} --force")
        return
    yield from _check_entry(machine, path, subject, servers, ours[0])
    others = [str(each.url.origin()) for each in servers if each not in ours]
    if "server" not in tree:
        others.append("the registry itself, since server is not set")
    if others:
        yield machine.bypass_check(subject, f"if the server fails, containerd asks {', then '.join(others)}")


def _check_entry(
    machine: Machine, path: Path, subject: str, servers: list[HostEntry], ours: HostEntry
) -> Iterator[Check]:
    fault = ""
    if missing := [each for each in PULL if each not in ours.capabilities]:
        what = {"pull": "the server is never asked", "resolve": "tags bypass the server"}[missing[0]]
        fault = f"{path}: capabilities have no {' and no '.join(missing)}: {what}"
    elif ours.override_path and not ours.url.path.startswith("/v2"):
        fault = f"{path}: with override_path, the path must begin with /v2, else the server answers 404"
    elif absent := [each for each in ours.authorities if not _resolve(machine, path, each).exists()]:
        fault = f"{path}: {absent[0]}, which its ca names, does not exist"
    if fault:
        yield failed("configuration", subject, fault, f"{machine.setup_command(CLIENT)} --force")
    elif servers[0] is not ours:
        message = f"{path}: {servers[0].url.origin()} is asked before {machine.site.base}"
        yield warning("configuration", subject, message, "move the server's table to the top")
    else:
        yield ok("configuration", subject, f"{path} names the server first, for tags too")


def _resolve(machine: Machine, path: Path, name: str) -> Path:
    return machine.path(name) if name.startswith("/") else path.parent / name


def parse(tree: Mapping[str, Any]) -> list[HostEntry]:
    """The entries of a hosts.toml, `server` last.  Raises InvalidFile if containerd rejects it."""
    hosts = tree.get("host", {})
    if not isinstance(hosts, Mapping):
        raise InvalidFile("host is not a table")
    found = [_server(name, keys) for name, keys in hosts.items()]
    if (server := tree.get("server")) is not None:
        found.append(_server(server, tree))
    return found


def _server(name: object, keys: object) -> HostEntry:
    if not isinstance(name, str) or not isinstance(keys, Mapping):
        raise InvalidFile(f"{name!r} is not a table")
    url = origin(name)
    if url is None or not url.host:
        raise InvalidFile(f"{name!r} is not a URL")
    capabilities = keys.get("capabilities", sorted(CAPABILITIES))
    if not isinstance(capabilities, list) or not set(map(str, capabilities)) <= CAPABILITIES:
        known = ", ".join(sorted(CAPABILITIES))
        raise InvalidFile(f"capabilities of {name} are {capabilities!r}, but only {known} are known")
    ca = keys.get("ca", [])
    authorities = [ca] if isinstance(ca, str) else ca
    if not isinstance(authorities, list) or not all(isinstance(each, str) for each in authorities):
        raise InvalidFile(f"ca of {name} is not a file name")
    full = URL(name if "://" in name else f"https://{name}")
    return HostEntry(
        full, frozenset(map(str, capabilities)), keys.get("override_path") is True, tuple(authorities)
    )
