"""What a pull would do now, and by which rules, without a pull and without asking an upstream.

What a process remembers for some seconds only, such as a tag that upstream just reported as unknown, is not
considered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from proxy.admin.inventory import Inventory, finite_or_none
from proxy.admin.measuring import Measured
from proxy.admin.models import OwnerRow
from proxy.admin.reports import AbsenceRow, HostRow, UpstreamRow, Verdict, Why
from proxy.cache.absences import Absences
from proxy.config.hosts import normal_host, path_of
from proxy.config.schema import Config, NamespaceConfig
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import ImageReference
from proxy.processes.state import UpstreamState, refusals
from proxy.telemetry.metrics import PEERS
from storage.maintenance.pins import Pins
from storage.maintenance.usage import Usage
from storage.oci import Tag
from storage.values import Pointer


class Explainer:
    """Explains pulls.  `inventory_of` gives the inventory of a namespace.

    Every method blocks, and may raise StorageFailed.
    """

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

    def why(
        self, image: ImageReference, upstreams: Sequence[UpstreamState], absent: AbsenceRow | None
    ) -> Why:
        # long: each field takes a line
        config, repository, reference = self._config, image.repository, image.reference
        namespace = self._namespace(image.namespace)
        tag = reference if isinstance(reference, Tag) else None
        inventory = self._inventory_of(image.namespace)
        cached = namespace.store is None
        pointer = inventory.pointer(repository, tag) if tag is not None else None
        digest = inventory.digest(repository, reference)
        measured = inventory.measure(repository, digest) if digest else Measured(None)
        use = self._usage.use(repository, reference)
        pin = self._pins.of(repository, reference)
        offline = config.offline or namespace.offline
        hosts = host_rows([each for each in upstreams if each.namespace == image.namespace])
        stored = measured.media_type is not None
        absent = None if stored else absent
        verdict, because = self._verdict(image, pointer, measured, offline, hosts, absent)
        return Why(
            asked=image.text,
            namespace=image.namespace,
            repository=repository,
            reference=str(reference),
            qualified=self._qualified(image),
            fresh_rule=self._fresh_rule(image.namespace, tag) if cached and tag is not None else None,
            fresh_for=finite_or_none(namespace.fresh_for_tag(tag)) if cached and tag is not None else None,
            keep_rule=self._keep_rule(repository),
            keep_for=finite_or_none(config.keep_for(repository)) if cached else None,
            pin=pin.pattern if pin else None,
            digest=None if digest is None or (tag is None and measured.media_type is None) else str(digest),
            stored=stored,
            complete=measured.complete,
            validated_at=pointer.validated_at if pointer else None,
            age=self._clock() - pointer.validated_at if pointer else None,
            fresh_until=inventory.fresh_until(repository, reference),
            last_used=use.last if use else None,
            offline=offline,
            upstreams=hosts,
            verdict=verdict,
            because=because,
            absent=absent,
        )

    def _verdict(
        self,
        image: ImageReference,
        pointer: Pointer | None,
        measured: Measured,
        offline: bool,
        hosts: Sequence[HostRow],
        absent: AbsenceRow | None,
    ) -> tuple[Verdict, str]:
        tag = image.reference if isinstance(image.reference, Tag) else None
        stored = measured.media_type is not None
        if self._namespace(image.namespace).store is not None:
            if stored:
                return "hit", f"{image.namespace} is a store, and the image was pushed to it"
            return "refused", f"{image.namespace} is a store, and the image was not pushed to it"
        if stored and tag is None:
            return "hit", "the digest is stored"
        if stored and offline:
            return "hit", f"{image.namespace} is offline: stored content is served whatever its age"
        if stored and pointer is not None and tag is not None and self._fresh(image.namespace, tag, pointer):
            return "hit", "the tag is fresh, so upstream is not asked"
        if offline:
            return "refused", f"the image is not stored, and {image.namespace} is offline"
        paused = paused_because(hosts)
        if stored:
            if paused:
                return "stale", f"the tag is stale, but upstream is paused: {paused}"
            return "revalidate", "the tag is stale: upstream is asked whether it has moved"
        if absent and paused:
            return "refused", f"upstream did not have it when it was last asked, and is paused: {paused}"
        if paused:
            return "refused", f"the image is not stored, and upstream is paused: {paused}"
        if absent:
            return "miss", "upstream did not have it when it was last asked: it is asked again"
        return "miss", "the image is not stored: it is fetched from upstream"

    def _fresh(self, namespace: str, tag: Tag, pointer: Pointer) -> bool:
        # A clock that was set back must not keep a tag fresh forever.
        age = self._clock() - pointer.validated_at
        return 0 <= age < self._namespace(namespace).fresh_for_tag(tag)

    def _qualified(self, image: ImageReference) -> str:
        first, slash, _ = image.text.partition("/")
        name = image.namespace
        if slash and first.lower() == name:
            return "the name begins with it"
        if slash and first.lower() == path_of(name):
            return "the name begins with it, with _ in place of the colon"
        names = (name, *self._namespace(name).aliases)
        if slash and normal_host(first) in map(normal_host, names):
            return f"{first} is an alias of it"
        return "the name has no registry, so this is default_namespace"

    def _fresh_rule(self, name: str, tag: Tag) -> str:
        key = self._config.key_of(name)
        for number, rule in enumerate(self._namespace(name).tags):
            if rule.match.fullmatch(tag):
                return f"namespaces.{key}.tags[{number}]"
        return f"namespaces.{key}.fresh_for"

    def _keep_rule(self, repository: str) -> str:
        name, _, relative = repository.partition("/")
        key, namespace = self._config.key_of(name), self._namespace(name)
        if namespace.store is not None:
            return f"namespaces.{key}.store"
        for number, rule in enumerate(namespace.repositories):
            if rule.match.fullmatch(relative):
                return f"namespaces.{key}.repositories[{number}]"
        return "disk.keep_for" if namespace.keep_for is None else f"namespaces.{key}.keep_for"

    def _namespace(self, name: str) -> NamespaceConfig:
        """The settings of the namespace of an image, which has one."""
        found = self._config.namespace(name)
        assert found is not None
        return found


async def absence_of(parts: Composition, image: ImageReference) -> AbsenceRow | None:
    """What the upstream answered for an image that it did not have when it was last asked; None: unknown."""
    namespace = parts.config.namespace(image.namespace)
    if namespace is None or not parts.is_cache(image.namespace):
        return None
    for store in filter(None, (parts.store, parts.common)):
        absences = Absences(store, namespace.absent_for, parts.clock)
        if (found := await absences.get(image.repository, image.reference)) is not None:
            until = None if found.until is None else finite_or_none(found.until)
            return AbsenceRow(code=found.error.code, since=found.since, until=until)
    return None


async def owner_of(
    parts: Composition, image: ImageReference, states: Sequence[UpstreamState]
) -> OwnerRow | None:
    """The owner of the repository of an image; None without replicas, and for a private registry."""
    peers = parts.peers if parts.is_cache(image.namespace) else None
    if peers is None or (url := await peers.owner(image.repository)) is None:
        return None
    rows = [each for each in host_rows(each for each in states if each.namespace == PEERS) if each.url == url]
    state = rows[0] if rows else None
    return OwnerRow(
        url=url,
        own=url == peers.own,
        open=state is not None and state.open,
        until=state.until if state else None,
        error=state.error if state else None,
    )


def host_rows(states: Iterable[UpstreamState]) -> list[HostRow]:
    """One row for each host, as seen by the process that pauses it for the longest time."""
    states = list(states)
    found: dict[tuple[str, str], UpstreamState] = {}
    for each in states:
        known = found.setdefault((each.url, each.host), each)
        if _badness(each) > _badness(known):
            found[each.url, each.host] = each
    refused = {where: refusals(each for each in states if (each.url, each.host) == where) for where in found}
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
            refused=refused.get((each.url, each.host), []),
        )
        for each in found.values()
    ]


def upstream_rows(states: Sequence[UpstreamState]) -> list[UpstreamRow]:
    """The hosts of all upstreams, by namespace."""
    return [
        UpstreamRow(namespace=name, **msgspec.structs.asdict(row))
        for name in sorted({each.namespace for each in states})
        for row in host_rows(each for each in states if each.namespace == name)
    ]


def _badness(state: UpstreamState) -> tuple[bool, float, float, float]:
    left = state.ratelimit_remaining
    return (
        state.open,
        state.until or 0.0,
        state.limited_until or 0.0,
        -float("inf") if left is None else -float(left),
    )


def paused_because(hosts: Sequence[HostRow]) -> str:
    """Why no host of the upstream is asked now; empty if one is."""
    own: dict[str, HostRow] = {}
    for each in hosts:
        own.setdefault(each.url, each)  # the first is the host of the upstream itself
    reasons = [
        f"{each.host} failed ({each.error})" if each.open else f"{each.host} limits our requests"
        for each in own.values()
        if each.open or each.limited_until is not None
    ]
    return "; ".join(reasons) if reasons and len(reasons) == len(own) else ""
