"""The checks of dockerd, by its daemon.json."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.machine import InvalidFile, Machine, origin
from proxy.setup.engines import DOCKER

CLIENT = "docker"


def check(machine: Machine) -> list[Check]:
    """All checks; none if dockerd is not installed."""
    return list(_checks(machine)) if machine.has("dockerd", DOCKER) else []


def _checks(machine: Machine) -> Iterator[Check]:
    path = machine.path(f"{DOCKER}/daemon.json")
    try:
        keys = _parse(machine.read(path))
        mirrors, insecure = (_get_list(keys, each) for each in ("registry-mirrors", "insecure-registries"))
    except InvalidFile as error:
        message = f"{path}: {error}: dockerd does not start with it"
        yield failed("configuration", CLIENT, message, "fix it by hand; then entrepot setup can add its keys")
        return
    if DOCKER_HUB in machine.site.namespaces:
        yield _check_mirrors(machine, mirrors, str(path))
        yield machine.bypass_check(
            CLIENT,
            "if the server fails, dockerd asks Docker Hub itself",
            "no setting of dockerd prevents that: block registry-1.docker.io in the network",
        )
    if missing := [each for each in machine.site.insecure if not _covers(insecure, each)]:
        message = f"{', '.join(missing)} is not in insecure-registries: pulls by full name use https"
        yield warning("configuration", CLIENT, message, machine.setup_command(CLIENT))
    others = [each for each in machine.site.namespaces if each != DOCKER_HUB]
    if others:
        stored = keys.get("features", {}).get("containerd-snapshotter") is True
        hosts = machine.path(f"{DOCKER}/certs.d/_default/hosts.toml").exists()
        if not (stored and hosts):
            advice = (
                f"pull them by full name, {machine.site.host}/{others[0]}/…; dockerd mirrors only Docker Hub"
            )
            yield machine.left_out_check(CLIENT, others, advice)


def _parse(text: str | None) -> dict[str, Any]:
    try:
        keys = json.loads(text) if text and text.strip() else {}
    except ValueError as error:
        raise InvalidFile(f"it is not JSON: {error}") from None
    if not isinstance(keys, dict) or not isinstance(keys.get("features", {}), dict):
        raise InvalidFile("it is not an object that dockerd accepts")
    return keys


def _get_list(keys: dict[str, Any], key: str) -> list[str]:
    found = keys.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InvalidFile(f"{key} is not a list of strings")
    return found


def _check_mirrors(machine: Machine, mirrors: list[str], path: str) -> Check:
    ours = machine.site.url.origin()
    origins = [origin(each) for each in mirrors]
    if ours in origins:
        if before := origins.index(ours):
            message = f"{mirrors[before - 1]} is asked before {ours}"
            return warning("configuration", CLIENT, message, f"move {ours} to the top of registry-mirrors")
        return ok("configuration", CLIENT, f"{path} names the server as the mirror of Docker Hub")
    other = next((each for each in origins if each and each.authority == ours.authority), None)
    if other:
        message = f"{path} names {other}, but the server uses {ours.scheme}"
        return failed("configuration", CLIENT, message, machine.setup_command(CLIENT))
    return failed(
        "configuration",
        CLIENT,
        f"{path} does not name {ours} in registry-mirrors",
        machine.setup_command(CLIENT),
    )


def _covers(insecure: list[str], name: str) -> bool:
    """Whether dockerd uses the host without TLS, because of its name or its network."""
    if name in insecure:
        return True
    try:
        address = ipaddress.ip_address(
            name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        )
    except ValueError:
        return False
    for each in insecure:
        try:
            if address in ipaddress.ip_network(each):
                return True
        except ValueError:
            continue
    return False
