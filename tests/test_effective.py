"""Which values a configuration has, where they come from, and how two differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxy.cli.main import main
from proxy.config.effective import BUILT_IN, DEFAULT, HIDDEN, EffectiveValue, differences, effective
from proxy.config.errors import ConfigError
from proxy.config.settings import parse_setting

TEXT = """\
listen: ":5000"
disk:
  path: /data
  cache_limit: 500GiB
webhooks:
- name: hook
  url: https://h.example/hook?token=hunter2
  headers: {X-Token: hunter3}
- {name: other, url: "https://other.example"}
namespaces:
  docker.io:
    upstream:
      url: https://registry-1.docker.io
      username: me
      password: ${PASSWORD}
    aliases: [hub]
    tags:
    - {match: latest, fresh_for: 1m}
  quay.io: {upstream: "https://quay.io"}
  team.example: {store: {}}
access:
  groups: {ops: [ann, bob]}
"""
ENVIRON = {"PASSWORD": "hunter4"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "entrepot.yml"
    path.write_text(TEXT)
    return path


def found(path: Path | None, *settings: str, **environ: str) -> dict[str, EffectiveValue]:
    values = effective(path, {**ENVIRON, **environ}, [parse_setting(each) for each in settings])
    assert len({each.key for each in values}) == len(values)
    return {each.key: each for each in values}


def test_each_value_says_where_it_comes_from(file: Path) -> None:
    values = found(
        file,
        "namespaces.docker.io.fresh_for=1h",
        ENTREPOT_DISK__CACHE_LIMIT="1TiB",
        ENTREPOT_NAMESPACES__QUAY_IO__OFFLINE="true",
        ENTREPOT_LOG__LEVEL="debug",
    )
    expected = {
        "listen": (":5000", f"{file}:1"),
        "disk.path": ("/data", f"{file}:3"),
        "disk.cache_limit": ("1TiB", "ENTREPOT_DISK__CACHE_LIMIT"),
        "disk.scrub": ("10MiB", DEFAULT),
        "log.level": ("debug", "ENTREPOT_LOG__LEVEL"),
        "log.format": ("auto", DEFAULT),
        "webhooks[0].name": ("hook", f"{file}:6"),
        "webhooks[1].url": (HIDDEN, f"{file}:9"),
        "namespaces.docker.io.fresh_for": ("1h", "--set"),
        "namespaces.docker.io.tags[0].fresh_for": ("1m", f"{file}:18"),
        "namespaces.docker.io.library": (True, BUILT_IN),
        "namespaces.quay.io.library": (False, DEFAULT),
        "namespaces.quay.io.offline": (True, "ENTREPOT_NAMESPACES__QUAY_IO__OFFLINE"),
        "namespaces.quay.io.upstream.url": ("https://quay.io", f"{file}:19"),
        "namespaces.team.example.store": ({}, f"{file}:20"),
        "namespaces.team.example.store.sparse": (False, DEFAULT),
        "access.groups.ops": (["ann", "bob"], f"{file}:22"),
        "workers": ("auto", DEFAULT),
        "tls": (None, DEFAULT),
        "default_namespace": ("docker.io", DEFAULT),
    }
    assert {key: (values[key].value, values[key].source) for key in expected} == expected
    aliases = values["namespaces.docker.io.aliases"]
    assert aliases.value[:2] == ["hub", "index.docker.io"] and aliases.source == f"{file}:16"


def test_no_secret_is_shown(file: Path) -> None:
    values = found(file, ENTREPOT_ADMIN_TOKEN="hunter5")
    assert "hunter" not in str(values)
    for key in (
        "admin_token",
        "webhooks[0].url",
        "webhooks[0].headers",
        "namespaces.docker.io.upstream.password",
    ):
        assert values[key].value == HIDDEN
    assert values["namespaces.quay.io.upstream.password"].value is None  # there is none


def test_without_a_file_the_well_known_registries_are_built_in() -> None:
    values = found(None)
    assert values["namespaces.ghcr.io.upstream.url"] == EffectiveValue(
        "namespaces.ghcr.io.upstream.url", "https://ghcr.io", BUILT_IN
    )
    assert not [each for each in values.values() if each.given]
    assert values["admin"].value == "127.0.0.1:5001"


def test_an_address_that_depends_on_another_is_shown(tmp_path: Path) -> None:
    values = found(None, "listen=127.0.0.1:5001")
    assert values["admin"].value == "127.0.0.1:5002"


def test_what_an_alias_brings_has_the_line_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text(
        "namespaces:\n"
        "  a.example: &a {upstream: 'https://a', fresh_for: 1h}\n"
        "  b.example:\n"
        "    <<: *a\n"
        "    offline: true\n"
        "  c.example: *a\n"
    )
    values = found(path)
    assert values["namespaces.a.example.fresh_for"].source == f"{path}:2"
    assert values["namespaces.b.example.fresh_for"].source == f"{path}:3"
    assert values["namespaces.b.example.offline"].source == f"{path}:5"
    assert values["namespaces.c.example.fresh_for"].value == "1h"


def test_a_configuration_that_is_wrong_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("drain: soon")
    with pytest.raises(ConfigError, match="ENTREPOT_DRAIN: drain: expected a duration"):
        found(path, ENTREPOT_DRAIN="later")


# Differences


def test_files_differ_by_what_they_mean(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yml"
    other.write_text(
        TEXT.replace("500GiB", "512000MiB")
        .replace("path: /data", "path: /other")
        .replace("fresh_for: 1m", "fresh_for: 60s")
        .replace("hunter3", "hunter6")
        .replace("quay.io: ", "ghcr.io: ")
    )
    changed = {each.key: (each.old, each.new) for each in differences(file, other)}
    assert changed["disk.path"] == ("/data", "/other")
    assert changed["webhooks[0].headers"] == (HIDDEN, HIDDEN)
    assert changed["namespaces.quay.io.upstream.url"] == ("https://quay.io", None)
    assert changed["namespaces.ghcr.io.upstream.url"] == (None, "https://quay.io")
    rest = {each for each in changed if not each.startswith(("namespaces.quay.io.", "namespaces.ghcr.io."))}
    assert rest == {"disk.path", "webhooks[0].headers"}
    assert differences(file, file) == []


def test_of_what_only_one_has_its_defaults_are_no_difference(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yml", tmp_path / "other.yml"
    one.write_text("namespaces: {a.example: {upstream: 'https://a'}}\n")
    other.write_text(
        "namespaces: {a.example: {upstream: 'https://a'}, local: {store: {}}, b.example: {upstream: 'https://b'}}\n"
        "pins: ['a.example/*']\n"
        "access: {rules: [{who: [anonymous], may: [pull]}]}\n"
        "log:\n"
    )
    assert {each.key: (each.old, each.new) for each in differences(one, other)} == {
        "namespaces.local.store": (None, {}),
        "namespaces.b.example.upstream.url": (None, "https://b"),
        "pins[0].match": (None, "a.example/*"),
        "access.rules[0].who": (None, ["anonymous"]),
        "access.rules[0].may": (None, ["pull"]),
    }


def test_a_file_differs_from_the_defaults_by_what_it_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("drain: 10s\nlog: {level: info}\n")
    assert [(each.key, each.old, each.new) for each in differences(None, path)] == [("drain", "30s", "10s")]


# The commands


def run(*arguments: str) -> tuple[int, str]:
    said = CliRunner().invoke(main, ["config", *arguments], env={"PASSWORD": "x", "COLUMNS": "200"})
    return said.exit_code, said.output


def test_show_prints_what_is_set(file: Path) -> None:
    status, text = run("show", "-c", str(file), "--set", "drain=5s")
    assert status == 0
    lines = [line.split() for line in text.splitlines()]
    assert ["drain", "5s", "--set"] in lines
    assert ["disk.path", "/data", f"{file}:3"] in lines
    assert "default" not in text
    status, text = run("show", "-c", str(file), "--effective")
    assert ["disk.scrub", "10MiB", "default"] in [line.split() for line in text.splitlines()]
    status, text = run("show", "-c", str(file), "--json")
    assert {"key": "listen", "value": ":5000", "source": f"{file}:1"} in json.loads(text)


def test_show_refuses_what_the_server_would(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("drain: soon\n")
    status, text = run("show", "-c", str(path))
    assert status == 2 and "drain: expected a duration" in text


def test_diff_says_how_changes_are_applied(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yml"
    other.write_text(
        TEXT.replace("path: /data", "path: /other").replace("access:", "log: {level: debug}\naccess:")
    )
    status, text = run("diff", str(file), str(other))
    assert status == 1
    assert ["disk.path", "/data", "/other"] in [line.split() for line in text.splitlines()]
    for note in ("stays in the old directory", "until a restart", "a reload (SIGHUP) applies"):
        assert note in text
    status, text = run("diff", str(file), str(file))
    assert (status, text) == (0, "they mean the same\n")
    status, text = run("diff", str(file), str(other), "--json")
    assert {"key": "disk.path", "old": "/data", "new": "/other"} in json.loads(text)
