"""The kinds of extensions: the group of their entry points, and the methods that they must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.config.extensions import ExtensionKind


@dataclass(frozen=True, slots=True)
class Group:
    """A group of entry points; `methods` are those of the protocol."""

    name: str
    methods: tuple[str, ...]


GROUPS: Mapping[ExtensionKind, Group] = {
    "credential_provider": Group("entrepot.credential_providers", ("get",)),
    "upstream": Group("entrepot.upstreams", ("manifest", "blob", "tags")),
    "storage": Group("entrepot.storage", ("put", "get", "size", "delete")),
    "policy_condition": Group("entrepot.policy_conditions", ("judge",)),
    "event_sink": Group("entrepot.event_sinks", ("send",)),
    "middleware": Group("entrepot.middleware", ("handle",)),
}
