"""The conditions of a rule about signatures and attestations: see PolicyRule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from proxy.config.policy import PolicyRule
from proxy.config.signers import AttestationConfig
from proxy.extensions.extension import Extensions
from proxy.policy.condition import Condition, Evidence, Subject
from proxy.policy.expressions import Expression, ExpressionFailed
from proxy.policy.extended import ExtensionCondition
from proxy.policy.locks import LockedImages, read_lock
from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.finder import SignatureFinder
from proxy.signatures.forms import FoundSignature, Proof, Signer
from storage.concurrency import run_in_thread

AGAIN = 60.0  # seconds until an expression that depends on the time is evaluated again
SHOWN = 3  # reasons in a message


def conditions_of(
    rule: PolicyRule, signers: Mapping[str, Signer], clock: Callable[[], float], extensions: Extensions
) -> tuple[Condition, ...]:
    """The conditions of a rule, all of which have to be met.  `extensions` are made already.

    Raises StartError if an expression or a lock file cannot be read.
    """
    named_by_rule: list[Condition] = [
        *([] if (lock := rule.locked) is None else [LockedImages(read_lock(lock), lock.name)]),
        *(ExtensionCondition(extensions.get(name), clock) for name in rule.conditions),
    ]
    requirements: list[Requirement] = [
        *([AnySignature(rule.signed_by)] if rule.signed_by else []),
        *(AnySignature((name,)) for name in rule.signed_by_all),
        *(Attestation(each) for each in rule.attested),
    ]
    if not requirements:
        return tuple(named_by_rule)
    named = {name: signers[name] for name in dict.fromkeys(rule.signers)}
    return (*named_by_rule, VerifiedSignatures(named, requirements, clock))


@dataclass(slots=True)
class Verified:
    """What was proven about an image so far, by whom; and why signers refused what they were shown."""

    image: str
    digest: str
    now: float
    proven: list[tuple[str, Proof]] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    seen: int = 0

    def by(self, signers: Sequence[str], predicate_type: str | None) -> list[tuple[str, Proof]]:
        return [
            (name, proof)
            for name, proof in self.proven
            if name in signers and proof.predicate_type == predicate_type
        ]

    def why_not(self, signers: Sequence[str]) -> str:
        """Why nothing was proven by any of `signers`, after a colon; nothing without a reason."""
        reasons = [f"{name}: {why}" for name in signers for why in self.refused.get(name, ())]
        reasons = list(dict.fromkeys(reasons))
        more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        return f" ({'; '.join(reasons[:SHOWN])}{more})" if reasons else ""


class Requirement(Protocol):
    """A part of a condition."""

    def judge(self, verified: Verified) -> Evidence:
        """Whether what was verified meets it."""
        ...


class AnySignature:
    """A signature by one of `signers`."""

    def __init__(self, signers: Sequence[str]) -> None:
        self._signers = signers

    def judge(self, verified: Verified) -> Evidence:
        for name, proof in verified.by(self._signers, None):
            return Evidence(True, f"is signed by {name}", _until(proof))
        if not verified.seen:
            return Evidence(False, "has no signature")
        wanted = " or ".join(self._signers)
        return Evidence(False, f"is not signed by {wanted}{verified.why_not(self._signers)}")


class Attestation:
    """A statement of a predicate type by one of the signers, of which an expression is true."""

    def __init__(self, wanted: AttestationConfig) -> None:
        self._wanted = wanted
        self._expression = None if wanted.when is None else Expression(wanted.when)

    def judge(self, verified: Verified) -> Evidence:
        wanted, failed = self._wanted, ""
        for name, proof in verified.by(wanted.signed_by, wanted.type):
            if not (why := self._failure(proof, verified)):
                return Evidence(True, f"has {wanted.type} by {name}", self._lasts(proof, verified.now))
            failed = f"has {wanted.type} by {name}, but {why}"
        if failed:
            return Evidence(False, failed)
        by = " or ".join(wanted.signed_by)
        return Evidence(False, f"has no {wanted.type} by {by}{verified.why_not(wanted.signed_by)}")

    def _failure(self, proof: Proof, verified: Verified) -> str:
        """Why the statement is not enough; nothing if it is."""
        if self._expression is None:
            return ""
        try:
            if self._expression.holds(proof.predicate, verified.now, verified.image, verified.digest):
                return ""
        except ExpressionFailed as error:
            return f"{self._expression.text!r} cannot be evaluated: {error}"
        return f"{self._expression.text!r} is not true of it"

    def _lasts(self, proof: Proof, now: float) -> float:
        depends = self._expression is not None and self._expression.depends_on_time
        return min(_until(proof), now + AGAIN) if depends else _until(proof)


class Unjudged:
    """Stands for the conditions of a rule where only names are judged."""

    async def judge(self, subject: Subject) -> Evidence:
        raise TypeError("only names are judged here")


class VerifiedSignatures:
    """What is signed and attested by `signers`, as all `requirements` ask.

    Signatures are looked at one after the other, until they are enough.
    """

    def __init__(
        self,
        signers: Mapping[str, Signer],
        requirements: Sequence[Requirement],
        clock: Callable[[], float],
    ) -> None:
        self._signers = signers
        self._requirements = requirements
        self._clock = clock

    async def judge(self, subject: Subject) -> Evidence:
        """As Condition.judge(): what cannot be fetched is an error only if the rest is not enough."""
        verified = Verified(subject.repository, subject.manifest.digest, self._clock())
        finder = SignatureFinder(subject.registry, subject.name)
        async with aclosing(finder.find(subject.manifest.digest)) as signatures:
            async for signature in signatures:
                # A statement may be large, and a key of RSA slow.
                await run_in_thread(self._verify, signature, subject, verified)
                if (found := self._conclude(verified)).met:
                    return found
        return self._conclude(verified)

    def _verify(self, signature: FoundSignature, subject: Subject, verified: Verified) -> None:
        now = datetime.fromtimestamp(verified.now, UTC)
        verified.seen += 1
        for name, signer in self._signers.items():
            try:
                verified.proven.append((name, signer.verify(signature, subject.manifest.descriptor, now)))
            except (SignatureRefused, SignerInvalid) as error:
                verified.refused.setdefault(name, []).append(str(error))

    def _conclude(self, verified: Verified) -> Evidence:
        found = [each.judge(verified) for each in self._requirements]
        if (unmet := next((each for each in found if not each.met), None)) is not None:
            return unmet
        return Evidence(True, " and ".join(each.reason for each in found), min(each.until for each in found))


def _until(proof: Proof) -> float:
    return math.inf if proof.until is None else proof.until.timestamp()
