"""The commands that look at a cache and steer it.

Each asks through the admin API of a running server, or works on the directory when none runs; which of the
two makes no difference to what it prints.  With --json that is, to the byte, what the API answers.
Nothing here asks an upstream, except `refresh` and what `pin --keep-fresh` has a server do.

The server starts by this module's importer, and its parent process stays small: so what is large (aiohttp,
rich, the whole of the cache) is only imported where it is needed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from typing import Any

import click
import msgspec

from proxy.admin.api.client import Failed
from proxy.admin.models import Listed
from proxy.admin.operations import LARGEST_PAGE, Operations
from proxy.cli import tables
from proxy.cli.console import Progress, write
from proxy.cli.context import CommandContext, common, option_type
from proxy.config.quantities import parse_size, parse_timeout
from proxy.config.values import parse_platform
from storage.names import is_glob

PAUSE = 1.0  # seconds between two requests for the progress
PAGE = LARGEST_PAGE


def _period(given: object) -> object:
    parse_timeout(given)
    return given  # as it was: it is read where it is used


PLATFORMS = click.option(
    "--platform",
    "platforms",
    callback=option_type(parse_platform),
    multiple=True,
    metavar="OS/ARCH",
    help="Only this of an index; may be repeated.",
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would go, and let it be.")


@click.command()
@click.argument("pattern", default="*")
@click.option("--tags", is_flag=True, help="List the tags, with what is held of each.")
@common
def ls(call: CommandContext, pattern: str, tags: bool) -> None:
    """List what is cached: repositories that match PATTERN, a glob, or their tags."""

    async def question(operations: Operations) -> Any:
        if not tags:
            return await operations.repositories(pattern)
        found = await operations.images(pattern, PAGE)
        while found.next is not None:
            more = await operations.images(pattern, PAGE, found.next)
            found = Listed(images=found.images + more.images, next=more.next)
        return found

    call.ask(question, tables.listed)


@click.command()
@click.argument("reference", metavar="REF")
@common
def show(call: CommandContext, reference: str) -> None:
    """Show what REF consists of, and what of that is here."""
    call.ask(lambda operations: operations.show(reference), tables.shown)


@click.command()
@click.option(
    "--period",
    default="24h",
    metavar="DURATION",
    callback=option_type(_period),
    show_default=True,
    help="Until now.",
)
@common
def stats(call: CommandContext, period: str) -> None:
    """Tell how much the cache has saved."""
    call.ask(lambda operations: operations.stats(period), tables.counted)


@click.command()
@click.option("--watch", is_flag=True, help="Go on looking, until Ctrl-C.")
@common
def fills(call: CommandContext, watch: bool) -> None:
    """List the transfers that go on: how far, how fast, for how many."""

    async def work(operations: Operations) -> None:
        if not operations.remote:
            raise Failed("no server is running: nothing is being transferred", "NOT_RUNNING")
        if not watch:
            call.print(await operations.fills(), tables.filling)
            return
        await follow(operations, call.json, _seconds())

    with suppress(KeyboardInterrupt):
        call.run(work)


async def _seconds() -> AsyncIterator[None]:
    """At once, and then each time that a look is due."""
    while True:
        yield
        await asyncio.sleep(PAUSE)


async def follow(operations: Operations, as_json: bool, looks: AsyncIterator[None]) -> None:
    """Show the fills at each of `looks`: as bars, as lines, or each look as a line of JSON."""
    with closing(Progress(sys.stdout)) as progress:
        async for _ in looks:
            found = await operations.fills()
            if as_json:
                click.echo(msgspec.json.encode(found))
            else:
                tables.progress(found, progress)


@click.command()
@click.argument("pattern", metavar="REF|GLOB")
@_DRY_RUN
@click.option("--yes", is_flag=True, help="Do not ask before purging by a glob.")
@click.option("--force", is_flag=True, help="Also what is pinned, and do not ask.")
@common
def purge(call: CommandContext, pattern: str, dry_run: bool, yes: bool, force: bool) -> None:
    """Remove REF, or all that matches GLOB, and what then is named by nothing any more.

    A pull of it fetches it anew. A name without tag and digest is all of that repository.
    """

    async def work(operations: Operations) -> None:
        if is_glob(pattern) and not (dry_run or yes or force):
            await _confirm(operations, pattern)
        found = await operations.purge(pattern, dry_run=dry_run, force=force)
        call.print(found, tables.purged)
        if not found.references:
            raise Failed(f"nothing that is cached matches {pattern}", "NAME_UNKNOWN")

    call.run(work)


def asks() -> bool:
    """Whether there is somebody to answer."""
    return sys.stdin.isatty()


async def _confirm(operations: Operations, pattern: str) -> None:
    if not asks():
        raise Failed("purge by a glob asks before it does it: say --yes", "NOT_CONFIRMED", usage=True)
    found = await operations.purge(pattern, dry_run=True)
    if found.references:
        write(*tables.purged(found, time.time()), file=sys.stderr)
        if not click.confirm("Purge?", err=True):
            raise Failed("nothing was purged", "NOT_CONFIRMED")


@click.command()
@click.argument("reference", metavar="REF")
@PLATFORMS
@common
def refresh(call: CommandContext, reference: str, platforms: tuple[str, ...]) -> None:
    """Ask upstream what REF is now, and fetch all of it that is not here."""

    async def work(operations: Operations) -> None:
        refreshing = asyncio.ensure_future(operations.refresh(reference, platforms))
        if not call.json:
            with closing(Progress(sys.stderr)) as progress:
                while not (await asyncio.wait({refreshing}, timeout=PAUSE))[0]:
                    tables.progress(await operations.fills(), progress)
        call.print(await refreshing, tables.refreshed)

    call.run(work)


@click.command()
@click.argument("pattern")
@click.option(
    "--keep-fresh",
    callback=option_type(parse_timeout),
    metavar="DURATION",
    help="Ask upstream so often, and fetch what is new.",
)
@PLATFORMS
@common
def pin(call: CommandContext, pattern: str, keep_fresh: float | None, platforms: tuple[str, ...]) -> None:
    """Keep what matches PATTERN, a glob over namespace/repository:tag, whatever its age."""
    call.ask(lambda operations: operations.pin(pattern, keep_fresh, platforms), tables.pinned)


@click.command()
@click.argument("pattern")
@common
def unpin(call: CommandContext, pattern: str) -> None:
    """Take back a pin, given as it is listed by `pins`."""
    call.ask(lambda operations: operations.unpin(pattern), tables.unpinned)


@click.command()
@common
def pins(call: CommandContext) -> None:
    """List the pins, of the configuration and by command, and what they hold."""
    call.ask(lambda operations: operations.pins(), tables.pinned)


@click.command()
@click.option(
    "--to",
    callback=option_type(parse_size),
    metavar="SIZE",
    help="So much is to be left; else the limits decide.",
)
@_DRY_RUN
@common
def evict(call: CommandContext, to: int | None, dry_run: bool) -> None:
    """Make room: what was not used for its time goes, then the least recently used."""
    call.ask(lambda operations: operations.evict(to, dry_run=dry_run), tables.evicted)


@click.command()
@click.option("--wait", is_flag=True, help="Until it is done; without a server that is always so.")
@common
def scrub(call: CommandContext, wait: bool) -> None:
    """Have everything read, and compared with its digest.

    With --wait the exit status is 1 if anything was damaged.
    """

    async def work(operations: Operations) -> None:
        found = await operations.scrub()
        if wait or not operations.remote:
            with closing(Progress(sys.stderr)) as progress:
                while found.asked.running:
                    if not call.json:
                        tables.scrubbing(found.asked, progress)
                    await asyncio.sleep(PAUSE)
                    found = await operations.scrubbing()
        call.print(found, tables.scrubbed)
        if found.error is not None:
            raise Failed(found.error)
        if found.asked.damaged and not found.asked.running:
            damaged, healed = found.asked.damaged, found.asked.healed
            raise Failed(f"{damaged} damaged and set aside, {healed} of them fetched again", "DAMAGED")

    call.run(work)


@click.command()
@common
def webhooks(call: CommandContext) -> None:
    """List the webhooks, with what they have not been told of yet, and how deliveries go."""
    call.ask(lambda operations: operations.webhooks(), tables.webhooks)


@click.command()
@_DRY_RUN
@click.option("--last", is_flag=True, help="Tell what the last collection came to; begin none.")
@common
def collect(call: CommandContext, dry_run: bool, last: bool) -> None:
    """Remove what was pushed and nothing reaches any more, and what the rules let go of.

    Pushes may go on meanwhile. The exit status is 1 if anything was left as it is since records are damaged.
    """

    async def work(operations: Operations) -> None:
        found = await (operations.collected() if last else operations.collect(dry_run=dry_run))
        call.print(found, tables.collected)
        if found.refused or any(each.refused for each in found.rows):
            raise Failed(found.refused or "not all repositories could be collected", "DAMAGED")

    call.run(work)


@click.command()
@click.argument("reference", metavar="REF")
@common
def why(call: CommandContext, reference: str) -> None:
    """Tell what a pull of REF would do now, and by which rules; without doing it."""
    call.ask(lambda operations: operations.why(reference), tables.explained)


COMMANDS = (ls, show, stats, fills, purge, refresh, pin, unpin, pins, evict, scrub, collect, webhooks, why)
