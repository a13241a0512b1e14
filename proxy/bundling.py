"""The commands that carry images to where no upstream can be asked, as files.

Both work on the directory, whether a server runs on it or not: the files and records are made for several
processes at once.  They have to run as the user that the server runs as.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy import tables
from proxy.adminclient import Failed
from proxy.calling import Call, local, read
from proxy.carrying import take_over
from proxy.console import Progress, size
from proxy.values import parse_platform, parse_timeout

if TYPE_CHECKING:
    from proxy.bundles import Tick
    from proxy.composition import Composition
    from storage.exporting import Sink

STANDARD = "-"  # as a path: standard input, or output


def _duration(given: object) -> object:
    parse_timeout(given)
    return given  # as it was: it is read where it is used


def _listed(path: Path) -> Iterator[str]:
    """The names in a list file: one a line; what follows a # is for people."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"--list {path}: {error}", usage=True) from None
    return (name for line in lines if (name := line.partition("#")[0].strip()))


@contextmanager
def _ticking(call: Call, what: str) -> Iterator[Tick]:
    """Shows how far it is; threads may call it."""
    with closing(Progress(sys.stderr)) as progress:

        def tick(done: int, whole: int) -> None:
            if not call.json:
                progress.show(what, done, whole, f"{size(done)} of {size(whole)}")

        yield tick


_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("names", nargs=-1, metavar="[REF|GLOB]...")
@click.option("--list", "lists", type=_FILE, multiple=True, metavar="FILE", help="Names, one a line.")
@click.option(
    "--used-within",
    callback=read(_duration),
    metavar="DURATION",
    help="Of the names, or of all, only what was pulled in this time.",
)
@click.option(
    "--platform",
    "platforms",
    callback=read(parse_platform),
    multiple=True,
    metavar="OS/ARCH",
    help="Only this of an index; may be repeated. Else all that is here.",
)
@click.option("--no-referrers", is_flag=True, help="Without signatures, SBOMs and what else refers to it.")
@click.option(
    "--since",
    type=_FILE,
    multiple=True,
    metavar="BUNDLE",
    help="Only what this earlier bundle lacks; its entrepot.json will do. May be repeated.",
)
@click.option("--skip-incomplete", is_flag=True, help="Leave out what is not here as a whole.")
@click.option("--sign-key", type=_FILE, metavar="FILE", help="Sign it: a private Ed25519 key in PEM.")
@local
def export(
    call: Call,
    bundle: str,
    names: tuple[str, ...],
    lists: tuple[Path, ...],
    used_within: str | None,
    platforms: tuple[str, ...],
    no_referrers: bool,
    since: tuple[Path, ...],
    skip_incomplete: bool,
    sign_key: Path | None,
) -> None:
    """Write what is stored to BUNDLE, an OCI image layout: a tar if it ends in .tar, else a directory.

    With - it is a tar on standard output. What NAMES mean must be here as a whole; nobody is asked.
    """

    async def work(composition: Composition) -> None:
        from proxy.bundles import Bundles, Selection

        wanted = Selection(
            names=[*names, *(name for path in lists for name in _listed(path))],
            used_within=used_within,
            platforms=platforms,
            referrers=not no_referrers,
            since=since,
            skip_incomplete=skip_incomplete,
        )
        if lists and not wanted.names:
            raise Failed("there is no name in what --list names", usage=True)
        with _ticking(call, bundle) as tick:
            done = await Bundles(composition).export(wanted, bundle, lambda: _sink(bundle), sign_key, tick)
        if bundle == STANDARD:
            with contextlib.redirect_stdout(sys.stderr):
                call.print(done, tables.exported)
        else:
            call.print(done, tables.exported)

    call.run_here(work)


@contextmanager
def _sink(bundle: str) -> Iterator[Sink]:
    from storage.exporting import TarSink, named

    if bundle != STANDARD:
        with named(Path(bundle)) as sink:
            yield sink
        return
    stream = TarSink(sys.stdout.buffer.fileno())
    yield stream
    stream.end()


@click.command("import")
@click.argument("archives", nargs=-1, type=_FILE, metavar="[ARCHIVE]...")
@click.option("--as", "name", metavar="REF", help="What it is, where the archive does not tell.")
@click.option("--pin", is_flag=True, help="Pin what comes in, so that it is never evicted.")
@click.option("--verify-key", type=_FILE, metavar="FILE", help="Only what this public Ed25519 key signed.")
@click.option(
    "--from-registry-dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIRECTORY",
    help="What Distribution's configuration names as rootdirectory, such as /var/lib/registry.",
)
@click.option("--namespace", metavar="NAME", help="Where DIRECTORY goes; needed where several have a store.")
@click.option("--match", metavar="GLOB", help="Only repositories of DIRECTORY that match.")
@click.option("--dry-run", is_flag=True, help="Say what would come in; blobs are not read.")
@local
def import_(
    call: Call,
    archives: tuple[Path, ...],
    name: str | None,
    pin: bool,
    verify_key: Path | None,
    directory: Path | None,
    namespace: str | None,
    match: str | None,
    dry_run: bool,
) -> None:
    """Take in each ARCHIVE: a bundle, another OCI image layout, or what docker save wrote.

    A directory, a tar, or a tar compressed by gzip; - is a tar on standard input. Clients pull what came in
    by the names that it had. An archive that is damaged or incomplete moves no tag.

    With --from-registry-dir, take over what another registry holds on this machine's disk. What is damaged
    there is told and left out; then the exit status is 1. Called again, it takes what is new.
    """
    if directory is not None:
        if archives or name or pin or verify_key:
            raise click.UsageError("--from-registry-dir goes with --namespace, --match and --dry-run only")
        take_over(call, directory, namespace, match or "*", dry_run)
        return
    if not archives:
        raise click.UsageError("say from where: ARCHIVE, or --from-registry-dir DIRECTORY")
    if namespace or match:
        raise click.UsageError("--namespace and --match go with --from-registry-dir DIRECTORY")

    async def work(composition: Composition) -> None:
        from proxy.bundles import Bundles, Given

        for archive in archives:
            with _ticking(call, str(archive)) as tick:
                given = Given(name=name, pin=pin, key=verify_key, dry_run=dry_run)
                done = await Bundles(composition).import_(archive, given, tick)
            call.print(done, tables.landed)

    call.run_here(work, make=True)


COMMANDS = (export, import_)
