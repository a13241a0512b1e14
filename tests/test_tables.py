"""The tables of all commands: what fits a terminal of any width loses no value without a sign."""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, count
from typing import Any, Literal

import msgspec
import pytest
from rich.cells import cell_len

import proxy.cli
from proxy.admin import (
    activity_reports,
    extension_reports,
    key_reports,
    models,
    policy_reports,
    reports,
    tag_reports,
)
from proxy.cli import (
    audit,
    backups,
    bundles,
    content,
    copy,
    doctor,
    extensions,
    fills,
    history,
    keys,
    maintenance,
    migrate,
    moves,
    offline,
    pins,
    policy,
    removal,
    savings,
    status,
    stores,
)
from proxy.cli.console import write
from proxy.cli.tables import Column, Table, _widths, clean, fitted, plain, shortened, shortened_digest
from proxy.doctor.checks import Diagnosis
from proxy.policy.replay import ReplayedPull
from proxy.transfer import results

NOW = 1_700_000_000.0
DIGEST = "sha256:" + "ab" * 32
COLUMNS = (Column("NAME"), Column("SIZE", right=True), Column("DIGEST", digests=True))
WIDTHS = (60, 80, 120, 200)

type_hints = cache(typing.get_type_hints)

_SHORT = {"repository": "docker.io/library/nginx", "reference": "docker.io/library/nginx:1.27", "tag": "1.27"}
_LONG = {
    "repository": "registry.example:5000/a-team/some-service/with-a-name-of-many-parts",
    "reference": "registry.example:5000/a-team/some-service:2026.11.3-debian-12-r0-amd64",
    "tag": "2026.11.3-debian-12-r0-amd64",
}
_TEXTS = {
    "media_type": "application/vnd.oci.image.manifest.v1+json",
    "error": "registry.example answered 503: the service has no capacity, and asks to come back later",
    "url": "https://hooks.example:8443",
    "pattern": "docker.io/library/*:3*",
    "client": "2001:db8:7:1::beef",
    "what": DIGEST,
    "state": "warning",
    "platform": "linux/arm64/v8",
    "source": "registry.example/team/app:1.2.3",
    "destination": "other.example/mirror/app:1.2.3",
    "subject": "/etc/containers/registries.conf.d/entrepot.conf",
}


class Filler:
    """Makes values of a model by the types of its fields; no two names are equal."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names
        self._numbers = count(1)

    def make(self, kind: Any, name: str = "", depth: int = 0) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self.make(arguments[0], name, depth)
        if origin is dict:
            return {self._text(each): self._text(each) for each in ("pattern", "reference")}
        if origin is Literal:
            return arguments[-1]
        if origin in (list, Sequence):
            return [self.make(arguments[0], name, depth + 1) for _ in range(3)] if depth < 3 else []
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = type_hints(kind)
            return kind(**{each: self.make(hints[each], each, depth) for each in kind.__struct_fields__})
        if kind is bool:
            return False
        if kind is int:
            return 987_654_321 + next(self._numbers)
        if kind is float:
            return NOW - 86_000.0 if name not in ("hit_ratio", "byte_hit_ratio") else 0.9876
        return self._text(name)

    def _text(self, name: str) -> str:
        if name in ("digest", "old", "new", "before", "moved", "lacking", "left_out"):
            return f"sha256:{next(self._numbers):0>6}{'0' * 58}"
        if name in self._names:
            return f"{self._names[name]}{next(self._numbers)}"
        if name == "references":
            return f"{self._names['reference']}{next(self._numbers)}"
        return _TEXTS.get(name, f"some {name.replace('_', ' ')}")


def _collection(found: reports.Collected, now: float) -> Sequence[Table]:
    return removal.collection_tables(msgspec.structs.replace(found, dry_run=True), now)


def _repositories(listed: models.Listed, now: float) -> Sequence[Table]:
    return content.listing_tables(msgspec.structs.replace(listed, images=[]), now)


def _ready(rows: list[reports.ReadyRow], now: float) -> Sequence[Table]:
    return offline.ready_tables(rows, {each.asked: "compose.yml:12" for each in rows}, ["app"])


VIEWS: dict[str, tuple[Any, Callable[[Any, float], Sequence[Table]]]] = {
    "ls": (models.Listed, _repositories),
    "ls --tags": (models.Listed, content.listing_tables),
    "show": (models.ImageTree, content.tree_tables),
    "stats": (models.Stats, savings.stats_tables),
    "fills": (list[models.FillRow], fills.fill_tables),
    "why": (reports.Why, status.why_tables),
    "webhooks": (list[models.WebhookRow], status.webhook_tables),
    "extensions": (list[extension_reports.ExtensionRow], extensions.extension_tables),
    "pins": (list[models.PinRow], pins.pin_tables),
    "unpin": (reports.Unpinned, pins.unpinned_tables),
    "purge": (reports.Purged, removal.purge_tables),
    "delete": (reports.Deleted, stores.deleted_tables),
    "tag": (reports.Tagged, stores.tagged_tables),
    "history": (tag_reports.TagHistory, history.history_tables),
    "diff": (tag_reports.ImageDiff, history.diff_tables),
    "audit": (list[activity_reports.AuditRow], audit.audit_tables),
    "evict --list": (activity_reports.Evictable, removal.evictable_tables),
    "evict": (reports.Evicted, removal.evict_tables),
    "collect": (reports.Collected, removal.collection_tables),
    "collect --dry-run": (reports.Collected, _collection),
    "refresh": (reports.Refreshed, maintenance.refresh_tables),
    "scrub": (reports.Scrubbing, maintenance.scrub_tables),
    "warm": (list[reports.WarmRow], offline.warm_tables),
    "ready": (list[reports.ReadyRow], _ready),
    "drill": (reports.Drilling, offline.drill_tables),
    "export": (results.Exported, bundles.export_tables),
    "import": (results.BundleImported, bundles.import_tables),
    "import --from-registry-dir": (results.Migrated, migrate.migration_tables),
    "migrate --to": (results.EngineMoved, moves.moved_tables),
    "backup": (results.BackedUp, backups.backup_tables),
    "restore": (results.Restored, backups.restore_tables),
    "reload": (reports.Reloading, moves.reload_tables),
    "copy": (results.Copied, copy.copy_tables),
    "policy test": (list[policy.CaseResult], policy.case_tables),
    "policy explain": (policy_reports.PolicyExplained, policy.explained_tables),
    "policy replay": (list[ReplayedPull], policy.replay_tables),
    "policy held": (list[policy_reports.HeldRow], policy.held_tables),
    "policy approve": (policy_reports.HeldRow, policy.decided_tables),
    "policy overrides": (list[policy_reports.OverrideRow], policy.override_tables),
    "policy override --end": (policy_reports.OverrideRow, policy.ended_tables),
    "keys list": (list[key_reports.KeyRow], keys.key_tables),
    "keys create": (key_reports.KeyCreated, keys.created_tables),
    "keys end-tokens": (key_reports.TokensEnded, keys.ended_tables),
    "keys revoke": (key_reports.KeyRevoked, keys.revoked_tables),
    "doctor": (Diagnosis, doctor.check_tables),
}


def made(name: str, names: dict[str, str]) -> list[Table]:
    kind, view = VIEWS[name]
    return list(view(Filler(names).make(kind), NOW))


def test_every_table_is_looked_at() -> None:
    found = {
        each
        for module in pkgutil.iter_modules(proxy.cli.__path__, "proxy.cli.")
        for name, each in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction)
        if name.endswith("_tables")
    }
    looked = {view for _, view in VIEWS.values()} | {offline.ready_tables}
    assert found - looked == set()


@pytest.mark.parametrize("names", [_SHORT, _LONG], ids=["short", "long"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_a_terminal_shows_or_names_all(name: str, width: int, names: dict[str, str]) -> None:
    for table in made(name, names):
        if not table.rows:
            continue
        lines = [line.plain for line in fitted(table, width)]
        assert max(map(cell_len, lines)) <= width
        widths = _widths(short(table), width)
        if widths is None:
            assert_blocks(table, lines)
        else:
            assert_columns(table, widths, lines)


def short(table: Table) -> Table:
    """The table with its digests as a terminal shows them."""
    found = Table(table.columns)
    for row in table.rows:
        cells = zip(row, table.columns, strict=True)
        found.add(*(shortened_digest(cell) if column.digests else cell for cell, column in cells))
    return found


def assert_blocks(table: Table, lines: list[str]) -> None:
    """Every cell is behind its title, whole but for where its lines are broken."""
    room = max(len(column.title) for column in table.columns) + 2
    blocks = "\n".join(lines).split("\n\n")
    for row, block in zip(short(table).rows, blocks, strict=True):
        found: dict[str, str] = {}
        title = ""
        for line in block.splitlines():
            title = line[:room].strip() or title
            found[title] = found.get(title, "") + line[room:]
        expected = zip(row, table.columns, strict=True)
        assert {title: joined(cell) for title, cell in found.items()} == {
            column.title: joined(cell) for cell, column in expected if cell
        }


def assert_columns(table: Table, widths: dict[int, int], lines: list[str]) -> None:
    """Every cell is in its column, whole or shortened with an ellipsis, or its column is named."""
    below = next(number for number, line in enumerate(lines) if line.startswith("───")) + 1
    note = " ".join(lines).partition("not shown:")[2]
    starts = dict(zip(widths, accumulate([0, *(each + 2 for each in widths.values())]), strict=False))
    columns = {
        number: joined("".join(line[start : start + widths[number]] for line in lines[below:]))
        for number, start in starts.items()
    }
    for number, column in enumerate(table.columns):
        cells = [row[number] for row in short(table).rows]
        if number not in widths:
            assert column.title in note or not any(cells)
            continue
        if column.whole:
            assert all(len(cell) <= widths[number] or len(cell) > 20 for cell in cells)
            cells = [shortened(cell, widths[number]) for cell in cells]
            assert len(set(cells)) == len({row[number] for row in table.rows})
        assert columns[number].startswith(joined("".join(cells)))
        assert column.title.split()[0] in "".join(lines[:below])


def joined(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", VIEWS)
def test_a_pipe_is_never_cut(name: str) -> None:
    for names in (_SHORT, _LONG):
        for table in made(name, names):
            found = io.StringIO()
            write(table, file=found)
            for text in [cell for row in table.rows for cell in row] + table.notes:
                assert text in found.getvalue()
            assert "…" not in found.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield


def drawn(table: Table, **options: Any) -> str:
    found = Terminal()
    write(table, file=found, **options)
    return found.getvalue()


def test_wide_is_as_in_a_pipe() -> None:
    (table,) = made("ls --tags", _LONG)
    assert drawn(table, wide=True).startswith(plain(table))
    assert "--wide" in drawn(table)


def test_colors_say_how_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table((Column("STATE", state=True), Column("ERROR", fault=True), Column("OTHER")))
    table.add("failed", "", "failed")
    table.add("warning", "", "ok")
    table.add("ok", "gone", "")
    lines = drawn(table).splitlines()
    assert lines[2].startswith("\x1b[31mfailed")
    assert lines[3].startswith("\x1b[33mwarning")
    assert lines[4].startswith("\x1b[32mok")
    assert "\x1b[31mgone" in lines[4]
    assert all(line.count("\x1b[3") == number for line, number in zip(lines[2:], (1, 1, 2), strict=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in drawn(table)


def test_columns_without_values_go_first_and_need_no_name() -> None:
    table = Table((Column("NAME", whole=True), Column("ERROR" * 4), Column("SIZE", right=True, drop=1)))
    table.add("a" * 45, "", "1.0 KiB")
    assert [line.plain for line in fitted(table, 60)][-1] == f"{'a' * 45}  1.0 KiB"


def test_names_that_would_look_alike_are_not_shortened() -> None:
    table = Table((Column("NAME", whole=True), Column("SIZE", right=True)))
    for letter in "xy":
        table.add(f"{'a' * 25}{letter}{'b' * 25}", "1.0 KiB")
    found = [line.plain for line in fitted(table, 40)]
    assert found[0].startswith("NAME  aaa")
    assert joined("".join(found)).count("x") == joined("".join(found)).count("y") == 1


def test_a_short_name_loses_its_middle() -> None:
    assert shortened("docker.io/library/nginx:1.27", 28) == "docker.io/library/nginx:1.27"
    assert shortened("docker.io/library/nginx:1.27", 21) == "docker.io/…nginx:1.27"
    assert cell_len(shortened("圖" * 20, 12)) <= 12
    assert shortened("abc", 1) == "…"


def table() -> Table:
    found = Table(COLUMNS, empty="nothing is there", notes=["2 in all"])
    found.add("alpine", "1.0 KiB", DIGEST)
    found.add("a-longer-name", "12 B", DIGEST)
    return found


def test_elsewhere_columns_are_whole() -> None:
    found = io.StringIO()
    write(table(), file=found)
    assert found.getvalue().splitlines() == [
        "NAME              SIZE  DIGEST",
        f"alpine         1.0 KiB  {DIGEST}",
        f"a-longer-name     12 B  {DIGEST}",
        "2 in all",
    ]


def test_on_a_terminal_digests_are_short() -> None:
    assert "sha256:abababababab" in drawn(table())
    assert DIGEST not in drawn(table())


def test_without_rows_a_sentence_says_so() -> None:
    found = io.StringIO()
    write(Table(COLUMNS, empty="nothing is there"), file=found)
    assert found.getvalue() == "nothing is there\n"


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_what_steers_a_terminal_is_taken_out(file: type[io.StringIO]) -> None:
    steering = Table((Column("TYPE"),), notes=["\x1b[2J"])
    steering.add("[red]\x1b]0;title\x07")
    found = file()
    write(steering, file=found)
    assert "\x1b]" not in found.getvalue()
    assert "\x1b[2J" not in found.getvalue()
    assert "[red]" in found.getvalue()


def test_small_words() -> None:
    assert shortened_digest(f"└─ {DIGEST}") == "└─ sha256:abababababab"
    assert shortened_digest("alpine:3") == "alpine:3"
    assert clean("a\nb") == "a\N{REPLACEMENT CHARACTER}b"


def test_plain_aligns_by_the_widest() -> None:
    found = Table((Column("A"), Column("B")))
    found.add("longer", "x")
    assert plain(found) == "A       B\nlonger  x\n"


def test_what_a_purge_forgets_is_said_in_plain_words() -> None:
    found = reports.Purged(
        references=[], kept=[], manifests=0, links=0, blobs=0, bytes=0, absences=1, dry_run=False
    )
    (table,) = removal.purge_tables(found, 0.0)
    assert table.notes == [
        "forgotten: 1 answer of upstream that it does not have something; it is asked again"
    ]
    (table,) = removal.purge_tables(msgspec.structs.replace(found, absences=2, dry_run=True), 0.0)
    assert table.notes == [
        "would be forgotten: 2 answers of upstream that it does not have something; it is asked again"
    ]
