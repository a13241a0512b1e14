"""The commands about the policy: policy check, test and explain."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from proxy.admin import policy_reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.completion import references
from proxy.cli.configured import config_options
from proxy.cli.console import complain
from proxy.cli.context import CommandContext, common, option_type, without_server
from proxy.cli.help import ExplainedCommand, ExplainedGroup
from proxy.cli.replicas import by_replica
from proxy.cli.status import moving
from proxy.cli.tables import Column, Table
from proxy.config.errors import ConfigError, StartError
from proxy.config.image_names import parse, split
from proxy.config.loader import load
from proxy.config.policy import NameVerdict, PolicyConfig
from proxy.config.quantities import format_past, format_time, parse_timeout
from proxy.config.schema import Config
from proxy.config.settings import Setting
from proxy.config.yaml_text import parse_yaml
from storage.names import written

if TYPE_CHECKING:
    from proxy.policy.replay import ReplayedPull


@click.group(cls=ExplainedGroup)
def policy() -> None:
    """Check, test and explain the policy."""


@policy.command(cls=ExplainedCommand)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
def check(file: Path) -> None:
    """Check the policy in a file.

    FILE is a configuration; `policy` may be its only key. Lists rules that can never decide, because an
    earlier rule matches everything that they match, and invalid expressions. Exits with 1 if it finds any.
    Does not read the files of signers: see `entrepot check`.
    """
    from proxy.policy.coverage import unreachable

    found = _load(file)
    faults = [
        f"rule {rule.name} never decides: {before.name}, before it, matches all that it matches"
        for rule, before in unreachable(found.policy.rules)
    ]
    faults += _unread(found.policy)
    for each in faults:
        complain(each)
    if faults:
        sys.exit(1)
    number = len(found.policy.rules)
    click.echo(f"{file} is valid: {number} {'rule' if number == 1 else 'rules'}")


def _unread(policy: PolicyConfig) -> Iterator[str]:
    from proxy.policy.expressions import Expression

    for rule in policy.rules:
        for text in (each.when for each in rule.attested if each.when is not None):
            try:
                Expression(text)
            except StartError as error:
                yield f"rule {rule.name}: {error}"


def _load(path: Path | None) -> Config:
    try:
        return load(path)
    except ConfigError as error:
        complain(str(error))
        sys.exit(2)


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image, what the policy should say of it, and by which rule, if that is given."""

    image: str
    expect: NameVerdict
    rule: str | None = None


class CaseResult(msgspec.Struct, frozen=True):
    """What the policy says of the image of a case, and whether that is what was expected."""

    image: str
    passed: bool
    expected: NameVerdict
    found: NameVerdict
    rule: str


@policy.command("test", cls=ExplainedCommand)
@click.argument("cases", type=click.Path(path_type=Path), metavar="CASES")
@config_options
@without_server
def run_cases(call: CommandContext, cases: Path, path: Path | None, settings: tuple[Setting, ...]) -> None:
    """Test the policy against expected verdicts.

    CASES is a YAML list such as `- {image: docker.io/library/alpine:latest, expect: deny, rule: no-latest}`.
    `expect` is allow, deny, or verify for a rule with conditions on the content. Only names are compared.
    Exits with 1 if a verdict differs.
    """

    async def work() -> None:
        config = load(path, settings=settings)
        results = [_judged(config, each) for each in _read(cases)]
        call.print(results, case_tables)
        if not all(each.passed for each in results):
            sys.exit(1)

    call.alone(work)


def _read(path: Path) -> list[Case]:
    """Raises OperationFailed."""
    try:
        return msgspec.convert(parse_yaml(path.read_text(encoding="utf-8")), list[Case])
    except OSError as error:
        raise OperationFailed(f"{path}: cannot be read: {error.strerror}", usage=True) from None
    except (ValueError, msgspec.ValidationError) as error:
        raise OperationFailed(f"{path}: {error}", usage=True) from None


def _judged(config: Config, case: Case) -> CaseResult:
    from proxy.policy.rules import RuleBook

    name, tag, digest = split(case.image)
    try:
        repository = _full_name(config, name)
    except ValueError as error:
        raise OperationFailed(f"{case.image}: {error}", usage=True) from None
    asked = None if digest is not None else tag or "latest"
    rule = RuleBook(config.policy).find(repository, asked)
    found = rule.verdict
    passed = found == case.expect and case.rule in (None, rule.name)
    return CaseResult(written(repository, digest or str(asked)), passed, case.expect, found, rule.name)


def _full_name(config: Config, name: str) -> str:
    """The name with its namespace; one that names no namespace is read as clients do.  Raises ValueError."""
    if config.namespace(name.partition("/")[0]) is not None:
        return name
    read = parse(name)
    return f"{read.host}/{read.repository}"


def case_tables(results: Sequence[CaseResult], now: float) -> Sequence[Table]:
    columns = (
        Column("IMAGE", whole=True),
        Column("EXPECTED"),
        Column("FOUND"),
        Column("RULE"),
        Column("PASSED"),
    )
    table = Table(columns, empty="there are no cases")
    for each in results:
        table.add(each.image, each.expected, each.found, each.rule or "-", "yes" if each.passed else "NO")
    failed = sum(not each.passed for each in results)
    if results:
        table.notes.append(f"{failed} of {len(results)} failed" if failed else f"all {len(results)} passed")
    return [table]


@policy.command(cls=ExplainedCommand)
@click.argument("reference", metavar="REF", shell_complete=references)
@common
def explain(call: CommandContext, reference: str) -> None:
    """Explain what the policy says of an image.

    Names the rule that decides, and what leads to the image: tags, and the manifests that name it.
    """
    call.ask(lambda operations: operations.policy(reference), explained_tables)


def explained_tables(found: policy_reports.PolicyExplained, now: float) -> Sequence[Table]:
    verdict = "allowed" if found.allowed else {"enforce": "refused"}.get(found.mode, f"served ({found.mode})")
    title = written(found.repository, found.reference)
    table = Table((Column("FIELD", whole=True), Column("VALUE")), title=title)
    table.add("verdict", verdict)
    table.add("rule", found.rule or "-")
    table.add("reason", found.reason)
    if found.digest:
        table.add("digest", found.digest)
    if not found.leads:
        return [table]
    columns = (
        Column("LEADS TO IT", digests=True),
        Column("TAG"),
        Column("RULE"),
        Column("ALLOWED"),
        Column("REASON", drop=1),
    )
    leads = Table(columns)
    for each in found.leads:
        allowed = "yes" if each.allowed else "no"
        leads.add(each.digest, each.tag or "-", each.rule or "-", allowed, each.reason)
    return [table, leads]


@policy.command("held", cls=ExplainedCommand)
@common
def list_held(call: CommandContext) -> None:
    """List tags that are held.

    Those that the policy holds at another digest than their upstreams give, and when they will move.
    """
    call.ask(lambda operations: operations.held(), held_tables)


def held_tables(rows: Sequence[policy_reports.HeldRow], now: float) -> Sequence[Table]:
    columns = (
        Column("TAG", whole=True),
        Column("HELD AT", digests=True),
        Column("WOULD MOVE TO", digests=True),
        Column("SEEN", drop=2),
        Column("MOVES"),
        Column("RULE", drop=1),
    )
    table = Table(columns, empty="no tag is held")
    for each in rows:
        tag, seen = written(each.repository, each.tag), format_past(each.seen, now)
        table.add(tag, each.digest, each.candidate or "-", seen, moving(each, now), each.rule)
    return [by_replica(table, rows)]


_TAG_AND_DIGEST = click.argument("reference", metavar="REF@DIGEST")


@policy.command(cls=ExplainedCommand)
@_TAG_AND_DIGEST
@common
def approve(call: CommandContext, reference: str) -> None:
    """Let a tag that is held move.

    REF@DIGEST is the tag and the digest to which it may move, such as alpine:3.20.1@sha256:…: now if its
    upstream has given that, or else when it does.
    """
    call.ask(lambda operations: operations.approve(reference), decided_tables)


@policy.command(cls=ExplainedCommand)
@_TAG_AND_DIGEST
@common
def reject(call: CommandContext, reference: str) -> None:
    """Keep a tag from moving to a digest.

    REF@DIGEST is the tag and the digest to which it never moves, unless that is approved later.
    """
    call.ask(lambda operations: operations.reject(reference), decided_tables)


def decided_tables(found: policy_reports.HeldRow, now: float) -> Sequence[Table]:
    columns = (
        Column("TAG", whole=True),
        Column("STANDS FOR", digests=True),
        Column("MAY MOVE TO", digests=True),
    )
    table = Table(columns)
    table.add(written(found.repository, found.tag), found.digest, found.approved or "-")
    return [table]


@policy.command("override", cls=ExplainedCommand)
@click.argument("reference", metavar="REF", shell_complete=references)
@click.option(
    "--for",
    "seconds",
    metavar="DURATION",
    callback=option_type(parse_timeout),
    help="For how long, such as 2h; at most 7d.",
)
@click.option("--reason", metavar="TEXT", help="Why: clients and the log are given it.")
@click.option("--end", is_flag=True, help="End the exception for REF now.")
@common
def make_override(
    call: CommandContext, reference: str, seconds: float | None, reason: str | None, end: bool
) -> None:
    """Serve an image against the policy for some time.

    REF is a tag or a digest. Every answer that depends on the exception has a warning.
    """
    if end and (seconds is not None or reason is not None):
        raise click.UsageError("--end takes neither --for nor --reason")
    if end:
        call.ask(lambda operations: operations.end_override(reference), ended_tables)
        return
    if seconds is None or reason is None:
        raise click.UsageError("give --for and --reason, or --end")
    for_so_long, because = seconds, reason
    call.ask(
        lambda operations: operations.override(reference, for_so_long, because),
        lambda found, now: override_tables([found], now),
    )


@policy.command("overrides", cls=ExplainedCommand)
@common
def list_overrides(call: CommandContext) -> None:
    """List exceptions from the policy."""
    call.ask(lambda operations: operations.overrides(), override_tables)


def override_tables(rows: Sequence[policy_reports.OverrideRow], now: float) -> Sequence[Table]:
    table = Table(
        (Column("IMAGE", whole=True), Column("ENDS"), Column("REASON")), empty="there is no override"
    )
    for each in rows:
        table.add(each.image, format_time(each.until, now), each.reason)
    return [by_replica(table, rows)]


def ended_tables(found: policy_reports.OverrideRow, now: float) -> Sequence[Table]:
    table = Table((Column("IMAGE", whole=True), Column("ENDED")))
    table.add(found.image, format_time(found.until, now))
    return [table]


@policy.command("replay", cls=ExplainedCommand)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--last", "period", default="7d", show_default=True, metavar="DURATION", help="How far back.")
@common
def replay_pulls(call: CommandContext, file: Path, period: str) -> None:
    """Judge past pulls by another policy.

    FILE is a configuration; `policy` may be its only key. Lists recorded pulls (policy.journal) that this
    policy would have refused or would have had to verify, and their users. Looks only at names. Exits with 1
    if the policy would have refused a pull.
    """

    async def work(operations: Operations) -> None:
        from proxy.policy.replay import replay
        from storage.maintenance.pull_journal import PulledReference

        proposed = load(file).policy
        rows = await operations.pulled(period)
        found = replay(
            proposed, [msgspec.convert(each, PulledReference, from_attributes=True) for each in rows]
        )
        call.print(found, replay_tables)
        if any(each.outcome == "deny" for each in found):
            sys.exit(1)

    call.run(work)


def replay_tables(found: Sequence[ReplayedPull], now: float) -> Sequence[Table]:
    columns = (
        Column("IMAGE", whole=True),
        Column("WHO"),
        Column("PULLS", right=True, drop=2),
        Column("LAST", drop=1),
        Column("OUTCOME"),
        Column("RULE"),
        Column("REASON", drop=3),
    )
    table = Table(columns, empty="nothing would have been refused")
    for each in found:
        last = format_past(each.last, now)
        table.add(each.image, each.who, str(each.count), last, each.outcome, each.rule, each.reason)
    return [table]


COMMANDS = (policy,)
