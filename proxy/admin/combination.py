"""How the answers of the replicas of a fleet become one answer, for each operation that is done everywhere.

A row that all replicas have alike is there once, without a replica; others are there for each replica, with
its URL.  Numbers of what was done are sums over the replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from proxy.admin import activity_reports, extension_reports, models, policy_reports, reports, tag_reports
from proxy.admin.answers import SAME, Answers, of_replica, summed, told_apart, total_of
from proxy.admin.inventory import image_name
from proxy.admin.rows import day_row, stats_row
from proxy.telemetry.recent_requests import NUMBER
from storage.maintenance.usage import Counters

T = TypeVar("T")

_STATES = ("complete", "partial", "absent")  # of an image, the best first


def first(answers: Answers[T]) -> T:
    """The answer of this replica, where all do the same."""
    return answers.first


# Content


def repositories(answers: Answers[models.Listed]) -> models.Listed:
    rows = told_apart(_each(answers, "repositories"), lambda row: row.repository)
    return models.Listed(repositories=sorted(rows, key=lambda row: row.repository), notes=_notes(answers))


def images(answers: Answers[models.Listed]) -> models.Listed:
    """One page, of pages that begin after the same image.  It has `limit` images, and may have more rows."""
    rows = told_apart(_each(answers, "images"), image_name)
    names = sorted({image_name(row) for row in rows})
    # What comes after the end of a page may be on the next page of that replica.
    ends = [image_name(page.images[-1]) for page in answers.all if page.next is not None]
    known = [name for name in names if not ends or name <= min(ends)]
    shown = known[: answers.arguments["limit"]]
    listed, more = set(shown), bool(ends) or len(shown) < len(names)
    return models.Listed(
        images=sorted((row for row in rows if image_name(row) in listed), key=image_name),
        next="".join(shown[-1]) if more else None,
        notes=_notes(answers),
    )


def _each(answers: Answers[Any], name: str) -> dict[str, Any]:
    return {url: getattr(each, name) for url, each in answers.found.items()}


def _notes(answers: Answers[models.Listed]) -> list[str]:
    own = answers.first.notes
    others = [(url, note) for url, each in answers.found.items() for note in each.notes if note not in own]
    return [*own, *(f"{url}: {note}" for url, note in others)]


def tree(answers: Answers[models.ImageTree]) -> models.ImageTree:
    """The tree of this replica, or of the first that has the image, with what any replica stores."""
    shown = answers.first
    alike = [each for each in answers.all if each.digest == shown.digest]
    fullest = max(alike, key=lambda each: sum(1 for _ in _nodes(each)))
    stored = {
        url: {each.digest for each in _nodes(found) if each.present} for url, found in answers.found.items()
    }
    stored |= {url: set() for url in answers.without}
    uses = [each.uses for each in answers.all if each.uses is not None]
    return msgspec.structs.replace(
        shown,
        node=_held(fullest.node, stored),
        referrers=[
            _held(each, stored)
            for each in {each.digest: each for found in alike for each in found.referrers}.values()
        ],
        uses=models.UseRow(
            count=sum(each.count for each in uses),
            last=max(each.last for each in uses),
            first=min(each.first for each in uses),
        )
        if uses
        else None,
        pins=list(dict.fromkeys(pattern for each in answers.all for pattern in each.pins)),
        elsewhere=[
            models.ReplicaDigest(replica=url, digest=each.digest)
            for url, each in answers.found.items()
            if each.digest != shown.digest
        ],
    )


def _nodes(tree: models.ImageTree) -> Iterator[models.ImageNode]:
    waiting = [tree.node, *tree.referrers]
    while waiting:
        yield (node := waiting.pop())
        waiting += node.children


def _held(node: models.ImageNode, stored: Mapping[str, set[str]]) -> models.ImageNode:
    holding = [url for url, digests in stored.items() if node.digest in digests]
    return msgspec.structs.replace(
        node,
        present=bool(holding),
        replicas=[] if len(holding) == len(stored) else holding,
        children=[_held(each, stored) for each in node.children],
    )


def history(answers: Answers[tag_reports.TagHistory]) -> tag_reports.TagHistory:
    """What the tag stood for at each replica, the latest first: each knows what it has served."""
    times: dict[int, tuple[str, int]] = {}  # for how many times a replica has had a digest
    for each in answers.all:
        seen: Counter[str] = Counter()
        for row in each.rows:
            seen[row.digest] += 1
            times[id(row)] = row.digest, seen[row.digest]
    rows = told_apart(_each(answers, "rows"), lambda row: times[id(row)])
    rows.sort(key=lambda row: row.since, reverse=True)
    return msgspec.structs.replace(answers.first, rows=rows)


def pins(answers: Answers[list[models.PinRow]]) -> list[models.PinRow]:
    return told_apart(answers.found, lambda row: (row.pattern, row.since is None), "since")


# Activity


def stats(answers: Answers[models.Stats]) -> models.Stats:
    found, limits = answers.all, [each.limit for each in answers.all]
    return msgspec.structs.replace(
        answers.first,
        namespaces=_traffic([row for each in found for row in each.namespaces]),
        stores=_traffic([row for each in found for row in each.stores], store=True),
        total=_counted([each.total for each in found]),
        days=_days([day for each in found for day in each.days]),
        stored_bytes=sum(each.stored_bytes for each in found),
        limit=None if None in limits else sum(filter(None, limits)),
        replicas=[
            models.ReplicaStats(
                replica=url, total=each.total, stored_bytes=each.stored_bytes, limit=each.limit
            )
            for url, each in answers.found.items()
        ],
    )


def _traffic(rows: Sequence[models.StatsRow], *, store: bool = False) -> list[models.StatsRow]:
    named: dict[str, list[models.StatsRow]] = {}
    for each in rows:
        named.setdefault(each.namespace, []).append(each)
    return [_counted(named[name], store=store) for name in sorted(named)]


def _counted(rows: Sequence[models.StatsRow], *, store: bool = False) -> models.StatsRow:
    counted = (
        Counters(**{name: getattr(each, name) for name in Counters.__struct_fields__}) for each in rows
    )
    return stats_row(rows[0].namespace, sum(counted, Counters()), store=store)


def _days(days: Sequence[models.DayRow]) -> list[models.DayRow]:
    dated: dict[str, list[models.DayRow]] = {}
    for each in days:
        dated.setdefault(each.day, []).append(each)
    names = [name for name in models.DayRow.__struct_fields__ if name in Counters.__struct_fields__]
    return [
        day_row(day.replace("-", ""), Counters(**{name: total_of(rows, name) for name in names}))
        for day, rows in sorted(dated.items())
    ]


def fills(answers: Answers[list[models.FillRow]]) -> list[models.FillRow]:
    rows = [of_replica(url, row) for url, each in answers.found.items() for row in each]
    return sorted(rows, key=lambda row: (row.idle, row.started, row.digest))


def watched(answers: Answers[activity_reports.FillsNow]) -> activity_reports.FillsNow:
    ended = [of_replica(url, row) for url, each in answers.found.items() for row in each.ended]
    return activity_reports.FillsNow(
        at=answers.first.at,
        fills=fills(Answers({url: each.fills for url, each in answers.found.items()})),
        ended=sorted(ended, key=lambda row: -row.ended),
    )


def activity(answers: Answers[activity_reports.Activity]) -> activity_reports.Activity:
    found, limits = answers.all, [each.limit for each in answers.all]
    numbers = "processes", "requests", "served", "misses", "errors", "sent_bytes", "received_bytes"
    slowest = [of_replica(url, row) for url, each in answers.found.items() for row in each.slowest]
    return msgspec.structs.replace(
        summed(found, *numbers, "stored_bytes", "disk_bytes", "free_bytes"),
        limit=None if None in limits else sum(filter(None, limits)),
        slowest=sorted(slowest, key=lambda row: -row.first)[:NUMBER],
        troubles=[f"{url}: {trouble}" for url, each in answers.found.items() for trouble in each.troubles],
    )


def audit(answers: Answers[list[activity_reports.AuditRow]]) -> list[activity_reports.AuditRow]:
    rows = [of_replica(url, row) for url, each in answers.found.items() for row in each]
    return sorted(rows, key=lambda row: -row.at)[: answers.arguments["limit"]]


def upstreams(answers: Answers[list[reports.UpstreamRow]]) -> list[reports.UpstreamRow]:
    return told_apart(answers.found, lambda row: (row.namespace, row.url, row.host))


def why(answers: Answers[reports.Why]) -> reports.Why:
    own = answers.first
    return msgspec.structs.replace(
        own,
        elsewhere=[
            reports.ReplicaVerdict(
                replica=url, verdict=each.verdict, because=each.because, digest=each.digest
            )
            for url, each in answers.found.items()
            if (each.verdict, each.digest) != (own.verdict, own.digest)
        ],
    )


def webhooks(answers: Answers[list[models.WebhookRow]]) -> list[models.WebhookRow]:
    return told_apart(answers.found, lambda row: row.name)


def extensions(
    answers: Answers[list[extension_reports.ExtensionRow]],
) -> list[extension_reports.ExtensionRow]:
    return told_apart(answers.found, lambda row: (row.name, row.kind, row.entry_point), "calls", "failures")


# The policy


def held(answers: Answers[list[policy_reports.HeldRow]]) -> list[policy_reports.HeldRow]:
    return told_apart(answers.found, lambda row: (row.repository, row.tag))


def decided(answers: Answers[policy_reports.HeldRow]) -> policy_reports.HeldRow:
    """That of a replica at which the tag stands for the digest that it was to move to, else the first."""
    digest = answers.arguments["reference"].rpartition("@")[2]
    return next((each for each in answers.all if each.digest == digest), answers.first)


def overrides(answers: Answers[list[policy_reports.OverrideRow]]) -> list[policy_reports.OverrideRow]:
    rows = told_apart(answers.found, lambda row: row.image, "since")
    return sorted(rows, key=lambda row: row.until)


def pulled(answers: Answers[list[policy_reports.PulledRow]]) -> list[policy_reports.PulledRow]:
    """A client is served by one replica at a time: so each row is that of a replica."""
    return [of_replica(url, row) for url, each in answers.found.items() for row in each]


# What was done


def purged(answers: Answers[reports.Purged]) -> reports.Purged:
    found = answers.all
    return msgspec.structs.replace(
        summed(found, "manifests", "links", "blobs", "bytes", "absences"),
        references=sorted({each for one in found for each in one.references}),
        kept=sorted({each for one in found for each in one.kept}),
    )


def evicted(answers: Answers[reports.Evicted]) -> reports.Evicted:
    found = answers.all
    return msgspec.structs.replace(
        summed(found, "blobs", "bytes", "manifests", "tags", "links", "short"),
        seconds=max(each.seconds for each in found),
    )


def collected(answers: Answers[reports.Collected]) -> reports.Collected:
    """Of replicas that have private registries of their own."""
    found, names = answers.all, ("repositories", "tags", "manifests", "links", "blobs", "bytes", "young")
    refused = [f"{url}: {each.refused}" for url, each in answers.found.items() if each.refused]
    return msgspec.structs.replace(
        summed(found, *names),
        begun=min((each.begun for each in found if each.begun), default=0.0),
        seconds=max(each.seconds for each in found),
        refused="; ".join(refused),
        rows=[of_replica(url, row) for url, each in answers.found.items() for row in each.rows],
    )


def ready(answers: Answers[list[reports.ReadyRow]]) -> list[reports.ReadyRow]:
    """The best state of each image: without upstreams, replicas are asked for what they have stored."""
    rows = []
    for number, own in enumerate(answers.first):
        best_url, best = min(
            ((url, each[number]) for url, each in answers.found.items()),
            key=lambda one: _STATES.index(one[1].state),  # of equal ones the first, which is our own
        )
        rows.append(own if best is own else of_replica(best_url, best))
    return rows


def drilling(answers: Answers[reports.Drilling]) -> reports.Drilling:
    """The latest drill.  A replica that has none of it is not asked for what has failed."""
    latest = max(answers.all, key=lambda each: (each.running, each.begun))
    found = {url: each for url, each in answers.found.items() if _is_one_drill(each, latest)}
    missed = [of_replica(url, row) for url, each in found.items() for row in each.missed]
    return msgspec.structs.replace(
        latest,
        left=max(each.left for each in found.values()),
        missed=sorted(missed, key=lambda row: (row.first, row.client, row.reference)),
        untold=sum(each.untold for each in found.values()),
    )


def _is_one_drill(one: reports.Drilling, other: reports.Drilling) -> bool:
    """Whether they are the same: a replica that learns of a drill later does what is left of it."""
    if one.running and other.running:  # there is one at a time
        return True
    begins, ends = one.begun - other.begun, (one.begun + one.seconds) - (other.begun + other.seconds)
    return min(abs(begins), abs(ends)) <= SAME


COMBINE: Mapping[str, Callable[[Answers[Any]], Any]] = {
    "repositories": repositories,
    "images": images,
    "show": tree,
    "history": history,
    "stats": stats,
    "diff": first,
    "config": first,
    "files": first,
    "fills": fills,
    "activity": activity,
    "audit": audit,
    "upstreams": upstreams,
    "why": why,
    "held": held,
    "approve": decided,
    "reject": decided,
    "overrides": overrides,
    "override": first,
    "end_override": first,
    "pulled": pulled,
    "purge": purged,
    "refresh": first,
    "pins": pins,
    "pin": pins,
    "unpin": first,
    "evict": evicted,
    "webhooks": webhooks,
    "extensions": extensions,
    "collect": collected,
    "collected": collected,
    "ready": ready,
    "drill": drilling,
    "begin_drill": drilling,
    "end_drill": drilling,
}
