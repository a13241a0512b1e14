"""A registry that serves only what the policy allows: in front of a cache or a private registry.

A refusal is Denied, and names the rule.  In the modes `warn` and `audit` content is served all the same, and
the refusal is only counted and logged; `warn` also tells the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

import structlog

from proxy.cache.refresh import Refreshable
from proxy.policy.judge import Judge, Ruling
from proxy.policy.listing import shown
from proxy.policy.moves import TagHolds
from proxy.policy.overrides import Override, Overrides
from proxy.telemetry.exchange import PolicyVerdict, aside, current, note_verdict
from proxy.telemetry.metrics import Metrics
from storage.conditions import ALWAYS, Conditions
from storage.errors import Denied, ManifestUnknown, Unavailable
from storage.names import written
from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag
from storage.registry import Blob, Held, Located, Registry, Upload, everything

log = structlog.get_logger()


class PolicedRegistry(Registry):
    """The content of `registry` that `judge` allows.  What is pushed is not judged before it is pulled."""

    def __init__(self, registry: Registry, judge: Judge, metrics: Metrics) -> None:
        self._registry = registry
        self._only_judge = judge
        self._metrics = metrics

    @property
    def _judge(self) -> Judge:
        """Who judges what this exchange is about."""
        return self._only_judge

    # Pull

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        await self._judge_blob(repository, digest)
        return await self._registry.get_blob(repository, digest, span)

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        await self._judge_blob(repository, digest)
        return await self._registry.locate_blob(repository, digest)

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        await self._judge_blob(repository, digest)
        return await self._registry.resolve_blob(repository, digest)

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        asked = _asked(reference)
        self._refuse_at_once(repository, asked)
        manifest = await self._registry.get_manifest(repository, reference)
        await self._judged(repository, asked, manifest)
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    def hold_blob(self, repository: str, digest: Digest) -> Held | None:
        return self._judge.held(repository, digest, self._registry.hold_blob(repository, digest))

    def hold_manifest(self, repository: str, reference: Reference) -> Held | None:
        return self._judge.held(repository, reference, self._registry.hold_manifest(repository, reference))

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        """Without those that are refused by their names."""
        self._refuse_list(repository)
        judge = self._judge
        if current().peer or not judge.selects(repository):
            return await self._registry.tags(repository, last, limit)
        return await shown(
            partial(self._registry.tags, repository), partial(judge.lists, repository), last, limit
        )

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        self._refuse_list(repository)
        return await self._registry.referrers(repository, digest, artifact_type, last, limit)

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """Without those that are refused by their names."""
        judge = self._judge
        return await shown(self._registry.repositories, lambda name: judge.refusal(name) is None, last, limit)

    # Push

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        return await self._registry.start_upload(repository, size, algorithm)

    async def resume_upload(self, repository: str, id: str) -> Upload:
        return await self._registry.resume_upload(repository, id)

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        """Mount what may be pulled from `source`; without one, from where everything may be pulled."""
        if source is not None:
            self._enforce(source, digest, await self._judge.blob(source, digest))

        def allowed(each: str) -> bool:
            ruling = self._judge.at_once(each, digest)
            return ruling is not None and ruling.allowed and visible(each)

        return await self._registry.mount_blob(repository, digest, source, allowed)

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
    ) -> Descriptor:
        return await self._registry.push_manifest(repository, reference, manifest, tags, when)

    async def delete_blob(self, repository: str, digest: Digest, when: Conditions = ALWAYS) -> None:
        await self._registry.delete_blob(repository, digest, when)

    async def delete_manifest(self, repository: str, reference: Reference, when: Conditions = ALWAYS) -> None:
        await self._registry.delete_manifest(repository, reference, when)

    async def close(self) -> None:
        await self._registry.close()

    # Rulings.  What another replica asks for is judged there, for its client.

    async def _judge_blob(self, repository: str, digest: Digest) -> None:
        if not current().peer:
            self._enforce(repository, digest, await self._judge.blob(repository, digest))

    def _refuse_at_once(self, repository: str, reference: Reference) -> None:
        """Refuse what is refused whatever it is, before an upstream is asked for it."""
        if current().peer:
            return
        ruling = self._judge.at_once(repository, reference)
        if ruling is not None and not ruling.allowed and ruling.rule.mode == "enforce":
            self._enforce(repository, reference, ruling)

    def _refuse_list(self, repository: str) -> None:
        """Refuse what a repository has if its name is refused, in the mode `enforce`."""
        if not current().peer and (ruling := self._judge.refusal(repository)) is not None:
            self._enforce(repository, None, ruling)

    async def _judged(self, repository: str, reference: Reference, manifest: Manifest) -> None:
        if current().peer:
            return
        ruling = await self._judge.manifest(repository, reference, manifest)
        self._enforce(repository, reference, ruling)

    def _enforce(self, repository: str, reference: Reference | None, ruling: Ruling) -> None:
        """Count the ruling, and do what it says of content that is not allowed; None is a list.

        Raises Denied.
        """
        rule, name, now = ruling.rule, self._judge.full(repository), current()
        namespace = self._metrics.label(name.partition("/")[0])
        self._metrics.policy_verdicts.labels(namespace, ruling.result).inc()
        if ruling.override is not None and reference is not None:
            self._tell_overridden(name, reference, rule.name, ruling.override)
        if ruling.allowed:
            return
        self._metrics.policy.labels(namespace, rule.name, rule.mode).inc()
        image = name if reference is None else written(name, reference)
        log.info(
            "policy.refused", rule=rule.name, mode=rule.mode, image=image, reason=ruling.reason,
            user=now.user, client=now.client, id=now.id,
        )  # fmt: skip
        message = f"policy rule {rule.name} refuses {image}: {ruling.reason}"
        note_verdict(PolicyVerdict(rule.name, rule.mode, ruling.reason))
        if rule.mode == "enforce":
            raise Denied(f"{message}. Pull what the policy allows, or ask the operator of this server")
        if rule.mode == "warn":
            now.warning = message

    def _tell_overridden(self, name: str, reference: Reference, rule: str, override: Override) -> None:
        """Say that content is served only because of an override: to the client, too."""
        now = current()
        self._metrics.policy.labels(self._metrics.label(name.partition("/")[0]), rule, "override").inc()
        log.info(
            "policy.overridden", rule=rule, image=written(name, reference), override=override.image,
            until=override.until, reason=override.reason, user=now.user, client=now.client, id=now.id,
        )  # fmt: skip
        note_verdict(PolicyVerdict(rule, "override", override.reason))
        until = datetime.fromtimestamp(override.until, UTC).isoformat(timespec="seconds")
        now.warning = f"served against policy rule {rule}, by an override until {until}: {override.reason}"


class PolicedCatalog(Registry):
    """A list of repositories by their full names, of those of `registry` that `shows` is true of."""

    def __init__(self, registry: Registry, shows: Callable[[str], bool]) -> None:
        self._registry = registry
        self._shows = shows

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        return await shown(self._registry.repositories, self._shows, last, limit)


class PolicedCache(PolicedRegistry):
    """The content of a cache that `judge` allows, by tags where `holds` holds them.

    What is refused is not refreshed either.  The candidate of a tag that is held is: it is here when its time
    has come.
    """

    def __init__(
        self, cache: Registry, judge: Judge, metrics: Metrics, holds: TagHolds, overrides: Overrides
    ) -> None:
        super().__init__(cache, judge, metrics)
        assert isinstance(cache, Refreshable)
        self._cache = cache
        self._holds = holds
        self._overrides = overrides

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        """Also raises ManifestUnknown if a tag is held at a digest that is not to be had any more."""
        name = self._judge.full(repository)
        rule = self._holds.rule(name, reference) if isinstance(reference, Tag) else None
        if not isinstance(reference, Tag) or rule is None:
            return await super().get_manifest(repository, reference)
        self._refuse_at_once(repository, reference)
        begun = await self._holds.begin(name, reference)
        try:
            manifest = await self._cache.get_manifest(repository, reference)
            held = await self._holds.resolve(name, reference, rule, manifest.digest, begun)
        except Unavailable:  # of a candidate only a part may be here
            if (known := self._holds.of(name, reference)) is None or not known.candidate:
                raise
            held = Digest(known.digest)
            manifest = await self._former(repository, reference, held)
        override = self._overrides.find(name, [reference, manifest.digest])
        if held != manifest.digest and override is not None:
            self._tell_overridden(name, reference, rule.name, override)
        elif held != manifest.digest:
            manifest = await self._former(repository, reference, held)
        await self._judged(repository, reference, manifest)
        return manifest

    async def _former(self, repository: str, tag: Tag, digest: Digest) -> Manifest:
        try:
            with aside():
                return await self._cache.get_manifest(repository, digest)
        except ManifestUnknown:
            image = written(self._judge.full(repository), tag)
            raise ManifestUnknown(
                f"{image} is held at {digest}, which is neither stored nor to be had any more: ask the"
                f" operator of this server to approve where it moved to (entrepot policy approve)"
            ) from None

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        """As Cache.revalidate()."""
        self._refuse_at_once(repository, tag)
        name = self._judge.full(repository)
        rule = self._holds.rule(name, tag)
        begun = await self._holds.begin(name, tag) if rule is not None else None
        result, manifest, old = await self._cache.revalidate(repository, tag)
        if rule is not None:
            await self._holds.resolve(name, tag, rule, manifest.digest, begun)
        await self._judged(repository, tag, manifest)
        return result, manifest, old

    async def fill_blob(self, repository: str, digest: Digest) -> int:
        """As Cache.fill_blob(): nothing is served by it."""
        return await self._cache.fill_blob(repository, digest)

    def spare(self, repository: str, reference: Reference) -> None:
        """As Cache.spare()."""
        self._cache.spare(repository, reference)


def _asked(reference: Reference) -> Reference:
    """What a client asks for by a reference: the tag, if that is what the tag stood for in the past."""
    now = current()
    past = now.as_of is not None and now.kind == "manifest" and ":" not in now.reference
    return Tag(now.reference) if past else reference
