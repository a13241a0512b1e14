"""The commands that list what is stored: ls, show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from proxy.admin import models
from proxy.admin.operations import LARGEST_PAGE, Operations
from proxy.cli.console import Column, Table, freshness
from proxy.cli.context import CommandContext, common
from proxy.config.quantities import format_size, format_time, plural
from storage.names import written

PAGE = LARGEST_PAGE


@click.command()
@click.argument("pattern", default="*")
@click.option("--tags", is_flag=True, help="List tags instead of repositories.")
@common
def ls(call: CommandContext, pattern: str, tags: bool) -> None:
    """List stored repositories or tags.

    PATTERN is a glob over full names. With @ in it, --tags lists manifests by digest.
    """

    async def question(operations: Operations) -> models.Listed:
        if not tags:
            return await operations.repositories(pattern)
        found = await operations.images(pattern, PAGE)
        while found.next is not None:
            more = await operations.images(pattern, PAGE, found.next)
            found = models.Listed(images=found.images + more.images, next=more.next, notes=more.notes)
        return found

    call.ask(question, listing_tables)


def listing_tables(found: models.Listed, now: float) -> Sequence[Table]:
    table = _images(found.images, now) if found.images else _repositories(found.repositories)
    table.notes += found.notes
    return [table]


def _repositories(rows: Sequence[models.RepositoryRow]) -> Table:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("TAGS", right=True),
        Column("MANIFESTS", right=True),
        Column("STORED", right=True),
    )
    table = Table(columns, empty="nothing that is stored matches")
    for each in rows:
        table.add(each.repository, str(each.tags), str(each.manifests), format_size(each.bytes))
    return table


def _images(rows: Sequence[models.ImageRow], now: float) -> Table:
    columns = (
        Column("REFERENCE", whole=True),
        Column("DIGEST", digests=True),
        Column("STORED", right=True),
        Column("TOTAL SIZE", right=True),
        Column("PLATFORMS"),
        Column("LAST USED"),
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
            format_size(each.bytes_whole),
            _platforms(each),
            format_time(each.last_used, now),
            str(each.uses),
            freshness(each.fresh_until, now),
            "pinned" if each.pinned else "",
        )
    return table


def _platforms(image: models.ImageRow) -> str:
    """The platforms of which at least a part is stored."""
    present = [each for each in image.platforms if each.complete or each.bytes_held]
    names = [f"{each.platform or '?'}{'' if each.complete else ' (partial)'}" for each in present]
    if len(present) < len(image.platforms):
        names.append(f"({len(present)} of {len(image.platforms)})")
    return " ".join(names)


@click.command()
@click.argument("reference", metavar="REF")
@common
def show(call: CommandContext, reference: str) -> None:
    """Show the content of an image.

    Prints the manifests and blobs that REF names, and which of them are stored.
    """
    call.ask(lambda operations: operations.show(reference), tree_tables)


def tree_tables(found: models.ImageTree, now: float) -> Sequence[Table]:
    columns = (
        Column("DIGEST", digests=True, whole=True),
        Column("ROLE"),
        Column("SIZE", right=True),
        Column("STORED"),
        Column("PLATFORM"),
        Column("TYPE"),
    )
    table = Table(columns, title=written(found.repository, found.reference))
    for top in (found.node, *found.referrers):
        for branch, node in _drawn(top, "", ""):
            table.add(
                branch + node.digest,
                node.role,
                format_size(node.size),
                "yes" if node.present else "no",
                node.platform or "",
                node.artifact_type or node.media_type,
            )
    uses = found.uses
    table.notes.append(
        f"used {plural(uses.count, 'time')}, last {format_time(uses.last, now)}" if uses else "never used"
    )
    table.notes += [f"pinned by {each}" for each in found.pins]
    if not found.moves:
        return [table]
    moves = Table((Column("MOVED"), Column("FROM", digests=True), Column("TO", digests=True)))
    for move in reversed(found.moves):
        moves.add(format_time(move.at, now), move.old, move.new)
    return [table, moves]


def _drawn(node: models.ImageNode, branch: str, below: str) -> Iterator[tuple[str, models.ImageNode]]:
    """The node and all below it, each with the lines before it: `branch`, and `below` for its children."""
    yield branch, node
    for number, child in enumerate(node.children, 1):
        last = number == len(node.children)
        yield from _drawn(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


COMMANDS = (ls, show)
