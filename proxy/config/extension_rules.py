"""Rules about where a configuration names its extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from proxy.config.extensions import ExtensionKind
from proxy.config.faults import Fault, nearest
from proxy.config.values import LABEL, MAX_LABEL

if TYPE_CHECKING:  # it has a rule for each of its sections
    from proxy.config.schema import Config

# The key that names an extension of a kind.  A middleware is used since it is configured.
NAMED_BY: dict[ExtensionKind, str] = {
    "credential_provider": "namespaces.NAME.upstream.credential_provider",
    "upstream": "namespaces.NAME.upstream.extension",
    "storage": "shared.bucket, as extension://NAME",
    "policy_condition": "policy.rules[].conditions",
    "event_sink": "webhooks[].extension",
}


def uses(config: Config) -> Iterator[tuple[str, ExtensionKind, str]]:
    """The path of each key that names an extension, the kind that it must have, and the name."""
    if (name := config.shared.extension) is not None:
        yield "shared.bucket", "storage", name
    for number, webhook in enumerate(config.webhooks):
        if webhook.extension is not None:
            yield f"webhooks[{number}].extension", "event_sink", webhook.extension
    for number, rule in enumerate(config.policy.rules):
        for name in rule.conditions:
            yield f"policy.rules[{number}].conditions", "policy_condition", name
    for name, (_, upstream) in config.cached().items():
        if upstream.extension is not None:
            yield f"namespaces.{name}.upstream.extension", "upstream", upstream.extension
        for number, login in enumerate(upstream.logins()):
            part = f".credentials[{number}]" if upstream.credentials else ""
            if login.credential_provider is not None:
                path = f"namespaces.{name}.upstream{part}.credential_provider"
                yield path, "credential_provider", login.credential_provider


def check_extensions(config: Config) -> Iterator[Fault]:
    """A fault if an extension is named that is not there, or is there and named nowhere."""
    known, used = config.extensions, set()
    for name in known:
        if not LABEL.fullmatch(name) or len(name) > MAX_LABEL:
            yield Fault(f"extensions.{name}", f"expected a lower-case word, at most {MAX_LABEL} characters")
    for path, kind, name in uses(config):
        used.add(name)
        if name not in known:
            fitting = [each for each, of in known.items() if of.kind == kind]
            hint = nearest(name, fitting) if fitting else ": add it"
            yield Fault(path, f"extensions has no {name}{hint}")
        elif known[name].kind != kind:
            yield Fault(path, f"extensions.{name} is a {known[name].kind}, not a {kind}")
    for name, (namespace, upstream) in config.cached().items():
        if upstream.extension is not None and namespace.visibility == "caller":
            yield Fault(
                f"namespaces.{name}.visibility",
                "caller needs an upstream with a url: an extension knows no callers",
            )
    for name, each in known.items():
        if name not in used and each.kind in NAMED_BY:
            key = NAMED_BY[each.kind]
            yield Fault(f"extensions.{name}", f"is used nowhere: name it in {key}, or remove it")
