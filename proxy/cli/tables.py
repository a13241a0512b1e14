"""What each answer of the admin API looks like to people.  `now` is what ages are told from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from proxy.admin import models
from proxy.cli.console import Column, Progress, Table
from proxy.config.quantities import format_duration, format_share, format_size, format_time, plural
from storage.names import written

_REFERENCE = Column("REFERENCE", whole=True)
_HELD = Column("HELD", right=True)


def listed(found: models.Listed, now: float) -> Sequence[Table]:
    table = _images(found.images, now) if found.images else _repositories(found.repositories)
    if found.next is not None:
        table.notes.append(f"more: --last {found.next}")
    return [table]


def _repositories(rows: Sequence[models.RepositoryRow]) -> Table:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("TAGS", right=True),
        Column("MANIFESTS", right=True),
        _HELD,
    )
    table = Table(columns, empty="nothing is cached that matches")
    for each in rows:
        table.add(each.repository, str(each.tags), str(each.manifests), format_size(each.bytes))
    return table


def _images(rows: Sequence[models.ImageRow], now: float) -> Table:
    columns = (
        _REFERENCE,
        Column("DIGEST", digests=True),
        _HELD,
        Column("WHOLE", right=True),
        Column("PLATFORMS"),
        Column("USED"),
        Column("USES", right=True),
        Column("FRESH"),
        Column("PINNED"),
    )
    table = Table(columns)
    for each in rows:
        table.add(
            each.repository if each.tag is None else written(each.repository, each.tag),
            each.digest,
            format_size(each.bytes_held),
            format_size(each.bytes_whole) if each.bytes_whole != each.bytes_held else "all",
            _platforms(each),
            format_time(each.last_used, now),
            str(each.uses),
            _fresh(each.fresh_until, now),
            "pinned" if each.pinned else "",
        )
    return table


def _platforms(image: models.ImageRow) -> str:
    """Those of which something is here; a + where not all of it is."""
    present = [each for each in image.platforms if each.complete or each.bytes_held]
    names = [f"{each.platform or '?'}{'' if each.complete else '+'}" for each in present]
    if len(present) < len(image.platforms):
        names.append(f"({len(present)} of {len(image.platforms)})")
    return " ".join(names)


def _fresh(until: float | None, now: float) -> str:
    if until is None:
        return "forever"
    return f"for {format_duration(until - now)}" if until > now else "due"


def shown(found: models.Tree, now: float) -> Sequence[Table]:
    columns = (
        Column("DIGEST", digests=True, whole=True),
        Column("ROLE"),
        Column("SIZE", right=True),
        Column("HERE"),
        Column("PLATFORM"),
        Column("TYPE"),
    )
    table = Table(columns, title=written(found.repository, found.reference))
    for before, node in _drawn(found.node, "", ""):
        _node(table, before, node)
    for each in found.referrers:
        for before, node in _drawn(each, "", ""):
            _node(table, before, node)
    used = (
        f"used {plural(found.uses.count, 'time')}, last {format_time(found.uses.last, now)}"
        if found.uses
        else ""
    )
    table.notes += [used or "never used"]
    table.notes += [f"pinned by {each}" for each in found.pins]
    if not found.moves:
        return [table]
    moves = Table((Column("MOVED"), Column("FROM", digests=True), Column("TO", digests=True)))
    for move in reversed(found.moves):
        moves.add(format_time(move.at, now), move.old, move.new)
    return [table, moves]


def _node(table: Table, before: str, node: models.Node) -> None:
    table.add(
        before + node.digest,
        node.role,
        format_size(node.size),
        "yes" if node.present else "no",
        node.platform or "",
        node.artifact_type or node.media_type,
    )


def _drawn(node: models.Node, first: str, rest: str) -> Iterator[tuple[str, models.Node]]:
    """Itself and all below it, with what is drawn before each: `first`, and `rest` before those below."""
    yield first, node
    for number, child in enumerate(node.children, 1):
        last = number == len(node.children)
        yield from _drawn(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def counted(found: models.Stats, now: float) -> Sequence[Table]:
    columns = (
        Column("NAMESPACE", whole=True),
        Column("REQUESTS", right=True),
        Column("HITS", right=True),
        Column("HIT BYTES", right=True),
        Column("SENT", right=True),
        Column("RECEIVED", right=True),
        Column("BYTES SAVED", right=True),
        Column("ASKED UPSTREAM", right=True),
        Column("REQUESTS SAVED", right=True),
        Column("STALE", right=True),
        Column("ERRORS", right=True),
    )
    table = Table(columns)
    total = [] if len(found.namespaces) == 1 else [found.total]
    for each in (*found.namespaces, *total):
        table.add(
            each.namespace or "all",
            str(each.requests),
            format_share(each.hit_ratio),
            format_share(each.byte_hit_ratio),
            format_size(each.sent_bytes),
            format_size(each.received_bytes),
            format_size(each.bytes_saved),
            str(each.upstream_requests),
            str(each.requests_saved),
            str(each.stale),
            str(each.errors),
        )
    limit = "" if found.limit is None else f" of {format_size(found.limit)}"
    stored = format_size(found.stored_bytes)
    table.notes.append(f"in the last {format_duration(found.period)}; stored {stored}{limit}")
    return [table]


def filling(found: Sequence[models.FillRow], now: float) -> Sequence[Table]:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("DIGEST", digests=True),
        Column("HERE", right=True),
        Column("SIZE", right=True),
        Column("DONE", right=True),
        Column("SPEED", right=True),
        Column("LEFT", right=True),
        Column("FOLLOWERS", right=True),
    )
    table = Table(columns, empty="nothing is being transferred")
    for each in found:
        table.add(
            each.repository,
            each.digest,
            format_size(each.bytes),
            format_size(each.size),
            format_share(each.bytes / each.size if each.size > 0 else None),
            f"{format_size(each.speed)}/s",
            "?" if each.eta is None else format_duration(each.eta),
            str(each.followers),
        )
    return [table]


def progress(found: Sequence[models.FillRow], shown: Progress, beside: str = "") -> None:
    """The fills as they are now; those that are not among them any more have ended, but for `beside`."""
    for each in found:
        said = [f"{format_size(each.bytes)} of {format_size(each.size)}", f"{format_size(each.speed)}/s"]
        said.append(plural(each.followers, "follower"))
        shown.show(_part(each), each.bytes, each.size, ", ".join(said))
    for part in shown.parts() - {_part(each) for each in found} - {beside}:
        shown.drop(part)


def _part(fill: models.FillRow) -> str:
    return written(fill.repository, fill.digest)


def purged(found: models.Purged, now: float) -> Sequence[Table]:
    table = Table((Column("WOULD GO" if found.dry_run else "PURGED", whole=True),))
    for each in found.references:
        table.add(each)
    table.notes += [f"kept, since pinned: {each}" for each in found.kept]
    if found.references:
        goes = [plural(found.manifests, "manifest"), plural(found.links, "link"), plural(found.blobs, "blob")]
        table.notes.append(f"{', '.join(goes)}, {format_size(found.bytes)}{_dry(found.dry_run)}")
    return [table]


def _dry(dry_run: bool) -> str:
    return "; nothing was removed" if dry_run else ""


def refreshed(found: models.Refreshed, now: float) -> Sequence[Table]:
    state = "new here" if found.new else "unchanged"
    if found.moved:
        state = f"moved from {found.moved}"
    table = Table(())
    table.notes += [
        f"{written(found.repository, found.reference)}: {state}",
        f"{found.digest}: {plural(found.manifests, 'manifest')}, {plural(found.blobs, 'blob')}, "
        f"of them fetched {found.fetched}, {format_size(found.bytes)}",
    ]
    return [table]


def pinned(found: Sequence[models.PinRow], now: float) -> Sequence[Table]:
    columns = (
        Column("PATTERN", whole=True),
        Column("KEPT FRESH"),
        Column("PLATFORMS"),
        Column("SINCE"),
        Column("REFERENCES", right=True),
        Column("MANIFESTS", right=True),
        Column("BLOBS", right=True),
        _HELD,
    )
    table = Table(columns, empty="nothing is pinned")
    for each in found:
        table.add(
            each.pattern,
            "no" if each.keep_fresh is None else f"every {format_duration(each.keep_fresh)}",
            " ".join(each.platforms) or "all",
            format_time(each.since, now, "configured"),
            str(each.references),
            str(each.manifests),
            str(each.blobs),
            format_size(each.bytes),
        )
    return [table]


def unpinned(found: models.Unpinned, now: float) -> Sequence[Table]:
    return [Table((), notes=[f"{found.pattern} is pinned no more"])]


def evicted(found: models.Evicted, now: float) -> Sequence[Table]:
    goes = [
        plural(found.tags, "tag"),
        plural(found.manifests, "manifest"),
        plural(found.links, "link"),
        plural(found.blobs, "blob"),
    ]
    table = Table(())
    what = "would go" if found.dry_run else "evicted"
    table.notes.append(f"{what}: {', '.join(goes)}, {format_size(found.bytes)}{_dry(found.dry_run)}")
    if found.short:
        table.notes.append(
            f"still {format_size(found.short)} too much: the rest is pinned, offline or being read"
        )
    return [table]


def collected(found: models.Collected, now: float) -> Sequence[Table]:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("TAGS", right=True),
        Column("MANIFESTS", right=True),
        Column("LINKS", right=True),
        Column("YOUNG", right=True),
    )
    table = Table(columns)
    for each in found.rows:
        table.add(each.repository, str(each.tags), str(each.manifests), str(each.links), str(each.young))
        if each.refused:
            table.notes.append(f"left as it is: {each.repository}: {each.refused}")
    if not found.begun:
        table.notes.append("nothing was collected yet")
        return [table]
    goes = [
        plural(found.tags, "tag"),
        plural(found.manifests, "manifest"),
        plural(found.links, "link"),
        plural(found.blobs, "blob"),
    ]
    what = "would go" if found.dry_run else f"collected {format_time(found.begun, now)}"
    table.notes.append(f"{what}: {', '.join(goes)}, {format_size(found.bytes)}{_dry(found.dry_run)}")
    table.notes.append(
        f"looked at {plural(found.repositories, 'repository', 'repositories')}; "
        f"{found.young} still too young to go"
    )
    return [table]


def scrubbed(found: models.Scrubbing, now: float) -> Sequence[Table]:
    columns = (
        Column("PASS"),
        Column("BEGUN"),
        Column("DONE", right=True),
        Column("CHECKED", right=True),
        Column("READ", right=True),
        Column("DAMAGED", right=True),
        Column("HEALED", right=True),
        Column("FOREIGN", right=True),
    )
    table = Table(columns, empty="nothing has been read yet")
    for name, each in (("asked for", found.asked), ("background", found.background)):
        if each.begun or each.running:
            table.add(
                name,
                format_time(each.begun, now),
                format_share(min(1.0, each.bytes / each.total_bytes) if each.total_bytes else None),
                str(each.checked),
                format_size(each.bytes),
                str(each.damaged),
                str(each.healed),
                str(each.foreign),
            )
    if found.error is not None:
        table.notes.append(f"the pass that was asked for ended: {found.error}")
    return [table]


def scrubbing(found: models.ScrubRow, shown: Progress) -> None:
    read = f"{format_size(found.bytes)} of about {format_size(found.total_bytes or None)}"
    said = f"{read}, {found.checked} checked, {found.damaged} damaged"
    shown.show("scrub", found.bytes, found.total_bytes or None, said)


def webhooks(found: Sequence[models.WebhookRow], now: float) -> Sequence[Table]:
    columns = (
        Column("WEBHOOK", whole=True),
        Column("URL"),
        Column("FORMAT"),
        Column("ACTIONS"),
        Column("PENDING", right=True),
        Column("OLDEST"),
        Column("DELIVERED"),
        Column("STATE"),
    )
    table = Table(columns, empty="no webhook is configured")
    for each in found:
        table.add(
            each.name,
            each.url,
            each.format,
            " ".join(each.actions),
            str(each.pending),
            format_time(each.oldest, now, ""),
            format_time(each.delivered_at, now, "never"),
            ""
            if each.failing_since is None
            else f"fails, {format_time(each.failing_since, now)}: {each.error}",
        )
    return [table]


def explained(found: models.Why, now: float) -> Sequence[Table]:
    table = Table((Column("WHY"), Column(written(found.repository, found.reference))))
    fresh = "" if found.fresh_for is None else f", {format_duration(found.fresh_for)}"
    keep = ", forever" if found.keep_for is None else f", {format_duration(found.keep_for)}"
    table.add("verdict", f"{found.verdict}: {found.because}")
    table.add("namespace", f"{found.namespace}: {found.qualified}")
    if found.fresh_rule is not None:
        table.add("fresh by", f"{found.fresh_rule}{fresh or ', forever'}")
    table.add("kept by", f"{found.keep_rule}{keep}")
    table.add("pinned by", found.pin or "nothing")
    table.add("cached", found.digest or "nothing")
    if found.digest is not None:
        table.add("here", ("all of it" if found.complete else "in part") if found.stored else "nothing of it")
        if found.validated_at is not None:
            table.add("validated", format_time(found.validated_at, now))
        if found.fresh_rule is not None:
            table.add("fresh", _fresh(found.fresh_until, now))
        table.add("last used", format_time(found.last_used, now))
    if found.offline:
        table.add("upstream", "offline: it is never asked")
    for each in found.upstreams:
        table.add("upstream", _host(each, now))
    return [table]


def _host(host: models.HostRow, now: float) -> str:
    said = [host.url if host.host in host.url else f"{host.url} by {host.host}"]
    if host.open:
        said.append(f"let alone, asked again {format_time(host.until, now)}: {host.error or 'it failed'}")
    if host.ratelimit_limit is not None:
        said.append(f"{host.ratelimit_remaining} of {host.ratelimit_limit} requests left")
    if host.limited_until is not None:
        said.append(f"limited until {format_time(host.limited_until, now)}")
    return ", ".join(said)
