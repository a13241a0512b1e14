"""The commands that prepare for an upstream outage and rehearse it: warm, ready, drill."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, TypeVar

import click
import msgspec

from proxy.admin.api.client import OperationFailed
from proxy.admin.image_files import ImageMentions, Unreadable, find_images
from proxy.admin.operations import Operations
from proxy.admin.reports import Drilling, ReadyRow, WarmRow
from proxy.cli import completion
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import PAUSE, PLATFORMS, CommandContext, common, option_type
from proxy.cli.fills import show_fills
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table, no_image
from proxy.config.quantities import format_duration, format_past, format_size, parse_timeout, plural
from storage.concurrency import for_each
from storage.names import written

Row = TypeVar("Row", WarmRow, ReadyRow)

IMAGES = "images"  # the part of the progress that counts all images
DEFAULT_JOBS = 4  # images at once; a schedule has its own: proxy.admin.warm
MOST_JOBS = 64
PAGE = 500  # references in one request

_REGISTRY = click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="HOST[:PORT]",
    help="An address of this server that prefixes names in the files. Can be repeated.",
)
_NO_REFERRERS = click.option(
    "--no-referrers", is_flag=True, help="Leave out signatures, SBOMs and other referrers."
)
_JOBS = click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    default=DEFAULT_JOBS,
    show_default=True,
    help="How many images to fetch at once.",
)


def _mentions(files: Sequence[str], registries: Sequence[str], *, plain: bool = False) -> ImageMentions:
    try:
        return find_images(files, sys.stdin, os.environ, registries, plain=plain)
    except Unreadable as error:
        raise OperationFailed(str(error), "FILE_INVALID", usage=True) from error


# warm


@command()
@click.argument("references", nargs=-1, metavar="REF...", shell_complete=completion.references)
@click.option(
    "--list",
    "lists",
    multiple=True,
    metavar="FILE",
    help="A file with one reference per line; - is standard input.",
)
@click.option(
    "--from",
    "files",
    multiple=True,
    metavar="FILE",
    help="A compose file, Kubernetes manifests or a list. Can be repeated.",
)
@PLATFORMS
@_NO_REFERRERS
@_JOBS
@_REGISTRY
@common
def warm(
    call: CommandContext,
    references: tuple[str, ...],
    lists: tuple[str, ...],
    files: tuple[str, ...],
    platforms: tuple[str, ...],
    no_referrers: bool,
    jobs: int,
    registries: tuple[str, ...],
) -> None:
    """Fetch images before clients need them.

    Fetches what is missing of each REF and of the images that files name. Run it again to continue after an
    interruption. The exit status is 0 only if all images are complete.
    """

    async def work(operations: Operations) -> None:
        named = _mentions(lists, registries, plain=True).references + _mentions(files, registries).references
        images = list(dict.fromkeys([*references, *named]))
        if not images:
            raise OperationFailed(
                "no image is named: give REF, --list or --from", "NOTHING_NAMED", usage=True
            )
        rows = await _warm(call, operations, images, platforms, not no_referrers, jobs)
        call.print(rows, warm_tables)
        if missing := [each for each in rows if not each.here]:
            raise OperationFailed(f"{len(missing)} of {len(rows)} images are not complete", "INCOMPLETE")

    call.run(work, make=True)


async def _warm(
    call: CommandContext,
    operations: Operations,
    images: Sequence[str],
    platforms: Sequence[str],
    referrers: bool,
    jobs: int,
) -> list[WarmRow]:
    """Fetch the images, `jobs` at once; one row each, in their order."""
    found: dict[str, WarmRow] = {}

    async def one(reference: str) -> None:
        found[reference] = await operations.warm(reference, platforms, referrers)

    working = asyncio.ensure_future(for_each(one, images, jobs))
    try:
        if not call.json:
            with closing(ProgressDisplay(sys.stderr)) as progress:
                while not (await asyncio.wait({working}, timeout=PAUSE))[0]:
                    _show_count(progress, found.values(), len(images))
                    show_fills(await operations.fills(), progress, IMAGES)
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    return _without_duplicates([found[each] for each in images])


def _without_duplicates(rows: list[Row]) -> list[Row]:
    """Keep one row for each image, which may have been named in several ways."""
    kept: dict[str, Row] = {}
    for each in rows:
        kept.setdefault(_name(each), each)
    return list(kept.values())


def _show_count(progress: ProgressDisplay, found: Iterable[WarmRow], total: int) -> None:
    rows = list(found)
    failed = sum(not each.here for each in rows)
    text = f"{len(rows)} of {total}, {failed} failed" if failed else f"{len(rows)} of {total}"
    progress.show(IMAGES, len(rows), total, text)


def warm_tables(found: Sequence[WarmRow], now: float) -> Sequence[Table]:
    columns = (
        Column("REFERENCE", whole=True),
        Column("COMPLETE", state=True),
        Column("MANIFESTS", right=True, drop=4),
        Column("REFERRERS", right=True, drop=5),
        Column("BLOBS", right=True, drop=3),
        Column("BLOBS FETCHED", right=True, drop=2),
        Column("BYTES FETCHED", right=True, drop=1),
        Column("ERROR", fault=True),
    )
    table = Table(columns)
    for each in found:
        table.add(
            _name(each),
            "yes" if each.here else "no",
            str(each.manifests),
            str(each.referrers),
            str(each.blobs),
            str(each.fetched),
            format_size(each.bytes),
            each.error or "",
        )
    table.notes += [no_image(_name(each), each.lacking) for each in found if each.here and each.lacking]
    complete = sum(each.here for each in found)
    blobs = plural(sum(each.fetched for each in found), "blob")
    fetched = f"{blobs}, {format_size(sum(each.bytes for each in found))}"
    table.notes.append(f"{complete} of {plural(len(found), 'image')} complete; fetched {fetched}")
    return [table]


def _name(row: WarmRow | ReadyRow) -> str:
    return written(row.repository, row.reference) if row.repository else row.asked  # not a reference


# ready


@command()
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@PLATFORMS
@_NO_REFERRERS
@click.option("--fetch", is_flag=True, help="Fetch what is missing, then check again.")
@_JOBS
@_REGISTRY
@common
def ready(
    call: CommandContext,
    files: tuple[str, ...],
    platforms: tuple[str, ...],
    no_referrers: bool,
    fetch: bool,
    jobs: int,
    registries: tuple[str, ...],
) -> None:
    """Check which images can be pulled offline.

    FILES are compose files, Kubernetes manifests or lists of references; - is standard input. No upstream is
    asked, except with --fetch. The exit status is 0 only if all images are complete.
    """

    async def work(operations: Operations) -> None:
        named = _mentions(files, registries)
        images = named.references
        if not images:
            raise OperationFailed(f"no image is named in {', '.join(files)}", "NOTHING_NAMED")
        rows = await _check(operations, images, platforms, not no_referrers)
        if fetch and (incomplete := [each.asked for each in rows if each.state != "complete"]):
            fetched = await _warm(call, operations, incomplete, platforms, not no_referrers, jobs)
            failed = {each.asked: each.error for each in fetched if each.error}
            rows = [
                msgspec.structs.replace(each, error=failed.get(each.asked) or each.error)
                if each.state != "complete"
                else each
                for each in await _check(operations, images, platforms, not no_referrers)
            ]
        places = {each.reference: each.place for each in reversed(named.mentions)}
        call.print(rows, lambda found, now: ready_tables(found, places, named.built))
        if incomplete := [each.asked for each in rows if each.state != "complete"]:
            raise OperationFailed(f"{len(incomplete)} of {len(rows)} images are not complete", "INCOMPLETE")

    call.run(work, make=fetch)


async def _check(
    operations: Operations, images: Sequence[str], platforms: Sequence[str], referrers: bool
) -> list[ReadyRow]:
    rows: list[ReadyRow] = []
    for start in range(0, len(images), PAGE):
        rows += await operations.ready(images[start : start + PAGE], platforms, referrers)
    return _without_duplicates(rows)


def ready_tables(found: Sequence[ReadyRow], places: dict[str, str], built: Sequence[str]) -> Sequence[Table]:
    """The state of each image, and what is missing of those that are not complete."""
    columns = (
        Column("REFERENCE", whole=True),
        Column("STATE", state=True),
        Column("REFERRERS", right=True, drop=3),
        Column("MISSING", right=True, drop=1),
        Column("NAMED IN", drop=2),
        Column("PROBLEM", fault=True),
    )
    table = Table(columns)
    missing = Table(
        (
            Column("REFERENCE", whole=True),
            Column("MISSING DIGEST", digests=True),
            Column("KIND", drop=1),
            Column("SIZE", right=True),
            Column("PLATFORMS", drop=2),
        )
    )
    for each in found:
        problems = [f"no image for {platform}" for platform in each.lacking]
        table.add(
            _name(each),
            each.state,
            f"{each.referrers} of {each.referrers_known}" if each.referrers_known else "-",
            str(len(each.missing)) if each.missing else "",
            places.get(each.asked, ""),
            ", ".join([*problems, *([each.error] if each.error else [])]),
        )
        for row in each.missing:
            missing.add(_name(each), row.digest, row.kind, format_size(row.size), " ".join(row.platforms))
    complete = sum(each.state == "complete" for each in found)
    table.notes.append(f"{complete} of {plural(len(found), 'image')} complete")
    table.notes += [f"{each}: built where it runs, so it is not pulled" for each in built]
    return [table, missing] if missing.rows else [table]


# drill


def _time(text: object) -> float:
    return parse_timeout(text)


@command()
@click.argument("time", callback=option_type(_time), metavar="DURATION")
@click.option(
    "--namespace",
    "namespaces",
    shell_complete=completion.namespaces,
    multiple=True,
    metavar="NAME",
    help="Cut off only this namespace. Can be repeated.",
)
@common
def drill(call: CommandContext, time: float, namespaces: tuple[str, ...]) -> None:
    """Rehearse an upstream outage.

    Cuts a running server off from its upstreams for DURATION, and lists the requests that failed. Ctrl-C
    ends the drill early; if this command is killed, the drill still ends in time. The exit status is 0 if
    nothing failed.
    """

    async def work(operations: Operations) -> None:
        if not operations.remote:
            raise OperationFailed("no server is running: there is nothing to cut off", "NOT_RUNNING")
        found = await operations.begin_drill(time, namespaces)
        try:
            with closing(ProgressDisplay(sys.stderr)) as progress:
                while found.running:
                    if not call.json:
                        _show_drill(found, progress)
                    await asyncio.sleep(min(PAUSE, found.left))
                    found = await operations.drill()
        except asyncio.CancelledError:  # by Ctrl-C, which ends the drill and not the command
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            found = await operations.end_drill()
        call.print(found, drill_tables)
        if found.missed:
            raise OperationFailed(f"{plural(len(found.missed), 'request')} could not be served", "MISSED")

    call.run(work)


def _show_drill(found: Drilling, progress: ProgressDisplay) -> None:
    text = f"{format_duration(found.left)} left, {plural(len(found.missed), 'request')} failed"
    progress.show("drill", int(found.seconds - found.left), int(found.seconds), text)


def drill_tables(found: Drilling, now: float) -> Sequence[Table]:
    columns = (
        Column("MISSING", whole=True),
        Column("KIND", drop=2),
        Column("CLIENT", drop=1),
        Column("REQUESTS", right=True),
        Column("LAST REQUEST", right=True, drop=3),
    )
    table = Table(columns, empty="no request failed")
    for each in found.missed:
        table.add(
            written(each.repository, each.reference) if each.reference else each.repository,
            each.kind,
            each.client,
            str(each.count),
            format_past(each.last, now),
        )
    by_replica(table, found.missed)
    if len(found.missed) > 1:
        table.notes.append(f"{plural(sum(each.count for each in found.missed), 'request')} failed")
    if found.untold:
        table.notes.append(f"and {plural(found.untold, 'request')} more")
    return [table]


COMMANDS: Sequence[Any] = (warm, ready, drill)
