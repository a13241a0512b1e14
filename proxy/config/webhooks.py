"""The section `webhooks` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from proxy.config.fields import File, Keep, Section, Timeout
from proxy.config.hosts import parse_target
from proxy.config.values import Secret, parse_fields, parse_label, parse_pattern, parse_secret


class WebhookConfig(Section, frozen=True):
    """A receiver of events, at a URL or by an extension; docs/events.md describes them.

    `match` holds patterns of full repository names, `media_types` patterns of media types; an empty tuple
    matches everything.
    """

    name: Annotated[str, parse_label]
    url: Annotated[Secret, parse_target] | None = None
    extension: Annotated[str, parse_label] | None = None
    format: Literal["registry", "cloudevents"] = "registry"
    actions: tuple[Literal["push", "pull", "delete", "mount", "move", "hold"], ...] = (
        "push",
        "delete",
        "mount",
        "move",
        "hold",
    )
    match: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    media_types: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    headers: Annotated[dict[str, Secret], parse_fields] = msgspec.field(default_factory=dict)
    secret: Annotated[Secret, parse_secret] | None = None
    ca_file: File | None = None
    timeout: Timeout = 5.0
    backoff: Timeout = 1.0
    backoff_limit: Timeout = 60.0
    keep: Keep = 604800.0

    def __post_init__(self) -> None:
        if (self.url is None) == (self.extension is None):
            raise ValueError("needs one of url, such as https://hooks.example, and extension")
        if self.extension is not None:
            given = [each for each in _OF_URLS if getattr(self, each) != _DEFAULTS[each]]
            if given := [*given, *(["headers"] if self.headers else [])]:
                raise ValueError(f"{given[0]} is for a url, and this webhook has an extension")

    def wants(self, action: str, repository: str, media_type: str) -> bool:
        """Whether an event is sent; an unknown `media_type` is "", and matches."""
        return (
            action in self.actions
            and _any(self.match, repository)
            and (not media_type or _any(self.media_types, media_type))
        )


# Keys that apply only to a URL.
_OF_URLS = ("format", "secret", "ca_file", "timeout")
_DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(WebhookConfig)}


def _any(patterns: tuple[re.Pattern[str], ...], text: str) -> bool:
    return not patterns or any(each.fullmatch(text) for each in patterns)
