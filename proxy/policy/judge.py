"""Decides what of a namespace may be served, by the rules of the policy.

- A tag is judged by the rule about that tag.
- A digest is judged by what leads to it: the tags of itself and of the manifests that name it.  One that the
  policy allows is enough, since a pull by that tag has the same content.  About a manifest that no tag and
  no other manifest is known to lead to, rules with tags do not count.
- A blob is served on account of a manifest that names it and may be served.
- A signature, an SBOM or another artifact may be served if what it is about may be, unless a client could
  run it.

What is allowed is remembered by reference and digest, as long as this process runs: one policy, since a
changed one has processes of its own.  A refusal is never remembered: it is judged again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from proxy.policy.condition import Evidence, Subject
from proxy.policy.documents import Documents, claims_documents
from proxy.policy.graph import ReachedContent, ReachedRepositories
from proxy.policy.overrides import Override, Overrides
from proxy.policy.rules import RuleBook, ServingRule
from proxy.telemetry.exchange import aside
from proxy.telemetry.tracing import step
from storage.concurrency import SingleFlight
from storage.errors import (
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    StorageFailed,
    TagInvalid,
    Unavailable,
)
from storage.graph import contents, signed_by
from storage.oci import Digest, Manifest, Reference, Tag
from storage.registry import Held, Registry, Validity
from storage.store import Store

T = TypeVar("T")
_Key = tuple[str, str, str]

REMEMBERED = 20_000  # references, and findings of conditions
RETRY = 10.0  # seconds until a condition that was not met is looked at again
DEPTH = 4  # of artifacts that are about artifacts
_RESULTS = {"audit": "audited", "warn": "warned", "enforce": "refused"}
_WEIGHT = {"audit": 1, "warn": 2, "enforce": 3}


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the policy says of a reference, until a time in seconds since the epoch.

    What is allowed only by an `override` is what its rule refuses.  If it is `led` to by a tag that is known,
    more knowledge of what leads to it does not take the permission away.
    """

    rule: ServingRule
    allowed: bool
    reason: str
    until: float = math.inf
    override: Override | None = None
    led: bool = False

    @property
    def result(self) -> str:
        """What is done because of it, as metrics and traces say it."""
        if self.override is not None:
            return "overridden"
        return "allowed" if self.allowed else _RESULTS[self.rule.mode]

    @property
    def weight(self) -> int:
        """0 if it is allowed; more, the more its rule does about it."""
        return 0 if self.allowed else _WEIGHT[self.rule.mode]


class Judge:
    """Judges the content of one namespace, whose repositories `registry` has; `store` has their records.

    Repositories are given by their names within the namespace.  What is verified by `flights` is verified
    once for all who ask at the same time.  Every method may raise StorageFailed, and Unavailable if what a
    condition needs cannot be fetched.
    """

    def __init__(
        self,
        namespace: str,
        registry: Registry,
        store: Store,
        rules: RuleBook,
        overrides: Overrides,
        clock: Callable[[], float],
        flights: SingleFlight,
    ) -> None:
        self._namespace = namespace
        self._registry = registry
        self._rules = rules
        self._overrides = overrides
        self._clock = clock
        self._reached = ReachedRepositories(store)
        self._documents = Documents(registry)
        self._allowed: OrderedDict[_Key, float] = OrderedDict()
        self._evidence: OrderedDict[_Key, Evidence] = OrderedDict()
        self._flights = flights

    def full(self, repository: str) -> str:
        return f"{self._namespace}/{repository}"

    def at_once(self, repository: str, reference: Reference) -> Ruling | None:
        """The ruling, if it is one that needs nothing but the rules."""
        name = self.full(repository)
        if self._overrides.concern(name):
            return None
        if (plain := self._rules.plain(name)) is not None:
            return Ruling(plain, plain.allows, plain.reason)
        if isinstance(reference, Tag) and signed_by(reference) is None:
            rule = self._rules.find(name, reference)
            if not rule.allows or not rule.conditions:
                return Ruling(rule, rule.allows, rule.reason)
        return None

    def refusal(self, repository: str) -> Ruling | None:
        """The ruling that refuses all of a repository by its name alone; None without one."""
        name = self.full(repository)
        rule = self._rules.refusing(name)
        return None if rule is None or self._overrides.concern(name) else Ruling(rule, False, rule.reason)

    def selects(self, repository: str) -> bool:
        """Whether tags of a repository may be refused where others are not."""
        return self._rules.plain(self.full(repository)) is None

    def lists(self, repository: str, tag: str) -> bool:
        """Whether a tag is listed: unless it is refused by its name alone."""
        try:
            ruling = self.at_once(repository, Tag.parse(tag))
        except TagInvalid:
            return True
        return ruling is None or ruling.allowed or ruling.rule.mode != "enforce"

    async def manifest(self, repository: str, reference: Reference, manifest: Manifest) -> Ruling:
        """Judge what a reference stands for."""
        key = repository, str(reference), str(manifest.digest)
        if (known := self._remembered(key)) is not None:
            return known
        ruling = self.at_once(repository, reference)
        if ruling is None:
            self._reached.of(self.full(repository)).add(reference, manifest)
            ruling = await self._by_what_leads(
                repository, reference, lambda reached: self._judge(repository, reference, manifest, reached)
            )
        return self._remember(key, ruling)

    async def blob(self, repository: str, digest: Digest) -> Ruling:
        """Judge a blob by the manifests that name it."""
        key = repository, str(digest), str(digest)
        if (known := self._remembered(key)) is not None:
            return known
        if (ruling := self.at_once(repository, digest)) is None:
            ruling = await self._by_what_leads(
                repository, digest, lambda reached: self._of_blob(repository, digest, reached)
            )
        return self._remember(key, ruling)

    async def _by_what_leads(
        self,
        repository: str,
        reference: Reference,
        judge: Callable[[ReachedContent], Awaitable[Ruling]],
    ) -> Ruling:
        """The ruling of `judge` about a reference, as a part of the trace."""
        described = {"entrepot.repository": repository, "entrepot.reference": str(reference)}
        with step("policy.judge", attributes=described) as span:
            ruling = await self._ruling(repository, judge)
            if span.recorded:
                verdict = {"entrepot.policy.rule": ruling.rule.name, "entrepot.policy.result": ruling.result}
                span.set(verdict)
            return ruling

    async def _ruling(self, repository: str, judge: Callable[[ReachedContent], Awaitable[Ruling]]) -> Ruling:
        """The ruling of `judge`, which is given what is known to lead to content.

        That is read again only if what is known is not enough: in a large repository it takes time.  While
        the records cannot be read, what was known before counts, but nothing is allowed because a tag that
        leads to it is not known: StorageFailed is raised.
        """
        reached = self._reached.of(self.full(repository))
        ruling = await judge(reached)
        if ruling.allowed and ruling.led and ruling.override is None:
            return ruling
        try:
            changed = await reached.refresh()
        except StorageFailed:
            if ruling.allowed and ruling.override is None and self._rules.refuses_by_tag(reached.repository):
                raise
            return ruling
        return await judge(reached) if changed else ruling

    def held(self, repository: str, reference: Reference, held: Held | None) -> Held | None:
        """`held`, as long as it may be served again without being judged again; None if it may not."""
        if held is None:
            return None
        plain = self._rules.plain(self.full(repository))
        if plain is not None:
            return held if plain.allows else None
        until = self._allowed.get((repository, str(reference), str(held.descriptor.digest)))
        if until is None or until == math.inf:
            return None if until is None else held

        def validity() -> Validity | None:
            return held.validity() if self._clock() < until else None

        return replace(held, validity=validity)

    def _remembered(self, key: _Key) -> Ruling | None:
        until = self._allowed.get(key, -math.inf)
        return Ruling(self._rules.allowing, True, "", until) if self._clock() < until else None

    def _remember(self, key: _Key, ruling: Ruling) -> Ruling:
        if ruling.allowed and ruling.override is None:
            _put(self._allowed, key, ruling.until)
        return ruling

    # Judging

    async def _of_blob(self, repository: str, digest: Digest, reached: ReachedContent) -> Ruling:
        rulings: list[Ruling] = []
        failed: RegistryError | None = None
        for each in reached.naming(digest):
            try:
                manifest = await self._fetch(repository, each)
                rulings.append(await self._judge(repository, each, manifest, reached))
            except (ManifestUnknown, NameUnknown):
                continue
            except RegistryError as error:
                failed = error
                continue
            if rulings[-1].allowed:
                break
        if rulings:
            return min(rulings, key=lambda ruling: ruling.weight)
        if failed is not None:
            raise failed
        rule = self._rules.find(self.full(repository), None)
        if rule.allows and rule.conditions:
            return Ruling(rule, False, "no manifest is known that names it: pull that first")
        return Ruling(rule, rule.allows, rule.reason)

    async def _judge(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        reached: ReachedContent,
        depth: int = 0,
    ) -> Ruling:
        digest = manifest.digest
        leading = self._leading(repository, reference, digest, reached)
        tagged = {(root, rule) for root, tag, rule in leading if tag is not None}
        best: Ruling | None = None
        for root, rule in dict.fromkeys((root, rule) for root, _, rule in leading):
            ruling = await self._apply(rule, repository, {root, digest}, manifest)
            ruling = replace(ruling, led=(root, rule) in tagged)
            if best is None or ruling.weight < best.weight:
                best = ruling
            if best.allowed:
                return best
        assert best is not None  # the digest leads to itself
        subjects = _subjects(manifest, (reference, *reached.tags(digest))) if depth < DEPTH else []
        about = await self._on_account(repository, subjects, reached, depth)
        if about is not None and await self._has_documents(repository, manifest):
            return about
        named = (each for root, tag, _ in leading for each in (tag, root, digest) if each is not None)
        found = self._overrides.find(self.full(repository), named)
        return best if found is None else replace(best, allowed=True, override=found)

    def _leading(
        self, repository: str, reference: Reference, digest: Digest, reached: ReachedContent
    ) -> list[tuple[Digest, Tag | None, ServingRule]]:
        """What leads to what a reference stands for: a manifest, its tag, and the rule about that."""
        found = [(digest, reference)] if isinstance(reference, Tag) else reached.leading(digest)
        name = self.full(repository)
        return [(each, tag, self._rules.find(name, tag)) for each, tag in found]

    async def explain(
        self, repository: str, reference: Reference
    ) -> tuple[Digest | None, Ruling, list[tuple[Digest, Tag | None, Ruling]]]:
        """The digest of a reference, its ruling, and that of each tag or manifest that leads to it.

        Without a digest if the rules alone decide.  Raises ManifestUnknown, NameUnknown.
        """
        if (ruling := self.at_once(repository, reference)) is not None:
            return None, ruling, []
        manifest = await self._registry.get_manifest(repository, reference)
        reached = self._reached.of(self.full(repository))
        reached.add(reference, manifest)
        await reached.refresh()
        leads = []
        for root, tag, rule in self._leading(repository, reference, manifest.digest, reached):
            found = await self._apply(rule, repository, {root, manifest.digest}, manifest)
            leads.append((root, tag, found))
        return manifest.digest, await self._judge(repository, reference, manifest, reached), leads

    async def _on_account(
        self, repository: str, subjects: Iterable[Digest], reached: ReachedContent, depth: int
    ) -> Ruling | None:
        """The ruling of the first subject that is allowed."""
        for each in subjects:
            with suppress(ManifestUnknown, NameUnknown):
                manifest = await self._fetch(repository, each)
                ruling = await self._judge(repository, each, manifest, reached, depth + 1)
                if ruling.allowed:
                    return ruling
        return None

    async def _has_documents(self, repository: str, manifest: Manifest) -> bool:
        content = contents(manifest.content)
        with aside():
            return content is not None and await self._documents.alone(repository, content)

    async def _apply(
        self, rule: ServingRule, repository: str, digests: set[Digest], manifest: Manifest
    ) -> Ruling:
        """What a rule says of content that meets its conditions if one of `digests` does."""
        if not rule.allows or not rule.conditions:
            return Ruling(rule, rule.allows, rule.reason)
        evidence = Evidence(False, "cannot be found any more")
        for each in sorted(digests, key=lambda digest: digest != manifest.digest):
            try:
                subject = manifest if each == manifest.digest else await self._fetch(repository, each)
                evidence = await self._evidence_of(rule, repository, subject)
            except (ManifestUnknown, NameUnknown):  # of an index that is gone
                continue
            except Unavailable as error:
                if rule.mode == "enforce":
                    raise
                evidence = Evidence(False, f"cannot be verified now: {error.public}", -math.inf)
            if evidence.met:
                return Ruling(rule, True, evidence.reason, evidence.until)
        return Ruling(rule, False, f"it {evidence.reason}", evidence.until)

    async def _evidence_of(self, rule: ServingRule, repository: str, manifest: Manifest) -> Evidence:
        key = rule.name, repository, str(manifest.digest)
        known = self._evidence.get(key)
        if known is None or self._clock() >= known.until:
            known = await self._flights.join((id(self), *key), lambda: self._look(key, rule, manifest))
        return known

    async def _look(self, key: _Key, rule: ServingRule, manifest: Manifest) -> Evidence:
        """What is found, which is known from the moment that nobody can join this call any more."""
        found = await self._find(rule, key[1], manifest)
        _put(self._evidence, key, found)
        return found

    async def _find(self, rule: ServingRule, repository: str, manifest: Manifest) -> Evidence:
        if contents(manifest.content) is None:
            return Evidence(False, "is no manifest that all clients read alike")
        subject = Subject(self.full(repository), repository, manifest, self._registry)
        reasons, until = [], math.inf
        described = {"entrepot.policy.rule": rule.name, "entrepot.digest": manifest.digest}
        with aside(), step("policy.verify", attributes=described):
            for each in rule.conditions:
                found = await each.judge(subject)
                if not found.met:
                    return replace(found, until=min(found.until, self._clock() + RETRY))
                reasons.append(found.reason)
                until = min(until, found.until)
        return Evidence(True, " and ".join(reasons), until)

    async def _fetch(self, repository: str, digest: Digest) -> Manifest:
        with aside():
            return await self._registry.get_manifest(repository, digest)


def _subjects(manifest: Manifest, references: Iterable[Reference]) -> list[Digest]:
    """What an artifact is about, by its subject or the tags that lead to it; nothing if it may be run."""
    content = contents(manifest.content)
    if content is None or not claims_documents(content):
        return []
    tagged = [signed_by(each) for each in references if isinstance(each, Tag)]
    found = [*([content.subject.digest] if content.subject else []), *filter(None, tagged)]
    return [each for each in dict.fromkeys(found) if each != manifest.digest]


def _put(table: OrderedDict[_Key, T], key: _Key, value: T) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > REMEMBERED:
        table.popitem(last=False)
