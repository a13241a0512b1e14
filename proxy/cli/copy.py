"""The commands that bring content: `copy` from registry to registry, `import` from what lies on this machine.

What is large (aiohttp, rich) is imported where it is needed: see commands.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from proxy.admin.api.client import Failed
from proxy.cli.console import Column, Progress, Table
from proxy.cli.context import CommandContext, option_type, quiet, without_server
from proxy.config.quantities import format_size, plural
from proxy.config.values import parse_count, parse_platform
from proxy.transfer import results
from storage.oci import Digest

SHOWN = 100  # rows of what was damaged, for people


def _end(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options for one of two registries."""
    variable = f"ENTREPOT_{name.upper()}_CREDENTIALS"
    options = (
        click.option(
            f"--{name}-credentials",
            metavar="USER:PASSWORD",
            envvar=variable,
            help=f"Better by ${variable}, since others see a command's options; else --auth-file.",
        ),
        click.option(f"--{name}-insecure", is_flag=True, help="Take any certificate of it."),
        click.option(
            f"--{name}-plain-http", is_flag=True, help="Without TLS, as it is done on this machine anyhow."
        ),
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            function = option(function)
        return function

    return decorate


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("destination")
@click.option("--all-tags", is_flag=True, help="Of each SOURCE that names none.")
@click.option(
    "--platform",
    "platforms",
    callback=option_type(parse_platform),
    multiple=True,
    metavar="OS/ARCH",
    help="Of an index only this image, under the index's tag. Several: the index, with only these.",
)
@click.option("--no-referrers", is_flag=True, help="Without signatures and whatever else refers to it.")
@click.option("--dry-run", is_flag=True, help="Say what would be copied, and let it be.")
@click.option(
    "--transfers",
    default=4,
    show_default=True,
    callback=option_type(parse_count),
    help="Blobs under way at once.",
)
@click.option(
    "--auth-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Docker's config.json or podman's auth.json; else where those look for them.",
)
@_end("destination")
@_end("source")
@without_server
def copy(call: CommandContext, sources: tuple[str, ...], destination: str, **options: Any) -> None:
    """Copy images from one registry to another, only what is missing there.

    SOURCE is REGISTRY/REPOSITORY:TAG, or a glob such as REGISTRY/REPOSITORY:* or REGISTRY/TEAM/*:1.*. For
    several repositories DESTINATION ends with /, and their names are put behind it; of TEAM/* that is what *
    stands for. Called again, it goes on where it was cut.
    """
    from proxy.transfer.copy_job import CopyJob, Endpoint
    from proxy.transfer.copy_sources import check, parse_source

    ends = {}
    try:
        for name in ("source", "destination"):
            given = (options.pop(f"{name}_{key}") for key in ("plain_http", "insecure", "credentials"))
            ends[name] = Endpoint(*given)
            if ":" not in (ends[name].credentials or ":"):
                raise ValueError(f"--{name}-credentials: expected user:password")
        places = [parse_source(each, ends["source"].plain_http) for each in sources]
        target = parse_source(destination, ends["destination"].plain_http)
        check(places, target, options["all_tags"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    async def work() -> None:
        quiet(level="error")
        with closing(_Silence() if call.json else _Lines()) as listener:
            found = await CopyJob(places, target, ends, listener, **options).run()
        call.print(found, copied)
        if failed := sum(each.outcome == "failed" for each in found.images):
            told = f"{failed} of {plural(len(found.images), 'image')} could not be copied"
            raise Failed(told, "NOT_COPIED")

    call.alone(work)


def take_over(
    call: CommandContext, directory: Path, namespace: str | None, match: str, dry_run: bool
) -> None:
    """What another registry holds on this machine's disk: `import --from-registry-dir`."""

    async def work() -> None:
        from proxy.cli import migrate

        found = await migrate.migrate(
            call.path, directory, namespace, match, dry_run=dry_run, quietly=call.json
        )
        call.print(found, imported)
        if found.damaged:
            raise Failed(f"{len(found.damaged)} damaged or missing; all else was taken", "DAMAGED")

    call.alone(work)


def copied(found: results.Copied, now: float) -> list[Table]:
    """For people."""
    columns = (
        Column("SOURCE", whole=True),
        Column("DESTINATION", whole=True),
        Column("DIGEST", digests=True),
        Column("RESULT"),
    )
    table = Table(columns, empty="nothing matches")
    for each in found.images:
        outcome = "would be copied" if found.dry_run and each.outcome == "copied" else each.outcome
        table.add(each.source, each.destination, each.digest or "", each.error or outcome)
    would = "would be copied" if found.dry_run else "copied"
    table.notes.append(
        f"{plural(found.manifests, 'manifest')} and {plural(found.blobs, 'blob')}"
        f" of {format_size(found.bytes)} {would},"
        f" {found.mounted} mounted, {found.present} there already, {plural(found.tags, 'tag')} set;"
        f" {found.seconds:.1f} s"
    )
    return [table]


def imported(found: results.Migrated, now: float) -> list[Table]:
    """For people."""
    columns = (Column("REPOSITORY", whole=True), Column("WHAT", digests=True), Column("WHY"))
    tables = []
    for title, rows in (("damaged or missing:", found.damaged), ("left as they are here:", found.kept)):
        if rows:
            table = Table(columns, title=title)
            for each in rows[:SHOWN]:
                table.add(each.repository, each.what, each.why)
            if len(rows) > SHOWN:
                table.notes.append(f"and {len(rows) - SHOWN} more; --json has all")
            tables.append(table)
    would = "would be taken" if found.dry_run else "taken"
    linked = "" if found.dry_run else f" ({found.linked} of them linked)"
    tables.append(
        Table(
            (),
            f"{plural(found.repositories, 'repository', 'repositories')}, {plural(found.tags, 'tag')},"
            f" {plural(found.manifests, 'manifest')} and {plural(found.blobs, 'blob')}{linked} of"
            f" {format_size(found.bytes)} {would} into {found.namespace};"
            f" {plural(found.present, 'manifest')} there already; {found.seconds:.1f} s",
        )
    )
    return tables


COMMANDS = (copy,)


class _Silence:
    """Tells nothing: who reads the answer is a program."""

    def moved(self, digest: Digest, done: int, whole: int) -> None: ...

    def ended(self, digest: Digest) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines(_Silence):
    """A bar for each blob on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(sys.stderr)

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        self._progress.show(digest, done, whole, f"{format_size(done)} of {format_size(whole)}")

    def ended(self, digest: Digest) -> None:
        self._progress.drop(digest)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def close(self) -> None:
        self._progress.close()
