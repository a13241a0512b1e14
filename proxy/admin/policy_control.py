"""What the policy of a server says of an image."""

from __future__ import annotations

from proxy.admin.reports import PolicyExplained, PolicyLead
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import ImageReference


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
        reason=ruling.reason,
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
