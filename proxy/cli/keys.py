"""The commands about API keys: keys create, list and revoke."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from proxy.admin import key_reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import ExplainedCommand, ExplainedGroup
from proxy.cli.tables import Column, Table
from proxy.config.errors import StartError
from proxy.config.quantities import format_past, format_time, parse_keep, plural


@click.group(cls=ExplainedGroup)
def keys() -> None:
    """Manage API keys.

    An API key is a password for a program, with a scope and an end. The server accepts it if
    access.api_keys is set.
    """


@keys.command(cls=ExplainedCommand)
@click.argument("name", metavar="NAME")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="SCOPE",
    help="What it may do, such as repository:team/*:pull,push or registry:catalog:*. Can be repeated.",
)
@click.option(
    "--expires",
    "seconds",
    default="90d",
    show_default=True,
    metavar="DURATION",
    callback=option_type(parse_keep),
    help="For how long it is valid; never: until it is revoked.",
)
@click.option(
    "--locked",
    "lock",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="It may pull what this lock file has, and nothing else.",
)
@common
def create(
    call: CommandContext, name: str, scopes: tuple[str, ...], seconds: float, lock: Path | None
) -> None:
    """Make an API key, and print it once.

    Clients send it as the password of docker login, with any user name, or as a Bearer token. The server
    keeps only a hash of it.
    """

    async def work(operations: Operations) -> None:
        lines = None if lock is None else _lines(lock)
        for_so_long = None if seconds == math.inf else seconds
        call.print(await operations.create_key(name, scopes, for_so_long, lines), created_tables)

    call.run(work)


def _lines(lock: Path) -> list[str]:
    """The images of a lock file."""
    from proxy.policy.locks import read_lock

    try:
        found = read_lock(lock)
    except StartError as error:
        raise OperationFailed(str(error), "FILE_INVALID", usage=True) from None
    return [f"{image}@{digest}" for images in found.values() for digest, image in images.items()]


@keys.command("list", cls=ExplainedCommand)
@common
def list_keys(call: CommandContext) -> None:
    """List API keys.

    USED is when a key was last used, to the minute.
    """
    call.ask(lambda operations: operations.keys(), key_tables)


@keys.command(cls=ExplainedCommand)
@click.argument("name", metavar="NAME")
@common
def revoke(call: CommandContext, name: str) -> None:
    """Revoke an API key.

    It is refused from the next request on, and so are the tokens that were issued for it.
    """
    call.ask(lambda operations: operations.revoke_key(name), revoked_tables)


@keys.command("end-tokens", cls=ExplainedCommand)
@common
def end_tokens(call: CommandContext) -> None:
    """End all tokens of the token endpoint.

    For when the records may have been read by others: clients log in again, by password or API key. Another
    key signs from now on.
    """
    call.ask(lambda operations: operations.end_tokens(), ended_tables)


def ended_tables(found: key_reports.TokensEnded, now: float) -> Sequence[Table]:
    return [Table((), notes=[f"all tokens are ended: {plural(found.keys, 'key')} deleted"])]


def key_tables(rows: Sequence[key_reports.KeyRow], now: float) -> Sequence[Table]:
    columns = (
        Column("NAME", whole=True),
        Column("SCOPE"),
        Column("LOCK FILE", drop=3),
        Column("MADE", drop=2),
        Column("EXPIRES"),
        Column("USED", drop=1),
    )
    table = Table(columns, empty="there are no API keys")
    for each in rows:
        table.add(
            each.name,
            " ".join(each.scopes),
            "" if each.locked is None else plural(each.locked, "line"),
            format_past(each.made, now),
            format_time(each.expires, now, "never"),
            format_past(each.used, now, "never"),
        )
    return [table]


def created_tables(found: key_reports.KeyCreated, now: float) -> Sequence[Table]:
    (table,) = key_tables([found.row], now)
    kept = "this is the key, which is not shown again:"
    return [table, Table((), notes=[kept, found.key, *found.notes])]


def revoked_tables(found: key_reports.KeyRevoked, now: float) -> Sequence[Table]:
    return [Table((), notes=[f"{found.name} is revoked"])]


COMMANDS = (keys,)
