"""containerd, by what lies below its config_path.

It logs what is wrong with a hosts.toml, and goes on as if the file were not there: nobody who pulls sees
that it goes past the server.  So each file is read here as containerd reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarl import URL

from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.host import Broken, Host, origin
from proxy.setup.engines import CONTAINERD, CRI, PULL

CLIENT = "containerd"
CAPABILITIES = frozenset(("pull", "resolve", "push", "referrers"))
DEFAULT = "_default"


@dataclass(frozen=True, slots=True)
class Server:
    """One that a hosts.toml names, in the order in which they are asked."""

    url: URL
    capabilities: frozenset[str]
    override_path: bool
    authorities: tuple[str, ...]


def look(host: Host) -> list[Check]:
    """Nothing where there is no containerd."""
    return list(_looked(host)) if host.has("containerd", CONTAINERD) else []


def _looked(host: Host) -> Iterator[Check]:
    directories, check = config_path(host)
    yield check
    files: dict[Path | None, list[str]] = {}
    for name in host.site.namespaces:
        files.setdefault(hosts_file(host, directories, name), []).append(name)
    past: list[str] = []
    for path, names in files.items():
        if path is None:
            past += names
        else:
            yield from _file(host, path, names)
    if past:
        yield host.leaves_out(CLIENT, past, host.setup(CLIENT), every=len(files) == 1)


def config_path(host: Host) -> tuple[list[Path], Check]:
    """The directories where it looks for hosts.toml, and whether Kubernetes makes it look there."""
    path = host.path(f"{CONTAINERD}/config.toml")
    usual = [host.path(f"{CONTAINERD}/certs.d")]
    try:
        tree = host.toml(path) or {}
    except Broken as error:
        advice = "mend it by hand: containerd does not start with it"
        return usual, failed("configuration", CLIENT, f"{path}: {error}", advice)
    for plugin in CRI.values():
        registry = _table(_table(tree, "plugins"), plugin).get("registry")
        if not isinstance(registry, Mapping):
            continue
        found = registry.get("config_path")
        if isinstance(found, str) and found:
            if registry.get("mirrors") or registry.get("configs"):
                message = f"{path} has registry.mirrors or registry.configs beside config_path"
                advice = "take them out: with both, containerd gives Kubernetes no registry at all"
                return usual, failed("configuration", CLIENT, message, advice)
            message = f"{path} has config_path = {found}"
            return [host.path(each) for each in found.split(":")], ok("configuration", CLIENT, message)
    message = f"{path} has no config_path: Kubernetes pulls past {CONTAINERD}/certs.d, nerdctl does not"
    advice = (
        "put it in, as entrepot setup containerd shows, if Kubernetes runs here; since 2.2 it is the default"
    )
    return usual, warning("configuration", CLIENT, message, advice)


def _table(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def hosts_file(host: Host, directories: list[Path], name: str) -> Path | None:
    """What tells containerd of a registry: in the first directory that is there, and there alone."""
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


def _file(host: Host, path: Path, names: list[str]) -> Iterator[Check]:
    subject = f"{CLIENT}, {', '.join(names)}"
    try:
        tree = host.toml(path) or {}
        servers = parse(tree)
    except Broken as error:
        message = f"{path}: {error}: containerd logs that, and goes past the server"
        yield failed("configuration", subject, message, f"mend it, or {host.setup(CLIENT)} --force")
        return
    if "host" not in tree:
        message = (
            f"{path} has no [host]: older containerd, such as 1.6, takes it for broken, and goes past it"
        )
        yield warning("configuration", subject, message, "put an empty [host] at its end")
    ours = [each for each in servers if each.url.origin() == host.site.url.origin()]
    if not ours:
        message = f"{path} does not name {host.site.base}"
        yield failed("configuration", subject, message, f"{host.setup(CLIENT)} --force")
        return
    yield from _judged(host, path, subject, servers, ours[0])
    others = [str(each.url.origin()) for each in servers if each not in ours]
    if "server" not in tree:
        others.append("the registry itself, since there is no server =")
    if others:
        yield host.goes_past(subject, f"when the server fails, asked is {', then '.join(others)}")


def _judged(host: Host, path: Path, subject: str, servers: list[Server], ours: Server) -> Iterator[Check]:
    fault = ""
    if lacking := [each for each in PULL if each not in ours.capabilities]:
        what = {"pull": "nothing is asked for there", "resolve": "tags are asked for past it"}[lacking[0]]
        fault = f"{path}: capabilities lack {' and '.join(lacking)}: {what}"
    elif ours.override_path and not ours.url.path.startswith("/v2"):
        fault = f"{path}: override_path leaves out /v2, and the server answers 404 without it"
    elif absent := [each for each in ours.authorities if not _beside(host, path, each).exists()]:
        fault = f"{path}: there is no {absent[0]}, which its ca names"
    if fault:
        yield failed("configuration", subject, fault, f"{host.setup(CLIENT)} --force")
    elif servers[0] is not ours:
        message = f"{path}: {servers[0].url.origin()} is asked before {host.site.base}"
        yield warning("configuration", subject, message, "put the server's table first")
    else:
        yield ok("configuration", subject, f"{path} has it asked first, for tags too")


def _beside(host: Host, path: Path, name: str) -> Path:
    return host.path(name) if name.startswith("/") else path.parent / name


def parse(tree: Mapping[str, Any]) -> list[Server]:
    """The servers of a hosts.toml, `server` last.  Raises Broken where containerd gives up as well."""
    hosts = tree.get("host", {})
    if not isinstance(hosts, Mapping):
        raise Broken("its host is no table")
    found = [_server(name, keys) for name, keys in hosts.items()]
    if (server := tree.get("server")) is not None:
        found.append(_server(server, tree))
    return found


def _server(name: object, keys: object) -> Server:
    if not isinstance(name, str) or not isinstance(keys, Mapping):
        raise Broken(f"its {name!r} is no table of a host")
    url = origin(name)
    if url is None or not url.host:
        raise Broken(f"its {name!r} is no URL")
    capabilities = keys.get("capabilities", sorted(CAPABILITIES))
    if not isinstance(capabilities, list) or not set(map(str, capabilities)) <= CAPABILITIES:
        known = ", ".join(sorted(CAPABILITIES))
        raise Broken(f"capabilities of {name} are {capabilities!r}, and known are {known}")
    ca = keys.get("ca", [])
    authorities = [ca] if isinstance(ca, str) else ca
    if not isinstance(authorities, list) or not all(isinstance(each, str) for each in authorities):
        raise Broken(f"ca of {name} names no file")
    full = URL(name if "://" in name else f"https://{name}")
    return Server(
        full, frozenset(map(str, capabilities)), keys.get("override_path") is True, tuple(authorities)
    )
