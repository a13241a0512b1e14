"""What the policy of a server says of an image, and what an operator says of tags that it holds."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime

from proxy.admin.policy_reports import (
    HeldRow,
    OverrideRow,
    PolicyExplained,
    PolicyLead,
    PolicyRow,
    PulledRow,
)
from proxy.config.image_names import split
from proxy.config.policy import MoveRule
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid, ImageReference, ReferenceReader
from proxy.policy.moves import HeldTag, TagHolds
from proxy.policy.overrides import LONGEST, Override, Overrides
from storage.errors import DigestInvalid, Unsupported
from storage.maintenance.pull_journal import PullJournal
from storage.names import written
from storage.oci import Digest, Tag


async def explained(parts: Composition, image: ImageReference) -> PolicyExplained:
    """What the policy says of it, and why.  Raises RegistryError."""
    repository, reference = image.repository, image.reference
    parts.namespaces.prepare(repository)
    judge = parts.guard.judge(image.namespace)
    if judge is None:
        return PolicyExplained(
            asked=image.text, repository=repository, reference=str(reference), digest=None, allowed=True,
            rule="", mode=parts.config.policy.mode, reason="the configuration has no policy", leads=[],
        )  # fmt: skip
    digest, ruling, leads = await judge.explain(repository.partition("/")[2], reference)
    return PolicyExplained(
        asked=image.text,
        repository=repository,
        reference=str(reference),
        digest=None if digest is None else str(digest),
        allowed=ruling.allowed,
        rule=ruling.rule.name,
        mode=ruling.rule.mode,
        reason=ruling.reason if ruling.override is None else _overridden(ruling.reason, ruling.override),
        leads=[
            PolicyLead(
                digest=str(each),
                tag=None if tag is None else str(tag),
                rule=found.rule.name,
                allowed=found.allowed,
                reason=found.reason,
            )
            for each, tag, found in leads
        ],
    )


def judged_by_name(parts: Composition, image: ImageReference) -> PolicyRow | None:
    """What the rules say without its content; None without rules, and for a digest that tags decide about."""
    book = parts.guard.rules
    if book is None:
        return None
    if isinstance(image.reference, Digest):
        rule = book.plain(image.repository)
    else:
        rule = book.find(image.repository, image.reference)
    if rule is None:
        return None
    override = parts.guard.overrides.find(image.repository, [image.reference])
    if override is not None and not rule.allows:
        return PolicyRow(rule.name, "allow", rule.mode, _overridden(rule.reason, override))
    return PolicyRow(rule.name, rule.verdict, rule.mode, rule.reason)


def _overridden(reason: str, override: Override) -> str:
    until = datetime.fromtimestamp(override.until, UTC).isoformat(timespec="seconds")
    return f"{reason}, but there is an override until {until}: {override.reason}"


def held_row(repository: str, tag: Tag, rule: MoveRule, found: HeldTag) -> HeldRow:
    """What is known of a tag of which the rule is about the moves."""
    moves_at = found.moves_at(rule) if found.candidate else math.inf
    return HeldRow(
        repository=repository,
        tag=str(tag),
        rule=rule.name,
        digest=found.digest,
        candidate=found.candidate or None,
        seen=found.seen if found.candidate else None,
        moves_at=moves_at if math.isfinite(moves_at) else None,
        approved=found.approved or None,
        rejected=list(found.rejected),
    )


def held_now(holds: TagHolds, image: ImageReference) -> HeldRow | None:
    """The tag, if it is held at another digest than its upstream gives.  Blocks; raises StorageFailed."""
    if (
        not isinstance(image.reference, Tag)
        or (rule := holds.rule(image.repository, image.reference)) is None
    ):
        return None
    found = holds.of(image.repository, image.reference)
    return held_row(image.repository, image.reference, rule, found) if found and found.candidate else None


class HoldControl:
    """What an operator does about tags that are held."""

    def __init__(self, holds: TagHolds, reader: ReferenceReader) -> None:
        self._holds = holds
        self._reader = reader

    def rows(self) -> list[HeldRow]:
        """The tags that are held at other digests than upstreams give.  Blocks; raises StorageFailed."""
        return [held_row(*each) for each in self._holds.waiting()]

    async def approve(self, text: str) -> HeldRow:
        """Let a tag move.  Raises FieldInvalid, ManifestUnknown, StorageFailed."""
        repository, tag, rule, digest = self._read(text)
        return held_row(repository, tag, rule, await self._holds.approve(repository, tag, digest))

    async def reject(self, text: str) -> HeldRow:
        """Never let a tag move there.  Raises FieldInvalid, ManifestUnknown, StorageFailed."""
        repository, tag, rule, digest = self._read(text)
        try:
            return held_row(repository, tag, rule, await self._holds.reject(repository, tag, digest))
        except ValueError as error:
            raise FieldInvalid("reference", error) from None

    def _read(self, text: str) -> tuple[str, Tag, MoveRule, Digest]:
        """The repository, the tag and the digest of NAME:TAG@DIGEST, and the rule.  Raises FieldInvalid."""
        name, tag, digest = split(text)
        if tag is None or digest is None:
            raise FieldInvalid("reference", "expected a tag and a digest, such as alpine:3@sha256:…")
        image = self._reader.reference("reference", f"{name}:{tag}")
        assert isinstance(image.reference, Tag)
        if (rule := self._holds.rule(image.repository, image.reference)) is None:
            raise FieldInvalid("reference", "no rule of policy.moves is about this tag")
        try:
            return image.repository, image.reference, rule, Digest.parse(digest)
        except DigestInvalid as error:
            raise FieldInvalid("reference", error) from None


class OverrideControl:
    """The exceptions from the policy that an operator makes."""

    def __init__(self, overrides: Overrides, reader: ReferenceReader) -> None:
        self._overrides = overrides
        self._reader = reader

    def rows(self) -> list[OverrideRow]:
        """Those of which the time has not ended.  Blocks; raises StorageFailed."""
        return [_override_row(each) for each in self._overrides.list()]

    async def begin(self, text: str, seconds: float, reason: str) -> OverrideRow:
        """Raises FieldInvalid, StorageFailed."""
        if not 0 < seconds <= LONGEST:
            raise FieldInvalid("seconds", f"must be more than 0, and at most {LONGEST:.0f}")
        if not reason.strip() or not reason.isprintable():
            raise FieldInvalid("reason", "must be a text of one line, which clients and the log are given")
        return _override_row(await self._overrides.begin(self._image(text), seconds, reason))

    async def end(self, text: str) -> OverrideRow:
        """Raises FieldInvalid, NameUnknown, StorageFailed."""
        return _override_row(await self._overrides.end(self._image(text)))

    def _image(self, text: str) -> str:
        image = self._reader.reference("reference", text)
        return written(image.repository, image.reference)


def _override_row(found: Override) -> OverrideRow:
    return OverrideRow(image=found.image, since=found.since, until=found.until, reason=found.reason)


def pulled_rows(parts: Composition, seconds: float) -> list[PulledRow]:
    """Who pulled what in the last `seconds`.  Blocks; raises Unsupported, StorageFailed."""
    if (keep := parts.config.policy.journal) is None:
        raise Unsupported("who pulls what is not recorded: set policy.journal, such as 7d")
    journal = PullJournal(parts.store.records, keep, parts.clock)
    return [PulledRow(**asdict(each)) for each in journal.since(seconds)]
