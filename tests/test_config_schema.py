"""The JSON Schema of the configuration: it accepts what the server accepts, and finds mistakes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft7Validator

from proxy.cli.main import main
from proxy.config.fields import Section
from proxy.config.loader import build
from proxy.config.notation import is_secret, write_duration, write_size, written
from proxy.config.quantities import parse_duration, parse_size
from tests import chart, config_schema
from tests.configuring import SECTIONS
from tests.test_schema import EXAMPLE, uncommented

ROOT = Path(__file__).parent.parent


@cache
def validator() -> Draft7Validator:
    schema = json.loads(config_schema.FILE.read_text(encoding="utf-8"))
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def faults(text: str) -> list[str]:
    """The paths of what is wrong."""
    return [each.json_path for each in validator().iter_errors(yaml.safe_load(text) or {})]


def configurations() -> list[tuple[str, str]]:
    """The blocks of YAML in the documentation that are configurations: with keys of the top level alone."""
    top = validator().schema["properties"].keys()
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, block in enumerate(
            re.findall(r"(?s)```yaml\n(.*?)```", page.read_text(encoding="utf-8"))
        ):
            try:
                tree = yaml.safe_load(block)
            except yaml.YAMLError:
                continue  # such as several documents, for a cluster
            if isinstance(tree, dict) and tree and tree.keys() <= top and "{…}" not in block:
                found.append((f"{page.name}-{number}", block))
    return found


def test_the_schema_is_up_to_date() -> None:
    assert config_schema.FILE.read_text(encoding="utf-8") == config_schema.made(), (
        "python -m tests.config_schema writes it"
    )


def test_the_chart_has_it_as_it_is_now() -> None:
    assert chart.SCHEMA.read_text(encoding="utf-8") == chart.schema(), (
        "python -m tests.config_schema writes it"
    )


def test_the_command_prints_it() -> None:
    said = CliRunner().invoke(main, ["config", "schema"])
    assert (said.exit_code, json.loads(said.output)) == (0, validator().schema)


def test_the_example_is_valid_and_names_the_schema() -> None:
    assert faults(EXAMPLE.read_text(encoding="utf-8")) == []
    assert faults(uncommented()) == []
    first = EXAMPLE.read_text(encoding="utf-8").partition("\n")[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None and (EXAMPLE.parent / named[1]).samefile(config_schema.FILE)


@pytest.mark.parametrize(
    "block", [block for _, block in configurations()], ids=[name for name, _ in configurations()]
)
def test_what_the_documentation_shows_is_valid(block: str) -> None:
    assert faults(block) == []


def test_the_documentation_shows_some() -> None:
    assert len(configurations()) > 30


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("lisen: x", "$"),
        ("drain: 10", "$.drain"),
        ("drain: 1m1h", "$.drain"),
        ("drain: ten", "$.drain"),
        ("disk: {cache_limit: 500}", "$.disk.cache_limit"),
        ("disk: {cache_limit: 500 apples}", "$.disk.cache_limit"),
        ("disk: {evict_to: 0.9}", "$.disk.evict_to"),
        ("disk: {scrub: 0}", "$.disk.scrub"),
        ("disk: {path: ~/x}", "$.disk.path"),
        ("workers: 0", "$.workers"),
        ("workers: 1.5", "$.workers"),
        ("log: {level: loud}", "$.log.level"),
        ("log: {access: none}", "$.log.access"),
        ("offline: 'no'", "$.offline"),
        ("tls: {minimum: '1.1', certificate: /a}", "$.tls.minimum"),
        ("tls: {key: /a}", "$.tls"),
        ("pins: alpine", "$.pins"),
        ("pins: [{keep_fresh: 1h}]", "$.pins[0]"),
        ("warm: [{images: [a], at: '25:00'}]", "$.warm[0].at"),
        ("webhooks: [{name: Hook, url: 'http://a'}]", "$.webhooks[0].name"),
        ("namespaces: {a: {fresh_for: sometimes}}", "$.namespaces.a.fresh_for"),
        ("namespaces: {a: {upstream: {url: []}}}", "$.namespaces.a.upstream"),
        ("access: {rules: [{who: [anonymous], may: [eat]}]}", "$.access.rules"),
    ],
)
def test_a_mistake_is_found(text: str, path: str) -> None:
    found = faults(text)
    assert [each for each in found if each.startswith(path) or path.startswith(each)] == found != []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "log:",
        "drain: 0",
        "drain: ${DRAIN}",
        "log: {level: '${LEVEL}'}",
        "disk: {scrub: off, collect_every: 'off', min_free: 0, keep_for: never}",
        "workers: auto",
        "default_namespace: null",
        "pins: ['docker.io/library/alpine:3*', {match: 'docker.io/a:*', keep_fresh: 1h}]",
        "namespaces: {a: {upstream: 'https://a'}, b: {upstream: ['https://a', 'https://b']}, c: {store: {}}}",
        "tls: {certificate: /a, minimum: 1.3}",
    ],
)
def test_what_the_server_accepts_is_valid(text: str) -> None:
    assert faults(text) == []


FIELDS = [(section, field) for section in SECTIONS for field in msgspec.structs.fields(section)]


@pytest.mark.parametrize(
    ("section", "field"), FIELDS, ids=[f"{each.__name__}-{of.name}" for each, of in FIELDS]
)
def test_a_default_is_written_as_it_is_read(section: type[Section], field: Any) -> None:
    if field.default in (msgspec.NODEFAULT, None, ()) or isinstance(field.default, Section):
        return
    text = written(field.type, field.default)
    assert build(field.type, text, "key") == field.default
    assert json.loads(json.dumps(text)) == text


@pytest.mark.parametrize("text", ["1ms", "999ms", "1s", "1m30s", "1h", "1d12h", "30d", "400d"])
def test_durations_are_written_in_their_largest_units(text: str) -> None:
    assert write_duration(parse_duration(text)) == text


@pytest.mark.parametrize("text", ["1B", "1000B", "1KiB", "1536KiB", "10MiB", "500GiB", "2TiB"])
def test_sizes_are_written_in_their_largest_unit(text: str) -> None:
    assert write_size(parse_size(text)) == text


def test_what_is_secret() -> None:
    secret = {f"{section.__name__}.{field.encode_name}" for section, field in FIELDS if is_secret(field.type)}
    assert secret >= {
        "Config.admin_token",
        "Login.password",
        "UpstreamConfig.password",
        "UpstreamConfig.proxy",
        "SharedConfig.records",
        "SharedConfig.secret_key",
        "WebhookConfig.headers",
        "WebhookConfig.secret",
        "WebhookConfig.url",
        "PeersConfig.secret",
    }
    named = {f"{section.__name__}.{field.encode_name}" for section, field in FIELDS}
    assert {each for each in named if re.search(r"\.(password|secret|admin_token)$", each)} <= secret
