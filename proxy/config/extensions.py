"""The section `extensions` of the configuration: which packages of others the server uses, and for what."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from proxy.config.fields import Section, Timeout
from proxy.config.values import parse_label

ExtensionKind: TypeAlias = Literal[
    "credential_provider", "upstream", "storage", "policy_condition", "event_sink", "middleware"
]


class HiddenSettings(dict[str, Any]):
    """Settings of an extension, which alone knows what of them is secret: so none is shown."""

    def __repr__(self) -> str:
        return "***"


def parse_settings(value: object) -> HiddenSettings:
    """A mapping with any values; the extension checks them."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of the extension's own keys to values")
    return HiddenSettings(value)


class ExtensionConfig(Section, frozen=True):
    """An extension that the server uses.

    use: the name of its entry point; None for the name that the configuration gives it
    timeout: seconds that a call of it may take
    """

    kind: ExtensionKind
    use: Annotated[str, parse_label] | None = None
    timeout: Timeout = 5.0
    settings: Annotated[HiddenSettings, parse_settings] = msgspec.field(default_factory=HiddenSettings)
