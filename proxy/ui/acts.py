"""What the page can do: each act as an operation, with the fields of its form and how these are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.admin.operations import OPERATIONS, Operations, perform
from proxy.config.quantities import parse_duration, parse_keep, parse_size
from proxy.namespaces.references import FieldInvalid


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a form.  `read` makes the argument out of its text; it raises ValueError.

    An empty field that is not `required` is left out; `given` is what it has at first.  With `flag`, it is a
    box that is `on` at first.
    """

    name: str
    label: str
    example: str = ""
    hint: str = ""
    read: Callable[[str], object] = str
    required: bool = False
    flag: bool = False
    on: bool = False
    given: str = ""


@dataclass(frozen=True, slots=True)
class Act:
    """An operation that changes something.

    `title` is what is done, `effect` what follows from it.  `danger` marks what loses something.  One with a
    `preview` can be asked what it would do.  One with a `secret` shows it once, as its result.
    """

    name: str
    operation: str
    title: str
    effect: str
    fields: tuple[Field, ...] = ()
    danger: bool = False
    preview: bool = False
    secret: bool = False

    def arguments(self, form: Mapping[str, str], *, whole: bool = True) -> dict[str, Any]:
        """The arguments that a form gives; if it is not `whole` yet, fields may be missing.

        Raises FieldInvalid.
        """
        known = {each.name for each in self.fields}
        if unknown := [name for name in form if name not in known]:
            raise FieldInvalid(unknown[0], "there is no such field")
        return dict(filter(None, (_argument(each, form.get(each.name), whole) for each in self.fields)))


def _argument(field: Field, text: str | None, whole: bool) -> tuple[str, object] | None:
    if field.flag:
        return field.name, text is not None
    text = (text or "").strip()
    if not text:
        if field.required and whole:
            raise FieldInvalid(field.label, "is required")
        return None
    try:
        return field.name, field.read(text)
    except ValueError as error:
        raise FieldInvalid(field.label, error) from None


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _end(text: str) -> float | None:
    seconds = parse_keep(text)
    return None if seconds == math.inf else seconds


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ValueError("expected a number, 0 or more")
    return int(text)


_REFERENCE = Field("reference", "Reference", "alpine:3", required=True)
_PATTERN = Field("pattern", "Reference or pattern", "alpine:3, or ghcr.io/team/*", required=True)
_HELD = Field("reference", "Tag and digest", "alpine:3@sha256:…", required=True)
_PLATFORMS = Field("platforms", "Platforms", "linux/amd64 linux/arm64", "All, if it is empty.", _words)

ACTS = {
    each.name: each
    for each in (
        Act(
            "warm",
            "warm",
            "Warm an image",
            "All of the image is fetched, so that it is here before clients ask for it.",
            (_REFERENCE, _PLATFORMS, Field("referrers", "With signatures and SBOMs", flag=True, on=True)),
        ),
        Act(
            "refresh",
            "refresh",
            "Refresh an image",
            "The upstream is asked what the reference stands for, and what is missing of that is fetched.",
            (_REFERENCE, _PLATFORMS),
        ),
        Act(
            "pin",
            "pin",
            "Pin images",
            "What matches is never evicted, however little space there is.",
            (
                _PATTERN,
                Field("keep_fresh", "Refresh every", "1h", "Not by itself, if it is empty.", parse_duration),
                _PLATFORMS,
            ),
        ),
        Act(
            "unpin",
            "unpin",
            "Remove a pin",
            "What it matches may be evicted again.",
            (Field("pattern", "Pattern of the pin", "docker.io/library/alpine:3", required=True),),
        ),
        Act(
            "purge",
            "purge",
            "Purge images",
            "They are deleted from the cache, with the content that nothing else needs. The next pull "
            "fetches them again.",
            (_PATTERN, Field("force", "Pinned images too", flag=True)),
            danger=True,
            preview=True,
        ),
        Act(
            "evict",
            "evict",
            "Evict content",
            "Evicts what is too old, then what was used the longest time ago, until the limits hold.",
            (
                Field(
                    "to", "Until this much is left", "20GiB", "The limits apply, if it is empty.", parse_size
                ),
            ),
            danger=True,
            preview=True,
        ),
        Act(
            "drill",
            "begin_drill",
            "Begin a drill",
            "For that time no upstream is asked, to see which pulls fail in an outage.",
            (
                Field("seconds", "For", "10m", read=parse_duration, required=True),
                Field("namespaces", "Namespaces", "docker.io", "All, if it is empty.", _words),
            ),
            danger=True,
        ),
        Act("end-drill", "end_drill", "End the drill", "Upstreams are asked again."),
        Act("scrub", "scrub", "Verify all content", "Every blob is read and compared with its digest."),
        Act(
            "delete",
            "delete",
            "Delete from a private registry",
            "The tags are deleted. The next collection removes what no tag needs any more.",
            (
                Field("pattern", "Reference or pattern", "local/team/app:ci-*", required=True),
                Field("older_than", "Pushed longer ago than", "30d", read=parse_duration),
                Field("keep", "Except the last", "2", "A number of tags in each repository.", _count),
            ),
            danger=True,
            preview=True,
        ),
        Act(
            "tag",
            "tag",
            "Tag an image",
            "The image gets a further tag in a private registry.",
            (
                Field("source", "Image", "local/team/app:1", required=True),
                Field("target", "New tag", "local/team/app:stable", required=True),
            ),
        ),
        Act(
            "collect",
            "collect",
            "Collect garbage",
            "What was pushed to private registries and is not reached from any tag is deleted.",
            danger=True,
            preview=True,
        ),
        Act(
            "approve",
            "approve",
            "Approve a move",
            "The tag moves to this digest: now, or once the upstream gives it.",
            (_HELD,),
        ),
        Act(
            "reject",
            "reject",
            "Reject a move",
            "The tag never moves to this digest by itself.",
            (_HELD,),
        ),
        Act(
            "override",
            "override",
            "Make an exception",
            "The image is served for that time whatever the policy says. Clients are given the reason.",
            (
                Field("reference", "Reference", "alpine:edge", required=True),
                Field("seconds", "For", "2h", read=parse_duration, required=True),
                Field("reason", "Reason", "hotfix 4711", required=True),
            ),
            danger=True,
        ),
        Act(
            "end-override",
            "end_override",
            "End an exception",
            "The policy applies to the image again.",
            (Field("reference", "Reference", "alpine:edge", required=True),),
        ),
        Act(
            "create-key",
            "create_key",
            "Make an API key",
            "A program logs in with it, as the password of any user. It is shown once.",
            (
                Field("name", "Name", "ci", required=True),
                Field("scopes", "What it may do", "repository:docker.io/team/*:pull", read=_words),
                Field("seconds", "Valid for", "90d", "Without an end, if it is empty.", _end, given="90d"),
            ),
            secret=True,
        ),
        Act(
            "revoke-key",
            "revoke_key",
            "Revoke an API key",
            "It is refused from the next request on, and so are the tokens that were issued for it.",
            (Field("name", "Name", "ci", required=True),),
            danger=True,
        ),
    )
}


async def done(
    operations: Operations, act: Act, arguments: Mapping[str, Any], *, dry_run: bool = False
) -> Any:
    """Do it, or with `dry_run` tell what it would do.  Raises RegistryError, FieldInvalid."""
    more = {"dry_run": True} if dry_run else {}
    return await perform(operations, OPERATIONS[act.operation], {**arguments, **more})
