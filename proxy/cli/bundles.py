"""The commands that write images to files and load them from files: export, import.

Both work on the directory, whether a server runs on it or not, and must run as the user of the server.  With
--server they send or receive a tar through the admin API of a server, which may be on another machine.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from proxy.admin.api.client import AdminClient, OperationFailed
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import PLATFORMS, CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.tables import Column, Table, no_image
from proxy.config.quantities import format_size, parse_timeout, plural
from proxy.transfer import results
from storage.names import written

if TYPE_CHECKING:
    from proxy.namespaces.composition import Composition
    from proxy.transfer.bundle_export import Selection
    from proxy.transfer.results import Exported, Tick
    from storage.archives.exporter import Sink

STANDARD = "-"  # as a path: standard input, or output


def _duration(text: object) -> object:
    parse_timeout(text)
    return text  # unchanged: the export parses it


def _names_in(path: Path) -> Iterator[str]:
    """The names in a list file, one per line; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperationFailed(f"--list {path}: {error}", usage=True) from None
    return (name for line in lines if (name := line.partition("#")[0].strip()))


@contextmanager
def _progress(call: CommandContext, name: str) -> Iterator[Tick]:
    """A callback that shows the progress of `name`; any thread may call it."""
    with closing(ProgressDisplay(sys.stderr)) as progress:

        def tick(done: int, total: int) -> None:
            if not call.json:
                progress.show(name, done, total, f"{format_size(done)} of {format_size(total)}")

        yield tick


_FILE = click.Path(path_type=Path)


@command()
@click.argument("bundle", type=click.Path())
@click.argument("names", nargs=-1, metavar="[REF|GLOB]...")
@click.option(
    "--list", "lists", type=_FILE, multiple=True, metavar="FILE", help="A file with one name per line."
)
@click.option(
    "--used-within",
    callback=option_type(_duration),
    metavar="DURATION",
    help="Only what was pulled within this time.",
)
@PLATFORMS
@click.option(
    "--no-referrers",
    "referrers",
    is_flag=True,
    callback=lambda context, parameter, value: not value,
    help="Leave out signatures, SBOMs and other referrers.",
)
@click.option(
    "--since",
    type=_FILE,
    multiple=True,
    metavar="BUNDLE",
    help="Leave out blobs of this earlier bundle, or of its entrepot.json. Can be repeated.",
)
@click.option("--skip-incomplete", is_flag=True, help="Leave out images that are not stored completely.")
@click.option(
    "--sign-key", type=_FILE, metavar="FILE", help="Sign the bundle with this private Ed25519 key, in PEM."
)
@common
def export(
    call: CommandContext,
    /,
    bundle: str,
    names: tuple[str, ...],
    lists: tuple[Path, ...],
    since: tuple[Path, ...],
    sign_key: Path | None,
    **filters: Any,
) -> None:
    """Write images to a bundle.

    BUNDLE is an OCI image layout: a tar if its name ends in .tar, a tar on standard output for -, else a
    directory. Every image must be stored completely. No upstream is asked.
    """

    def selection() -> Selection:
        from proxy.transfer.bundle_export import Selection, earlier

        found = [*names, *chain.from_iterable(map(_names_in, lists))]
        if lists and not found:
            raise OperationFailed("the files of --list contain no name", usage=True)
        return Selection(found, since=list(map(earlier, since)), **filters)

    if call.server is None:
        call.run_here(lambda composition: _export_here(call, composition, bundle, selection(), sign_key))
    elif sign_key is not None:
        raise click.UsageError("--sign-key works on the directory only, without --server")
    elif bundle != STANDARD and not bundle.endswith(".tar"):
        raise click.UsageError(f"a server sends a tar: the name {bundle} must end in .tar")
    else:
        call.run_there(call.server, lambda server: _fetch(call, server, bundle, selection))


async def _export_here(
    call: CommandContext, composition: Composition, bundle: str, selection: Selection, sign_key: Path | None
) -> None:
    from proxy.transfer.bundle_export import BundleExport

    with _progress(call, bundle) as tick:
        done = await BundleExport(composition).export(
            selection, bundle, lambda _: _sink(bundle), sign_key, tick
        )
    _print_export(call, bundle, done)


async def _fetch(
    call: CommandContext, server: AdminClient, bundle: str, selection: Callable[[], Selection]
) -> None:
    with _progress(call, bundle) as tick, _failures(bundle):
        done = await fetch(server, bundle, selection(), tick)
    _print_export(call, bundle, done)


def _print_export(call: CommandContext, bundle: str, done: Exported) -> None:
    with contextlib.redirect_stdout(sys.stderr if bundle == STANDARD else sys.stdout):
        call.print(done, export_tables)


async def fetch(server: AdminClient, bundle: str, selection: Selection, tick: Tick) -> Exported:
    """Have the server export a selection to `bundle`, which gets its name when it is complete."""
    from proxy.transfer.bundle_export import earlier
    from storage.archives.exporter import into, placed

    async def receive(file: int) -> str:
        write, count = into(file), 0

        def take(piece: bytes) -> None:
            nonlocal count
            write(piece)
            count += len(piece)
            tick(min(count, done.bytes), done.bytes)

        return await server.export(selection, take)

    done = msgspec.structs.replace(await server.planned(selection), bundle=bundle)
    if bundle == STANDARD:
        return msgspec.structs.replace(done, digest=await receive(sys.stdout.buffer.fileno()))
    with placed(Path(bundle)) as (partial, file):
        digest = await receive(file)
        earlier(partial)  # raises for a tar that a proxy between has cut short without an error
    return msgspec.structs.replace(done, digest=digest)


@contextmanager
def _failures(bundle: str) -> Iterator[None]:
    """Raise OperationFailed for an archive or a file that cannot be used."""
    from storage.errors import RegistryError

    try:
        yield
    except RegistryError as error:
        raise OperationFailed(str(error), error.code) from error
    except OSError as error:
        raise OperationFailed(f"{error.filename or bundle}: {error.strerror or error}", "DENIED") from error


@contextmanager
def _sink(bundle: str) -> Iterator[Sink]:
    """Where a bundle is written to."""
    from storage.archives.exporter import TarSink, into, named

    if bundle != STANDARD:
        with named(Path(bundle)) as sink:
            yield sink
        return
    stream = TarSink(into(sys.stdout.buffer.fileno()))
    yield stream
    stream.end()


@command("import")
@click.argument("archives", nargs=-1, type=_FILE, metavar="[ARCHIVE]...")
@click.option("--as", "name", metavar="REF", help="The name of an image that has none in the archive.")
@PLATFORMS
@click.option("--pin", is_flag=True, help="Pin the imported images, so that they are never evicted.")
@click.option(
    "--verify-key", type=_FILE, metavar="FILE", help="Require a signature by this public Ed25519 key, in PEM."
)
@click.option(
    "--from-registry-dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIRECTORY",
    help="Migrate the rootdirectory of a Docker registry (Distribution), such as /var/lib/registry.",
)
@click.option(
    "--namespace", metavar="NAME", help="The namespace for DIRECTORY. Required if several have a store."
)
@click.option("--match", metavar="GLOB", help="Migrate only repositories of DIRECTORY that match.")
@click.option("--dry-run", is_flag=True, help="Show what would be imported, and import nothing.")
@common
def import_(
    call: CommandContext,
    archives: tuple[Path, ...],
    name: str | None,
    platforms: tuple[str, ...],
    pin: bool,
    verify_key: Path | None,
    directory: Path | None,
    namespace: str | None,
    match: str | None,
    dry_run: bool,
) -> None:
    # long: its parameters are the options of the command, its docstring the help.
    """Load images from archives.

    ARCHIVE is a bundle, another OCI image layout, or the output of docker save: a directory, a tar, or a
    tar compressed by gzip or zstd; - is a tar on standard input. The images keep their names. An archive
    that is damaged or incomplete moves no tag.

    With --from-registry-dir, import the content of a Docker registry on this machine. Damaged content is
    listed and left out, with exit status 1. Run it again to import what is new.
    """
    if directory is not None:
        if archives or name or platforms or pin or verify_key or call.server:
            raise click.UsageError(
                "--from-registry-dir can only be combined with --namespace, --match and --dry-run"
            )
        _migrate(call, directory, namespace, match or "*", dry_run)
        return
    if not archives:
        raise click.UsageError("give an ARCHIVE, or --from-registry-dir DIRECTORY")
    if namespace or match:
        raise click.UsageError("--namespace and --match need --from-registry-dir DIRECTORY")

    options = {"name": name, "pin": pin, "dry_run": dry_run, "platforms": platforms}
    if call.server is None:
        call.run_here(
            lambda composition: _import_here(call, composition, archives, key=verify_key, **options),
            make=True,
        )
    elif verify_key is not None:
        raise click.UsageError("--verify-key works on the directory only, without --server")
    else:
        call.run_there(call.server, lambda server: _send(call, server, archives, **options))


async def _import_here(
    call: CommandContext, composition: Composition, archives: Sequence[Path], **options: Any
) -> None:
    from proxy.transfer.bundle_import import BundleImport, ImportOptions

    for archive in archives:
        with _progress(call, str(archive)) as tick:
            done = await BundleImport(composition).import_(archive, ImportOptions(**options), tick)
        call.print(done, import_tables)


async def _send(call: CommandContext, server: AdminClient, archives: Sequence[Path], **options: Any) -> None:
    for archive in archives:
        with _opened(archive) as stream:
            done = await server.import_(stream, **options)
        call.print(msgspec.structs.replace(done, archive=str(archive)), import_tables)


def _migrate(call: CommandContext, directory: Path, namespace: str | None, match: str, dry_run: bool) -> None:
    async def work() -> None:
        from proxy.cli.migrate import migrate, migration_tables

        found = await migrate(
            call.path, call.settings, directory, namespace, match, dry_run=dry_run, quietly=call.json
        )
        call.print(found, migration_tables)
        if found.damaged:
            raise OperationFailed(
                f"{len(found.damaged)} damaged or missing; all else was imported", "DAMAGED"
            )

    call.alone(work)


@contextmanager
def _opened(archive: Path) -> Iterator[IO[bytes]]:
    """The archive, to be sent.  Raises OperationFailed."""
    if str(archive) == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        with archive.open("rb") as stream:
            yield stream
    except IsADirectoryError:
        hint = f"tar -C {archive} -cf bundle.tar ."
        raise OperationFailed(
            f"{archive} is a directory, but a server needs a tar: {hint}", usage=True
        ) from None
    except OSError as error:
        raise OperationFailed(f"{archive}: {error.strerror or error}", "DENIED") from error


def export_tables(found: results.Exported, now: float) -> Sequence[Table]:
    table = Table(
        (Column("REFERENCE", whole=True), Column("DIGEST", digests=True, drop=2), Column("PLATFORMS", drop=1))
    )
    for each in found.references:
        some = f"{', '.join(each.platforms)} ({plural(len(each.left_out), 'other')} left out)"
        table.add(each.reference, each.digest, some if each.left_out else "all")
    table.notes += [no_image(each.reference, each.lacking) for each in found.references if each.lacking]
    for skipped in found.skipped:
        cause = f"it is for {skipped.platform}" if skipped.platform else ""
        cause = cause or f"not stored are {', '.join(skipped.lacking)}"
        table.notes.append(f"left out {skipped.reference}: {cause}")
    spared = f"; {plural(found.spared, 'blob')} of earlier bundles left out" if found.spared else ""
    table.notes.append(
        f"{found.bundle}: {plural(len(found.references), 'reference')}, {plural(found.referrers, 'referrer')}"
        f", {plural(found.blobs, 'blob')}, {format_size(found.bytes)}"
        f"{', signed' if found.signed else ''}{spared}"
    )
    return [table]


def import_tables(found: results.BundleImported, now: float) -> Sequence[Table]:
    table = Table(
        (
            Column("REFERENCE", whole=True),
            Column("DIGEST", digests=True, drop=1),
            Column("PREVIOUS DIGEST", digests=True, drop=2),
        )
    )
    for each in found.references:
        before = "the same" if each.before == each.digest else each.before or ""
        table.add(written(each.repository, each.tag or each.digest), each.digest, before)
    table.notes += found.notes
    done = "would be imported" if found.dry_run else "imported"
    table.notes.append(
        f"{done} from {found.archive}: {plural(len(found.references), 'reference')},"
        f" {plural(found.manifests, 'manifest')}, {plural(found.blobs, 'new blob')},"
        f" {format_size(found.bytes)}{'; the signature is valid' if found.verified else ''}"
    )
    return [table]


COMMANDS = (export, import_)
