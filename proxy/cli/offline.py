"""The commands that prepare for upstreams being away, and prove it: warm, ready, drill.

As those of commands.py: through a running server or on its directory, and light to import.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, TypeVar

import click
import msgspec

from proxy.admin.api.client import Failed
from proxy.admin.image_files import ImageMentions, Unreadable, look
from proxy.admin.models import Drilling, ReadyRow, WarmRow
from proxy.admin.operations import Operations
from proxy.cli import tables
from proxy.cli.console import Column, Progress, Table
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.operations import PAUSE, PLATFORMS
from proxy.config.quantities import format_duration, format_size, format_time, parse_timeout, plural
from storage.concurrency import for_each
from storage.names import written

Row = TypeVar("Row", WarmRow, ReadyRow)

IMAGES = "images"  # the part of the progress that is all of them
JOBS = 4
MOST_JOBS = 64
PAGE = 500  # references that are judged by one request

_REGISTRY = click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="HOST[:PORT]",
    help="An address of this cache that stands before names in the files; may be repeated.",
)
_NO_REFERRERS = click.option("--no-referrers", is_flag=True, help="Leave out signatures, SBOMs and the like.")
_JOBS = click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS), default=JOBS, show_default=True, help="Images at once."
)


def _look(files: Sequence[str], registries: Sequence[str], *, plain: bool = False) -> ImageMentions:
    try:
        return look(files, sys.stdin, os.environ, registries, plain=plain)
    except Unreadable as error:
        raise Failed(str(error), "FILE_INVALID", usage=True) from error


# warm


@click.command()
@click.argument("references", nargs=-1, metavar="REF...")
@click.option(
    "--list", "lists", multiple=True, metavar="FILE", help="References, one a line; - is standard input."
)
@click.option(
    "--from", "files", multiple=True, metavar="FILE", help="What a compose file, manifests or a list name."
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
    """Fetch all of each REF that is not here, and of what files name, before anybody asks for it.

    What was interrupted is gone on with. The exit status is 0 only if all is here then.
    """

    async def work(operations: Operations) -> None:
        named = _look(lists, registries, plain=True).references + _look(files, registries).references
        wanted = list(dict.fromkeys([*references, *named]))
        if not wanted:
            raise Failed("no image is named: give REF, --list or --from", "NOTHING_NAMED", usage=True)
        rows = await _warm(call, operations, wanted, platforms, not no_referrers, jobs)
        call.print(rows, warmed)
        if lacking := [each for each in rows if not each.here]:
            raise Failed(f"{len(lacking)} of {len(rows)} are not here", "INCOMPLETE")

    call.run(work, make=True)


async def _warm(
    call: CommandContext,
    operations: Operations,
    wanted: Sequence[str],
    platforms: Sequence[str],
    referrers: bool,
    jobs: int,
) -> list[WarmRow]:
    """In the order of `wanted`."""
    found: dict[str, WarmRow] = {}

    async def one(reference: str) -> None:
        found[reference] = await operations.warm(reference, platforms, referrers)

    working = asyncio.ensure_future(for_each(one, wanted, jobs))
    try:
        if not call.json:
            with closing(Progress(sys.stderr)) as progress:
                while not (await asyncio.wait({working}, timeout=PAUSE))[0]:
                    _progress(progress, found.values(), len(wanted))
                    tables.progress(await operations.fills(), progress, IMAGES)
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    return _once([found[each] for each in wanted])


def _once(rows: list[Row]) -> list[Row]:
    """Each image once, though it may have been named in several ways."""
    kept: dict[str, Row] = {}
    for each in rows:
        kept.setdefault(_name(each), each)
    return list(kept.values())


def _progress(shown: Progress, found: Iterable[WarmRow], whole: int) -> None:
    rows = list(found)
    failed = sum(not each.here for each in rows)
    said = f"{len(rows)} of {whole}, {failed} failed" if failed else f"{len(rows)} of {whole}"
    shown.show(IMAGES, len(rows), whole, said)


def warmed(found: Sequence[WarmRow], now: float) -> Sequence[Table]:
    columns = (
        Column("REFERENCE", whole=True),
        Column("HERE"),
        Column("MANIFESTS", right=True),
        Column("REFERRERS", right=True),
        Column("BLOBS", right=True),
        Column("FETCHED", right=True),
        Column("BYTES", right=True),
        Column("NOTE"),
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
    here = sum(each.here for each in found)
    fetched = plural(sum(each.fetched for each in found), "blob")
    came = format_size(sum(each.bytes for each in found))
    table.notes.append(f"{here} of {plural(len(found), 'image')} here; fetched {fetched}, {came}")
    return [table]


def _name(row: WarmRow | ReadyRow) -> str:
    if not row.repository:  # it could not be read
        return row.asked
    return written(row.repository, row.reference)


# ready


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@PLATFORMS
@_NO_REFERRERS
@click.option("--fetch", is_flag=True, help="Fetch what is missing, then judge again.")
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
    """Prove that all images that FILES name can be pulled while no upstream answers.

    FILES are compose files, Kubernetes manifests, lists of references; - is standard input. Nobody is asked,
    unless with --fetch. The exit status is 0 only if each image is complete.
    """

    async def work(operations: Operations) -> None:
        named = _look(files, registries)
        wanted = named.references
        if not wanted:
            raise Failed(f"no image is named in {', '.join(files)}", "NOTHING_NAMED")
        rows = await _judge(operations, wanted, platforms, not no_referrers)
        if fetch and (lacking := [each.asked for each in rows if each.state != "complete"]):
            came = await _warm(call, operations, lacking, platforms, not no_referrers, jobs)
            failed = {each.asked: each.error for each in came if each.error}
            rows = [
                msgspec.structs.replace(each, error=failed.get(each.asked) or each.error)
                if each.state != "complete"
                else each
                for each in await _judge(operations, wanted, platforms, not no_referrers)
            ]
        places = {each.reference: each.place for each in reversed(named.mentions)}
        call.print(rows, lambda found, now: judged(found, places, named.built))
        if lacking := [each.asked for each in rows if each.state != "complete"]:
            raise Failed(f"{len(lacking)} of {len(rows)} are not complete", "INCOMPLETE")

    call.run(work, make=fetch)


async def _judge(
    operations: Operations, wanted: Sequence[str], platforms: Sequence[str], referrers: bool
) -> list[ReadyRow]:
    rows: list[ReadyRow] = []
    for start in range(0, len(wanted), PAGE):
        rows += await operations.ready(wanted[start : start + PAGE], platforms, referrers)
    return _once(rows)


def judged(found: Sequence[ReadyRow], places: dict[str, str], built: Sequence[str]) -> Sequence[Table]:
    """What each is, and of those that are not complete what is missing."""
    columns = (
        Column("REFERENCE", whole=True),
        Column("STATE"),
        Column("REFERRERS", right=True),
        Column("MISSING", right=True),
        Column("NAMED BY"),
        Column("NOTE"),
    )
    table = Table(columns)
    missing = Table(
        (
            Column("MISSING", whole=True),
            Column("DIGEST", digests=True, whole=True),
            Column("KIND"),
            Column("SIZE", right=True),
            Column("PLATFORMS"),
        )
    )
    for each in found:
        told = [f"nothing for {platform}" for platform in each.lacking]
        table.add(
            _name(each),
            each.state,
            f"{each.referrers} of {each.referrers_known}" if each.referrers_known else "-",
            str(len(each.missing)) if each.missing else "",
            places.get(each.asked, ""),
            ", ".join([*told, *([each.error] if each.error else [])]),
        )
        for row in each.missing:
            missing.add(_name(each), row.digest, row.kind, format_size(row.size), " ".join(row.platforms))
    complete = sum(each.state == "complete" for each in found)
    table.notes.append(f"{complete} of {plural(len(found), 'image')} complete")
    table.notes += [f"{each}: built where it runs, not pulled" for each in built]
    return [table, missing] if missing.rows else [table]


# drill


def _time(given: object) -> float:
    return parse_timeout(given)


@click.command()
@click.argument("time", callback=option_type(_time), metavar="DURATION")
@click.option("--namespace", "namespaces", multiple=True, help="Cut off only this; may be repeated.")
@common
def drill(call: CommandContext, time: float, namespaces: tuple[str, ...]) -> None:
    """Cut a running server off from upstreams for DURATION, and tell which requests failed for it.

    Ctrl-C ends it early; if this command dies, it ends in its time. The exit status is 0 if nothing failed.
    """

    async def work(operations: Operations) -> None:
        if not operations.remote:
            raise Failed("no server is running: nothing could be cut off", "NOT_RUNNING")
        found = await operations.begin_drill(time, namespaces)
        try:
            with closing(Progress(sys.stderr)) as progress:
                while found.running:
                    if not call.json:
                        _tell(found, progress)
                    await asyncio.sleep(min(PAUSE, found.left))
                    found = await operations.drill()
        except asyncio.CancelledError:  # by Ctrl-C: what it stands for is done here
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            found = await operations.end_drill()
        call.print(found, missed)
        if found.missed:
            raise Failed(f"{plural(len(found.missed), 'request')} could not be served", "MISSED")

    call.run(work)


def _tell(found: Drilling, shown: Progress) -> None:
    said = f"{format_duration(found.left)} left, {plural(len(found.missed), 'request')} failed"
    shown.show("drill", int(found.seconds - found.left), int(found.seconds), said)


def missed(found: Drilling, now: float) -> Sequence[Table]:
    columns = (
        Column("NOT HERE", whole=True),
        Column("KIND"),
        Column("CLIENT"),
        Column("REQUESTS", right=True),
        Column("LAST", right=True),
    )
    table = Table(columns, empty="nothing failed: all that was asked for is here")
    for each in found.missed:
        table.add(
            written(each.repository, each.reference) if each.reference else each.repository,
            each.kind,
            each.client,
            str(each.count),
            format_time(each.last, now),
        )
    if found.untold:
        table.notes.append(f"and {plural(found.untold, 'request')} more")
    return [table]


COMMANDS: Sequence[Any] = (warm, ready, drill)
