"""The commands that carry images to where no upstream can be asked, as files.

Both work on the directory, whether a server runs on it or not: the files and records are made for several
processes at once.  They have to run as the user that the server runs as.  With --server, what is carried goes
through the admin API of a server, which may be on another machine.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from proxy.admin.api.client import AdminClient, Failed
from proxy.cli.console import Column, Progress, Table
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.copy import take_over
from proxy.config.quantities import format_size, parse_timeout, plural
from proxy.config.values import parse_platform
from proxy.transfer import results
from storage.names import written

if TYPE_CHECKING:
    from proxy.namespaces.composition import Composition
    from proxy.transfer.results import Exported, Tick
    from storage.archives.exporter import Sink

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
def _ticking(call: CommandContext, what: str) -> Iterator[Tick]:
    """Shows how far it is; threads may call it."""
    with closing(Progress(sys.stderr)) as progress:

        def tick(done: int, whole: int) -> None:
            if not call.json:
                progress.show(what, done, whole, f"{format_size(done)} of {format_size(whole)}")

        yield tick


_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("names", nargs=-1, metavar="[REF|GLOB]...")
@click.option("--list", "lists", type=_FILE, multiple=True, metavar="FILE", help="Names, one a line.")
@click.option(
    "--used-within",
    callback=option_type(_duration),
    metavar="DURATION",
    help="Of the names, or of all, only what was pulled in this time.",
)
@click.option(
    "--platform",
    "platforms",
    callback=option_type(parse_platform),
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
@common
def export(
    call: CommandContext,
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

    def wanted() -> dict[str, Any]:
        found = [*names, *(name for path in lists for name in _listed(path))]
        if lists and not found:
            raise Failed("there is no name in what --list names", usage=True)
        return {
            "names": found,
            "used_within": used_within,
            "platforms": platforms,
            "referrers": not no_referrers,
            "skip_incomplete": skip_incomplete,
        }

    async def here(composition: Composition) -> None:
        from proxy.transfer.bundle_export import BundleExport, Selection, earlier

        selection = Selection(**wanted(), since=list(map(earlier, since)))
        with _ticking(call, bundle) as tick:
            done = await BundleExport(composition).export(
                selection, bundle, lambda _: _sink(bundle), sign_key, tick
            )
        _tell(call, bundle, done)

    async def there(server: AdminClient) -> None:
        with _ticking(call, bundle) as tick:
            done = await fetch(server, bundle, wanted(), since, tick)
        _tell(call, bundle, done)

    if call.server is None:
        call.run_here(here)
    elif sign_key is not None:
        raise click.UsageError("--sign-key signs on the machine of the directory, without --server")
    elif bundle != STANDARD and not bundle.endswith(".tar"):
        raise click.UsageError(f"a server sends a tar: give {bundle} a name that ends in .tar")
    else:
        call.run_there(call.server, there)


def _tell(call: CommandContext, bundle: str, done: Exported) -> None:
    with contextlib.redirect_stdout(sys.stderr if bundle == STANDARD else sys.stdout):
        call.print(done, exported)


async def fetch(
    server: AdminClient, bundle: str, wanted: Mapping[str, Any], since: Sequence[Path], tick: Tick
) -> Exported:
    """Have `server` export what is wanted, and write it to `bundle`; that has its name when all is there."""
    from proxy.transfer.bundle_export import earlier
    from storage.archives.exporter import into, placed
    from storage.errors import RegistryError

    async def receive(file: int) -> str:
        write, count = into(file), 0

        def take(piece: bytes) -> None:
            nonlocal count
            write(piece)
            count += len(piece)
            tick(min(count, done.bytes), done.bytes)

        return await server.export(asked, take)

    try:
        asked = {**wanted, "since": [earlier(path).content.decode() for path in since]}
        done = msgspec.structs.replace(await server.planned(asked), bundle=bundle)
        if bundle == STANDARD:
            return msgspec.structs.replace(done, digest=await receive(sys.stdout.buffer.fileno()))
        with placed(Path(bundle)) as (partial, file):
            digest = await receive(file)
            earlier(partial)  # whoever passed it on may have ended it in the middle, and well
        return msgspec.structs.replace(done, digest=digest)
    except RegistryError as error:
        raise Failed(str(error), error.code) from error
    except OSError as error:
        raise Failed(f"{error.filename or bundle}: {error.strerror or error}", "DENIED") from error


@contextmanager
def _sink(bundle: str) -> Iterator[Sink]:
    from storage.archives.exporter import TarSink, into, named

    if bundle != STANDARD:
        with named(Path(bundle)) as sink:
            yield sink
        return
    stream = TarSink(into(sys.stdout.buffer.fileno()))
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
@common
def import_(
    call: CommandContext,
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
        if archives or name or pin or verify_key or call.server:
            raise click.UsageError("--from-registry-dir goes with --namespace, --match and --dry-run only")
        take_over(call, directory, namespace, match or "*", dry_run)
        return
    if not archives:
        raise click.UsageError("say from where: ARCHIVE, or --from-registry-dir DIRECTORY")
    if namespace or match:
        raise click.UsageError("--namespace and --match go with --from-registry-dir DIRECTORY")

    async def here(composition: Composition) -> None:
        from proxy.transfer.bundle_import import BundleImport, Given

        for archive in archives:
            with _ticking(call, str(archive)) as tick:
                given = Given(name=name, pin=pin, key=verify_key, dry_run=dry_run)
                done = await BundleImport(composition).import_(archive, given, tick)
            call.print(done, landed)

    async def there(server: AdminClient) -> None:
        for archive in archives:
            with _opened(archive) as stream:
                done = await server.import_(stream, name, pin, dry_run)
            call.print(msgspec.structs.replace(done, archive=str(archive)), landed)

    if call.server is None:
        call.run_here(here, make=True)
    elif verify_key is not None:
        raise click.UsageError("--verify-key verifies on the machine of the directory, without --server")
    else:
        call.run_there(call.server, there)


@contextmanager
def _opened(archive: Path) -> Iterator[IO[bytes]]:
    """To be sent.  Raises Failed."""
    if str(archive) == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        with archive.open("rb") as stream:
            yield stream
    except IsADirectoryError:
        hint = f"tar -C {archive} -cf bundle.tar ."
        raise Failed(f"{archive} is a directory, and a server takes a tar: {hint}", usage=True) from None
    except OSError as error:
        raise Failed(f"{archive}: {error.strerror or error}", "DENIED") from error


COMMANDS = (export, import_)


def exported(found: results.Exported, now: float) -> Sequence[Table]:
    table = Table((Column("REFERENCE", whole=True), Column("DIGEST", digests=True), Column("PLATFORMS")))
    for each in found.references:
        some = f"{', '.join(each.platforms)} ({plural(len(each.left_out), 'other')} left out)"
        table.add(each.reference, each.digest, some if each.left_out else "all")
    for skipped in found.skipped:
        table.notes.append(f"left out {skipped.reference}: it lacks {', '.join(skipped.lacking)}")
    spared = f"; {plural(found.spared, 'blob')} left to earlier bundles" if found.spared else ""
    table.notes.append(
        f"{found.bundle}: {plural(len(found.references), 'reference')}, {plural(found.referrers, 'referrer')}"
        f", {plural(found.blobs, 'blob')}, {format_size(found.bytes)}"
        f"{', signed' if found.signed else ''}{spared}"
    )
    return [table]


def landed(found: results.BundleImported, now: float) -> Sequence[Table]:
    table = Table(
        (Column("REFERENCE", whole=True), Column("DIGEST", digests=True), Column("WAS", digests=True))
    )
    for each in found.references:
        was = "the same" if each.before == each.digest else each.before or ""
        table.add(written(each.repository, each.tag or each.digest), each.digest, was)
    done = "would bring" if found.dry_run else "brought"
    table.notes.append(
        f"{found.archive} {done} {plural(len(found.references), 'reference')}, of"
        f" {plural(found.manifests, 'manifest')}; taken in: {plural(found.blobs, 'blob')}"
        f", {format_size(found.bytes)}"
        f"{'; its signature is right' if found.verified else ''}"
    )
    return [table]
