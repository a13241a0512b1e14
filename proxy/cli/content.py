"""The commands that list what is stored: ls, show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import click
import msgspec

from proxy.admin import models
from proxy.admin.operations import LARGEST_PAGE, Operations
from proxy.cli.completion import references
from proxy.cli.console import freshness
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import ALL, by_replica, replica_name
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_past, format_size, plural
from storage.names import written

PAGE = LARGEST_PAGE
Listing: TypeAlias = models.RepositoryRow | models.ImageRow

_ORDERS: dict[str, Callable[[Listing], float]] = {
    "name": lambda row: 0,
    "size": lambda row: -((row.bytes if isinstance(row, models.RepositoryRow) else row.bytes_held) or 0),
    "used": lambda row: -(row.last_used or 0),
}


@command()
@click.argument("pattern", default="*")
@click.option("--tags", is_flag=True, help="List tags instead of repositories.")
@click.option(
    "--sort",
    "order",
    type=click.Choice(list(_ORDERS)),
    default="name",
    show_default=True,
    help="List the largest, or what was used last, first.",
)
@common
def ls(call: CommandContext, pattern: str, tags: bool, order: str) -> None:
    """List stored repositories or tags.

    PATTERN is a glob over full names, or a namespace for all in it. With @ in it, --tags lists manifests by
    digest.
    """

    async def question(operations: Operations) -> models.Listed:
        if not tags:
            return await operations.repositories(pattern)
        found = await operations.images(pattern, PAGE)
        while found.next is not None:
            more = await operations.images(pattern, PAGE, found.next)
            found = models.Listed(images=found.images + more.images, next=more.next, notes=more.notes)
        return found

    async def work(operations: Operations) -> None:
        found = await question(operations)
        if pattern != "*" and not (found.repositories or found.images):
            found.notes.append("A full name begins with its namespace, as in docker.io/library/alpine.")
        call.print(_sorted(found, _ORDERS[order]), listing_tables)

    call.run(work)


def _sorted(found: models.Listed, key: Callable[[Listing], float]) -> models.Listed:
    """The list in another order; what has the same key stays in the order of names."""
    return msgspec.structs.replace(
        found, repositories=sorted(found.repositories, key=key), images=sorted(found.images, key=key)
    )


def listing_tables(found: models.Listed, now: float) -> Sequence[Table]:
    table = _images(found.images, now) if found.images else _repositories(found.repositories, now)
    table.notes += found.notes
    return [table]


def _repositories(rows: Sequence[models.RepositoryRow], now: float) -> Table:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("TAGS", right=True, drop=1),
        Column("MANIFESTS", right=True, drop=3),
        Column("STORED", right=True),
        Column("LAST USED", drop=2),
    )
    table = Table(columns, empty="nothing that is stored matches")
    for each in rows:
        used = format_past(each.last_used, now)
        table.add(each.repository, _number(each.tags), _number(each.manifests), format_size(each.bytes), used)
    uncounted = sum(each.bytes is None for each in rows)
    if len(rows) > 1 and not uncounted:
        counts = (
            plural(len({each.repository for each in rows}), "repository", "repositories"),
            plural(sum(each.tags or 0 for each in rows), "tag"),
            plural(sum(each.manifests or 0 for each in rows), "manifest"),
        )
        table.notes.append(f"{', '.join(counts)}, {_sum(each.bytes or 0 for each in rows)}")
    if uncounted:
        table.notes.append(
            f"the content of {plural(uncounted, 'repository', 'repositories')} is being counted"
        )
    return by_replica(table, rows)


def _number(number: int | None) -> str:
    return "?" if number is None else str(number)


def _sum(sizes: Iterable[int]) -> str:
    return f"{format_size(sum(sizes))}; what several share counts for each of them"


def _images(rows: Sequence[models.ImageRow], now: float) -> Table:
    columns = (
        Column("REFERENCE", whole=True),
        Column("DIGEST", digests=True, drop=6),
        Column("STORED", right=True),
        Column("TOTAL SIZE", right=True, drop=4),
        Column("PLATFORMS", drop=3),
        Column("LAST USED", drop=1),
        Column("USES", right=True, drop=5),
        Column("FRESH", drop=2),
        Column("PINNED", drop=7),
    )
    table = Table(columns)
    for each in rows:
        table.add(
            each.repository if each.tag is None else written(each.repository, each.tag),
            each.digest,
            format_size(each.bytes_held),
            format_size(each.bytes_whole),
            _platforms(each),
            format_past(each.last_used, now),
            str(each.uses),
            freshness(each.fresh_until, now),
            "pinned" if each.pinned else "",
        )
    if len(rows) > 1:
        images = len({(each.repository, each.tag or each.digest) for each in rows})
        table.notes.append(f"{plural(images, 'image')}, {_sum(each.bytes_held for each in rows)}")
    return by_replica(table, rows)


def _platforms(image: models.ImageRow) -> str:
    """The platforms of which at least a part is stored."""
    present = [each for each in image.platforms if each.complete or each.bytes_held]
    names = [f"{each.platform or '?'}{'' if each.complete else ' (partial)'}" for each in present]
    if len(present) < len(image.platforms):
        names.append(f"({len(present)} of {len(image.platforms)})")
    return " ".join(names)


@command()
@click.argument("reference", metavar="REF", shell_complete=references)
@common
def show(call: CommandContext, reference: str) -> None:
    """Show the content of an image.

    Prints the manifests and blobs that REF names, and which of them are stored.
    """
    call.ask(lambda operations: operations.show(reference), tree_tables)


def tree_tables(found: models.ImageTree, now: float) -> Sequence[Table]:
    columns = (
        Column("DIGEST", digests=True),
        Column("ROLE", drop=2),
        Column("SIZE", right=True),
        Column("STORED", drop=1),
        Column("PLATFORM", drop=3),
        Column("TYPE", drop=4),
    )
    table = Table(columns, title=written(found.repository, found.reference))
    drawn = [each for top in (found.node, *found.referrers) for each in _drawn(top, "", "")]
    apart = any(node.replicas for _, node in drawn)
    if apart:
        table.columns = [*columns, Column("REPLICAS")]
    for branch, node in drawn:
        table.add(
            branch + node.digest,
            node.role,
            format_size(node.size),
            "yes" if node.present else "no",
            node.platform or "",
            node.artifact_type or node.media_type,
            *([" ".join(map(replica_name, node.replicas)) or (ALL if node.present else "")] if apart else []),
        )
    uses = found.uses
    table.notes.append(
        f"used {plural(uses.count, 'time')}, last {format_past(uses.last, now)}" if uses else "never used"
    )
    if found.cut:
        table.notes.append("names more manifests and blobs than are shown")
    table.notes += [f"pinned by {each}" for each in found.pins]
    table.notes += [f"at {replica_name(each.replica)} it is {each.digest}" for each in found.elsewhere]
    if not found.moves:
        return [table]
    moves = Table((Column("MOVED"), Column("FROM", digests=True), Column("TO", digests=True)))
    for move in reversed(found.moves):
        moves.add(format_past(move.at, now), move.old, move.new)
    return [table, moves]


def _drawn(node: models.ImageNode, branch: str, below: str) -> Iterator[tuple[str, models.ImageNode]]:
    """The node and all below it, each with the lines before it: `branch`, and `below` for its children."""
    yield branch, node
    for number, child in enumerate(node.children, 1):
        last = number == len(node.children)
        yield from _drawn(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


COMMANDS = (ls, show)
