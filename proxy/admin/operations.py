"""The operations of an operator: what each takes and answers, and how the admin API exposes it.

This is the only description of an operation.  The API makes its routes from it, the client its requests,
and mypy checks both the client and LocalOperations against the Protocol.  A new operation needs a method
and a row here, its method in LocalOperations, a line in SentOperations, and its entry in openapi.yaml.

Patterns are globs over full names, `<namespace>/<repository>`, with `:<tag>` or `@<digest>` where tags or
manifests are meant.  A reference, and a pattern whose repository has no wildcard, may be written as a
client writes it: `alpine:3` is in the default namespace.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Protocol, get_args, get_type_hints

import msgspec

from proxy.admin import (
    activity_reports,
    extension_reports,
    key_reports,
    models,
    policy_reports,
    reports,
    tag_reports,
)
from proxy.admin.models import Sort

PAGE, LARGEST_PAGE = 100, 1000  # images, or references, of one request


class Operations(Protocol):
    """The operations on a running server, or on its directory.

    Every method raises RegistryError, or FieldInvalid for an argument that cannot be read; AdminClient
    raises OperationFailed for both.
    """

    @property
    def remote(self) -> bool:
        """Whether a server does the work, and continues after the caller has left."""

    async def repositories(self, match: str = "*") -> models.Listed:
        """The repositories that match, by name."""

    async def images(
        self,
        match: str = "*",
        limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = PAGE,
        last: str = "",
    ) -> models.Listed:
        """One page of tags, or with @ in the pattern of manifests.  `last` is `next` of the previous page."""

    async def find(
        self,
        match: str = "*",
        sort: Sort = "name",
        reverse: bool = False,
        offset: Annotated[int, msgspec.Meta(ge=0)] = 0,
        limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = PAGE,
    ) -> models.Found:
        """Tags in an order: `limit` of those that match, after the first `offset`.

        They are sorted by their names, by when they were set or last confirmed, or by when they were used.
        """

    async def show(self, ref: str) -> models.ImageTree:
        """The tree of manifests and blobs of one image."""

    async def history(self, ref: str) -> tag_reports.TagHistory:
        """What a tag stood for, as far as is recorded, the latest first."""

    async def diff(self, ref: str, other: str = "") -> tag_reports.ImageDiff:
        """The difference of two stored images.  `other` may be a digest alone, of the same repository.
        Without it, the image that the tag `ref` stood for before is compared with what it stands for.
        """

    async def config(self, ref: str) -> models.ConfigReport:
        """The configuration of an image, with its history."""

    async def files(
        self,
        ref: str,
        search: str = "",
        offset: Annotated[int, msgspec.Meta(ge=0)] = 0,
        limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = PAGE,
    ) -> models.LayerFiles:
        """The files of a layer, `name@digest`, whose paths contain `search`."""

    async def stats(self, period: str = "7d") -> models.Stats:
        """How much traffic the cache has saved in the last `period`, a duration."""

    async def fills(self) -> list[models.FillRow]:
        """The fills in flight in all processes, the oldest first; then the blobs of which parts are kept."""

    def watch(self, once: bool = False) -> AsyncIterator[activity_reports.FillsNow]:
        """The fills now, and unless they are asked for `once`, after each change, until the server stops."""

    async def activity(self) -> activity_reports.Activity:
        """What the server does now: requests, the slowest of them, and the disk."""

    async def audit(
        self, match: str = "", limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = PAGE
    ) -> list[activity_reports.AuditRow]:
        """The last acts in the audit log whose values contain all words of `match`, the latest first.

        Raises Unsupported if there is no audit log.
        """

    async def upstreams(self) -> list[reports.UpstreamRow]:
        """The hosts of all upstreams: whether they are asked, and what is left of their rate limits."""

    async def why(self, ref: str) -> reports.Why:
        """What a pull would do now, and by which rules.  No upstream is asked."""

    async def policy(self, ref: str) -> policy_reports.PolicyExplained:
        """What the policy says of a reference.  An upstream is asked for what is not stored or not fresh."""

    async def held(self) -> list[policy_reports.HeldRow]:
        """The tags that the policy holds at another digest than their upstreams give."""

    async def approve(self, reference: str) -> policy_reports.HeldRow:
        """Let a tag that is held move to a digest, `name:tag@digest`: now, or once the upstream gives it."""

    async def reject(self, reference: str) -> policy_reports.HeldRow:
        """Never let a tag that is held move to a digest, `name:tag@digest`, by itself."""

    async def overrides(self) -> list[policy_reports.OverrideRow]:
        """The exceptions from the policy, the next to end first."""

    async def override(self, reference: str, seconds: float, reason: str) -> policy_reports.OverrideRow:
        """Serve an image for some time whatever the policy says."""

    async def end_override(self, reference: str) -> policy_reports.OverrideRow:
        """End the exception for an image.  Raises NameUnknown if there is none."""

    async def pulled(self, period: str = "7d") -> list[policy_reports.PulledRow]:
        """Who pulled what in the last `period`.  Raises Unsupported if that is not recorded."""

    async def keys(self) -> list[key_reports.KeyRow]:
        """The API keys, by name.  Raises Unsupported if they are not accepted."""

    async def create_key(
        self,
        name: str,
        scopes: Sequence[str] = (),
        seconds: float | None = None,
        lock: Sequence[str] | None = None,
    ) -> key_reports.KeyCreated:
        """Make an API key with `scopes`, for `seconds` or until it is revoked.

        `lock` are the lines of a lock file, if it may pull nothing else.
        """

    async def revoke_key(self, name: str) -> key_reports.KeyRevoked:
        """Revoke an API key.  Raises NameUnknown if there is none."""

    async def end_tokens(self) -> key_reports.TokensEnded:
        """End all tokens of the token endpoint.  Raises Unsupported if there is none."""

    async def purge(self, pattern: str, *, dry_run: bool = False, force: bool = False) -> reports.Purged:
        """Delete what matches, and the content that nothing else needs.  See Purge.purge()."""

    async def delete(
        self,
        pattern: str,
        *,
        older_than: float | None = None,
        keep: Annotated[int, msgspec.Meta(ge=0)] | None = None,
        dry_run: bool = False,
    ) -> reports.Deleted:
        """Delete what matches from private registries.  `older_than` is in seconds since the push of a tag,
        `keep` the number of matching tags that stay in each repository, the last pushed ones.
        """

    async def tag(self, source: str, target: str) -> reports.Tagged:
        """Give an image a tag in a private registry."""

    async def refresh(self, reference: str, platforms: Sequence[str] = ()) -> reports.Refreshed:
        """Resolve the reference upstream, and fetch what is missing of it."""

    async def pins(self) -> list[models.PinRow]:
        """All pins, those of the configuration first."""

    async def pin(
        self, pattern: str, keep_fresh: float | None = None, platforms: Sequence[str] = ()
    ) -> list[models.PinRow]:
        """Add a pin, or replace the pin of the same pattern.  `keep_fresh` is seconds between two
        refreshes.
        """

    async def unpin(self, pattern: str) -> reports.Unpinned:
        """Remove a pin that was added by command.  Raises NameUnknown if there is none."""

    async def evict(self, to: int | None = None, *, dry_run: bool = False) -> reports.Evicted:
        """Evict until `to` bytes are left; without `to`, what is too old or over the limits."""

    async def evictable(
        self, limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = PAGE
    ) -> activity_reports.Evictable:
        """What is evicted next, and what smaller limits would evict.  Nothing is evicted."""

    async def scrub(self) -> reports.Scrubbing:
        """Start a scrub at full speed, unless one that was requested is still running."""

    async def scrubbing(self) -> reports.Scrubbing:
        """The progress of the scrubs."""

    async def webhooks(self) -> list[models.WebhookRow]:
        """The state of each webhook, in the order of the configuration."""

    async def extensions(self) -> list[extension_reports.ExtensionRow]:
        """The extensions of the configuration, then those that other installed packages offer."""

    async def collect(self, *, dry_run: bool = False) -> reports.Collected:
        """Collect now, whatever the schedule.  Raises Unsupported if no namespace has a store."""

    async def collected(self) -> reports.Collected:
        """The report of the last collection.  Raises Unsupported if no namespace has a store."""

    async def warm(
        self, reference: str, platforms: Sequence[str] = (), referrers: bool = True
    ) -> reports.WarmRow:
        """Fetch all of an image.  The answer holds the error of a fetch that failed."""

    async def ready(
        self,
        references: Annotated[Sequence[str], msgspec.Meta(max_length=LARGEST_PAGE)],
        platforms: Sequence[str] = (),
        referrers: bool = True,
    ) -> list[reports.ReadyRow]:
        """Whether each image can be pulled while no upstream answers: one row each, in their order."""

    async def drill(self) -> reports.Drilling:
        """The drill that is running, or the last one."""

    async def begin_drill(self, seconds: float, namespaces: Sequence[str] = ()) -> reports.Drilling:
        """Cut off the upstreams of `namespaces`, or all.  Raises Denied while another drill is running."""

    async def end_drill(self) -> reports.Drilling:
        """End the drill, if one is running."""

    async def reload(self) -> reports.Reloading:
        """Have the server read its configuration again.  Raises Unsupported if none is running."""


class Operation:
    """One method of Operations as a request of the admin API: its name, HTTP method, path, parameters and
    result.

    The parameters are fields of the query of a GET, else of a JSON body.  `status` is that of a success.
    An answer that is a `summary` is costly, and kept for some seconds; an operation with `changes` makes
    all of these outdated.  A `stream` is answered with server-sent events, one for each result.

    In a fleet, every replica does an operation that is done `everywhere`; combination.py makes one answer of
    theirs.  One that is `kept` is an act about such a subject: it reaches replicas that are down once they
    are back.  One that is `private` is about private registries: where replicas share the records of these,
    one does it for all.  One about what is `stored` leaves out other replicas without the image.  One about
    what is the same `anywhere` is left to others only if it is not stored here.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        method: str,
        path: str,
        *,
        status: int = 200,
        changes: bool = False,
        summary: bool = False,
        stream: bool = False,
        everywhere: bool = False,
        kept: str | None = None,
        private: bool = False,
        stored: bool = False,
        anywhere: bool = False,
    ) -> None:
        self.name = function.__name__
        self.method = method
        self.path = path
        self.status = status
        self.changes = changes
        self.summary = summary
        self.stream = stream
        self.everywhere = everywhere or anywhere or kept is not None
        self.kept = kept
        self.private = private
        self.stored = stored
        self.anywhere = anywhere
        self._function = function

    @cached_property
    def parameters(self) -> type[msgspec.Struct]:
        """A struct of the arguments; it decodes and checks a body."""
        hints = get_type_hints(self._function, include_extras=True)
        _, *arguments = inspect.signature(self._function).parameters.values()  # without self
        fields = [
            (each.name, hints[each.name])
            if each.default is each.empty
            else (each.name, hints[each.name], each.default)
            for each in arguments
        ]
        return msgspec.defstruct(self.name, fields, frozen=True, forbid_unknown_fields=True)

    @cached_property
    def result(self) -> Any:
        hint = get_type_hints(self._function)["return"]
        return get_args(hint)[0] if self.stream else hint


async def perform(operations: Operations, operation: Operation, arguments: Mapping[str, Any]) -> Any:
    """The result of an operation.  Raises what its method raises."""
    return await getattr(operations, operation.name)(**arguments)


OPERATIONS = {
    each.name: each
    for each in (
        Operation(Operations.repositories, "GET", "repositories", summary=True, everywhere=True),
        Operation(Operations.images, "GET", "images", summary=True, everywhere=True),
        Operation(Operations.find, "GET", "find", summary=True),
        Operation(Operations.show, "GET", "image", everywhere=True),
        Operation(Operations.history, "GET", "history", everywhere=True),
        Operation(Operations.diff, "GET", "diff", anywhere=True),
        Operation(Operations.stats, "GET", "stats", summary=True, everywhere=True),
        Operation(Operations.fills, "GET", "fills", everywhere=True),
        Operation(Operations.watch, "GET", "fills/events", stream=True),
        Operation(Operations.activity, "GET", "activity", everywhere=True),
        Operation(Operations.audit, "GET", "audit", everywhere=True),
        Operation(Operations.config, "GET", "config", anywhere=True),
        Operation(Operations.files, "GET", "files", anywhere=True),
        Operation(Operations.upstreams, "GET", "upstreams", everywhere=True),
        Operation(Operations.why, "GET", "why", everywhere=True),
        Operation(Operations.policy, "GET", "policy"),
        Operation(Operations.held, "GET", "held", everywhere=True),
        Operation(Operations.approve, "POST", "held", changes=True, kept="held"),
        Operation(Operations.reject, "DELETE", "held", changes=True, kept="held"),
        Operation(Operations.overrides, "GET", "overrides", everywhere=True),
        Operation(Operations.override, "POST", "overrides", changes=True, kept="override"),
        Operation(Operations.end_override, "DELETE", "overrides", changes=True, kept="override"),
        Operation(Operations.pulled, "GET", "pulled", everywhere=True),
        Operation(Operations.keys, "GET", "keys"),
        Operation(Operations.create_key, "POST", "keys"),
        Operation(Operations.revoke_key, "DELETE", "keys"),
        Operation(Operations.end_tokens, "DELETE", "tokens"),
        Operation(Operations.purge, "POST", "purge", changes=True, kept="purge"),
        Operation(Operations.delete, "POST", "delete", changes=True),
        Operation(Operations.tag, "POST", "tag", changes=True),
        Operation(Operations.refresh, "POST", "refresh", changes=True, everywhere=True, stored=True),
        Operation(Operations.pins, "GET", "pins", everywhere=True),
        Operation(Operations.pin, "POST", "pins", changes=True, kept="pin"),
        Operation(Operations.unpin, "DELETE", "pins", changes=True, kept="pin"),
        Operation(Operations.evict, "POST", "evict", changes=True, everywhere=True),
        Operation(Operations.evictable, "GET", "evict"),
        Operation(Operations.scrub, "POST", "scrub", changes=True, status=202),
        Operation(Operations.scrubbing, "GET", "scrub"),
        Operation(Operations.webhooks, "GET", "webhooks", everywhere=True),
        Operation(Operations.extensions, "GET", "extensions", everywhere=True),
        Operation(Operations.collect, "POST", "collect", changes=True, everywhere=True, private=True),
        Operation(Operations.collected, "GET", "collect", everywhere=True, private=True),
        Operation(Operations.warm, "POST", "warm", changes=True),
        Operation(Operations.ready, "POST", "ready", everywhere=True),
        Operation(Operations.drill, "GET", "drill", everywhere=True),
        Operation(Operations.begin_drill, "POST", "drill", kept="drill"),
        Operation(Operations.end_drill, "DELETE", "drill", kept="drill"),
        Operation(Operations.reload, "POST", "reload", status=202),
    )
}
