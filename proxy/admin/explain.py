"""Why: what a pull would do now, and by which rules; without doing it, and without asking anybody.

What a process remembers for some seconds only, such as that upstream had no such tag just now, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.admin.inventory import Inventory, Measured, finite
from proxy.admin.processes import UpstreamState
from proxy.admin.reports import HostRow, Verdict, Why
from proxy.config.schema import Config
from proxy.namespaces.references import ImageReference
from storage.maintenance.pins import Pins
from storage.maintenance.usage import Usage
from storage.oci import Tag
from storage.store import Pointer


class Explainer:
    """Blocks.  Every method may raise StorageFailed.  `inventory_of` is that of a namespace."""

    def __init__(
        self,
        config: Config,
        usage: Usage,
        pins: Pins,
        inventory_of: Callable[[str], Inventory],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._usage = usage
        self._pins = pins
        self._inventory_of = inventory_of
        self._clock = clock

    def why(self, asked: ImageReference, upstreams: Sequence[UpstreamState]) -> Why:
        config, repository, reference = self._config, asked.repository, asked.reference
        namespace = config.namespaces[asked.namespace]
        tag = reference if isinstance(reference, Tag) else None
        inventory = self._inventory_of(asked.namespace)
        cached = namespace.store is None
        pointer = inventory.pointer(repository, tag) if tag is not None else None
        digest = inventory.digest(repository, reference)
        measured = inventory.measure(repository, digest) if digest else Measured(None, {})
        use = self._usage.use(repository, reference)
        pin = self._pins.of(repository, reference)
        offline = config.offline or namespace.offline
        hosts = worst([each for each in upstreams if each.namespace == asked.namespace])
        verdict, because = self._verdict(asked, pointer, measured, offline, hosts)
        return Why(
            asked=asked.text,
            namespace=asked.namespace,
            repository=repository,
            reference=str(reference),
            qualified=self._qualified(asked),
            fresh_rule=self._fresh_rule(asked.namespace, tag) if cached and tag is not None else None,
            fresh_for=finite(namespace.fresh_for_tag(tag)) if cached and tag is not None else None,
            keep_rule=self._keep_rule(repository),
            keep_for=finite(config.keep_for(repository)) if cached else None,
            pin=pin.pattern if pin else None,
            digest=None if digest is None or (tag is None and measured.media_type is None) else str(digest),
            stored=measured.media_type is not None,
            complete=measured.media_type is not None and measured.complete,
            validated_at=pointer.validated_at if pointer else None,
            age=self._clock() - pointer.validated_at if pointer else None,
            fresh_until=inventory.fresh_until(repository, reference),
            last_used=use.last if use else None,
            offline=offline,
            upstreams=hosts,
            verdict=verdict,
            because=because,
        )

    def _verdict(
        self,
        asked: ImageReference,
        pointer: Pointer | None,
        measured: Measured,
        offline: bool,
        hosts: Sequence[HostRow],
    ) -> tuple[Verdict, str]:
        tag = asked.reference if isinstance(asked.reference, Tag) else None
        stored = measured.media_type is not None
        if self._config.namespaces[asked.namespace].store is not None:
            if stored:
                return "hit", f"{asked.namespace} is a store, and this was pushed to it"
            return "refused", f"{asked.namespace} is a store, and this was not pushed to it"
        if stored and tag is None:
            return "hit", "it is asked for by its digest, and stored"
        if stored and offline:
            return "hit", f"{asked.namespace} is offline: what is stored is served whatever its age"
        if stored and pointer is not None and tag is not None and self._fresh(asked.namespace, tag, pointer):
            return "hit", "the tag is fresh, so nobody is asked"
        if offline:
            return "refused", f"it is not cached, and {asked.namespace} is offline"
        alone = let_alone(hosts)
        if stored:
            if alone:
                return "stale", f"the tag is due, but upstream is let alone: {alone}"
            return "revalidate", "the tag is due: upstream is asked whether it has moved"
        if alone:
            return "refused", f"it is not cached, and upstream is let alone: {alone}"
        return "miss", "it is not cached: it is fetched from upstream"

    def _fresh(self, namespace: str, tag: Tag, pointer: Pointer) -> bool:
        # A clock that was set back must not keep a tag fresh for ever.
        age = self._clock() - pointer.validated_at
        return 0 <= age < self._config.namespaces[namespace].fresh_for_tag(tag)

    def _qualified(self, asked: ImageReference) -> str:
        first, slash, _ = asked.text.partition("/")
        name = asked.namespace
        if slash and first.lower() == name:
            return "it is named"
        if slash and first.lower().partition(":")[0] in (name, *self._config.namespaces[name].aliases):
            return f"{first} is another name of it"
        return "none is named, so it is default_namespace"

    def _fresh_rule(self, name: str, tag: Tag) -> str:
        for number, rule in enumerate(self._config.namespaces[name].tags):
            if rule.match.fullmatch(tag):
                return f"namespaces.{name}.tags[{number}]"
        return f"namespaces.{name}.fresh_for"

    def _keep_rule(self, repository: str) -> str:
        name, _, relative = repository.partition("/")
        namespace = self._config.namespaces[name]
        if namespace.store is not None:
            return f"namespaces.{name}.store"
        for number, rule in enumerate(namespace.repositories):
            if rule.match.fullmatch(relative):
                return f"namespaces.{name}.repositories[{number}]"
        return "disk.keep_for" if namespace.keep_for is None else f"namespaces.{name}.keep_for"


def worst(states: Sequence[UpstreamState]) -> list[HostRow]:
    """Of each host, as that process sees it which lets it alone for longest."""
    found: dict[tuple[str, str], UpstreamState] = {}
    for each in states:
        known = found.setdefault((each.url, each.host), each)
        if _badness(each) > _badness(known):
            found[each.url, each.host] = each
    return [
        HostRow(
            url=each.url,
            host=each.host,
            open=each.open,
            until=each.until,
            error=each.error,
            ratelimit_limit=each.ratelimit_limit,
            ratelimit_remaining=each.ratelimit_remaining,
            limited_until=each.limited_until,
        )
        for each in found.values()
    ]


def _badness(state: UpstreamState) -> tuple[bool, float, float, float]:
    left = state.ratelimit_remaining
    return (
        state.open,
        state.until or 0.0,
        state.limited_until or 0.0,
        -float("inf") if left is None else -float(left),
    )


def let_alone(hosts: Sequence[HostRow]) -> str:
    """Why no upstream is asked now; empty where one is."""
    own: dict[str, HostRow] = {}
    for each in hosts:
        own.setdefault(each.url, each)  # the upstream's own host is its first
    reasons = [
        f"{each.host} failed ({each.error})" if each.open else f"{each.host} limits us"
        for each in own.values()
        if each.open or each.limited_until is not None
    ]
    return "; ".join(reasons) if reasons and len(reasons) == len(own) else ""
