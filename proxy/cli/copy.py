"""The command that copies images from registries to another one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from proxy.admin.api.client import OperationFailed
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import CommandContext, option_type, quiet, without_server
from proxy.cli.help import command
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_size, plural
from proxy.config.values import parse_count, parse_platform
from proxy.transfer import results
from storage.oci import Digest


def _endpoint_options(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options for one of the two registries."""
    variable = f"ENTREPOT_{name.upper()}_CREDENTIALS"
    options = (
        click.option(
            f"--{name}-credentials",
            metavar="USER:PASSWORD",
            envvar=variable,
            help=f"Credentials for the {name}. Better set ${variable}: other users see options.",
        ),
        click.option(f"--{name}-insecure", is_flag=True, help=f"Accept any certificate of the {name}."),
        click.option(
            f"--{name}-plain-http",
            is_flag=True,
            help=f"Connect to the {name} without TLS, as is the default for this machine.",
        ),
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            function = option(function)
        return function

    return decorate


@command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("destination")
@click.option("--all-tags", is_flag=True, help="Copy all tags of each SOURCE that names none.")
@click.option(
    "--platform",
    "platforms",
    callback=option_type(parse_platform),
    multiple=True,
    metavar="OS/ARCH",
    help="Copy only the image for this platform. If repeated, copy the index with these images.",
)
@click.option("--no-referrers", is_flag=True, help="Leave out signatures, SBOMs and other referrers.")
@click.option("--dry-run", is_flag=True, help="Show what would be copied, and copy nothing.")
@click.option(
    "--transfers",
    default=4,
    show_default=True,
    callback=option_type(parse_count),
    help="How many blobs to transfer at once.",
)
@click.option(
    "--auth-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Docker's config.json or podman's auth.json. By default all files that these programs use.",
)
@_endpoint_options("destination")
@_endpoint_options("source")
@without_server
def copy(call: CommandContext, sources: tuple[str, ...], destination: str, **options: Any) -> None:
    """Copy images between registries.

    Copies only what is missing at the destination. SOURCE is REGISTRY/REPOSITORY:TAG, or a glob such as
    REGISTRY/REPOSITORY:* or REGISTRY/TEAM/*:1.*. For several repositories DESTINATION ends with /, and
    their names are appended to it; for TEAM/* that is the part that * matches. Run it again to continue
    after an interruption.
    """
    from proxy.transfer.copy_job import CopyEndpoint, CopyJob
    from proxy.transfer.copy_sources import check, parse_source

    endpoints = {}
    try:
        for name in ("source", "destination"):
            values = (options.pop(f"{name}_{key}") for key in ("plain_http", "insecure", "credentials"))
            endpoints[name] = CopyEndpoint(*values)
            if ":" not in (endpoints[name].credentials or ":"):
                raise ValueError(f"--{name}-credentials: expected user:password")
        copy_sources = [parse_source(each, endpoints["source"].plain_http) for each in sources]
        target = parse_source(destination, endpoints["destination"].plain_http)
        check(copy_sources, target, options["all_tags"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    async def work() -> None:
        quiet(level="error")
        with closing(SilentListener() if call.json else ProgressBars()) as listener:
            found = await CopyJob(copy_sources, target, endpoints, listener, **options).run()
        call.print(found, copy_tables)
        if failed := sum(each.outcome == "failed" for each in found.images):
            message = f"{failed} of {plural(len(found.images), 'image')} could not be copied"
            raise OperationFailed(message, "NOT_COPIED")

    call.alone(work)


def copy_tables(found: results.Copied, now: float) -> list[Table]:
    columns = (
        Column("SOURCE", whole=True),
        Column("DESTINATION", whole=True),
        Column("DIGEST", digests=True, drop=1),
        Column("RESULT", state=True),
        Column("ERROR", fault=True),
    )
    table = Table(columns, empty="nothing matches")
    for each in found.images:
        outcome = "would be copied" if found.dry_run and each.outcome == "copied" else each.outcome
        table.add(each.source, each.destination, each.digest or "", outcome, each.error or "")
    would = "would be copied" if found.dry_run else "copied"
    table.notes.append(
        f"{plural(found.manifests, 'manifest')} and {plural(found.blobs, 'blob')}"
        f" of {format_size(found.bytes)} {would},"
        f" {found.mounted} mounted, {found.present} already present, {plural(found.tags, 'tag')} set;"
        f" {found.seconds:.1f} s"
    )
    return [table]


class SilentListener:
    """A ProgressListener that shows nothing, for --json."""

    def moved(self, digest: Digest, done: int, whole: int) -> None: ...

    def ended(self, digest: Digest) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class ProgressBars:
    """A ProgressListener that shows a bar for each blob on a terminal, elsewhere lines."""

    def __init__(self) -> None:
        self._progress = ProgressDisplay(sys.stderr)

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        self._progress.show(digest, done, whole, f"{format_size(done)} of {format_size(whole)}")

    def ended(self, digest: Digest) -> None:
        self._progress.drop(digest)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def close(self) -> None:
        self._progress.close()


COMMANDS = (copy,)
