"""Keys that are set by the environment and by options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from proxy.cli.configured import find_configuration, used
from proxy.cli.help import EXAMPLES, GROUPS
from proxy.cli.main import main
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.config.settings import parse_setting

FILE = """\
disk: {path: /cache, cache_limit: 1GiB}
namespaces:
  docker.io: {upstream: https://hub.example, hosts: [hub.example]}
  registry.example:5000: {upstream: {url: https://registry.example:5000}}
webhooks: [{name: a, url: "https://a.example"}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "entrepot.yml"
    found.write_text(FILE)
    return found


def get(config: Any, key: str) -> Any:
    """The value of a key, in the notation of Python."""
    return eval(f"config.{key}", {"config": config})


PLACES = [
    ("DISK__PATH", "disk.path", "/data", "disk.path", Path("/data")),
    ("WORKERS", "workers", "3", "workers", 3),
    ("OFFLINE", "offline", "true", "offline", True),
    ("DRAIN", "drain", "0", "drain", 0.0),
    ("DISK__MIN_FREE", "disk.min_free", "0", "disk.min_free.size", 0),
    ("DISK__CACHE_LIMIT", "disk.cache_limit", "", "disk.cache_limit", None),
    ("ADMIN", "admin", "off", "admin", None),
    ("ADMIN_TOKEN", "admin_token", "12345", "admin_token", "12345"),
    ("LOG__FORMAT", "log.format", "json", "log.format", "json"),
    ("DEFAULT_NAMESPACE", "default_namespace", "null", "default_namespace", None),
    (
        "NAMESPACES__DOCKER_IO__FRESH_FOR",
        "namespaces.docker.io.fresh_for",
        "1h",
        "namespaces['docker.io'].fresh_for",
        3600.0,
    ),
    (
        "NAMESPACES__DOCKER_IO__UPSTREAM__USERNAME",
        "namespaces.docker.io.upstream.username",
        "",
        "namespaces['docker.io'].upstream.url",
        ("https://hub.example",),
    ),
    (
        "NAMESPACES__REGISTRY_EXAMPLE_5000__LAZY",
        "namespaces.registry.example:5000.lazy",
        "true",
        "namespaces['registry.example:5000'].lazy",
        True,
    ),
    ("NAMESPACES__LOCAL__STORE", "namespaces.local.store", "{}", "namespaces['local'].store.sparse", False),
    (
        "NAMESPACES__DOCKER_IO__ALIASES",
        "namespaces.docker.io.aliases",
        "[hub, index]",
        "namespaces['docker.io'].aliases[:2]",
        ("hub", "index"),
    ),
    (
        "NAMESPACES__DOCKER_IO__HOSTS",
        "namespaces.docker.io.hosts",
        "a.example",
        "namespaces['docker.io'].hosts",
        ("a.example",),
    ),
    (
        "NAMESPACES__DOCKER_IO__HOSTS__1",
        "namespaces.docker.io.hosts[1]",
        "b.example",
        "namespaces['docker.io'].hosts[1]",
        "b.example",
    ),
    ("WEBHOOKS__0__URL", "webhooks[0].url", "https://b.example", "webhooks[0].url", "https://b.example"),
    ("WEBHOOKS__0__HEADERS__X-Key", "webhooks.0.headers.X-Key", "k", "webhooks[0].headers", {"X-Key": "k"}),
    ("PINS__0", "pins[0]", "docker.io/library/a:1", "pins[0].match", "docker.io/library/a:1"),
    ("ACCESS__GROUPS__DEV", "access.groups.DEV", "[ann]", "access.groups", {"DEV": ("ann",)}),
]


@pytest.mark.parametrize(("variable", "key", "text", "place", "value"), PLACES)
def test_any_key_can_be_set(path: Path, variable: str, key: str, text: str, place: str, value: Any) -> None:
    assert get(load(path, {f"ENTREPOT_{variable}": text}), place) == value
    assert get(load(path, {}, [parse_setting(f"{key}={text}")]), place) == value


def test_without_a_file_the_well_known_registries_stay() -> None:
    config = load(
        None, {"ENTREPOT_NAMESPACES__LOCAL__STORE": "{}", "ENTREPOT_NAMESPACES__GHCR_IO__OFFLINE": "true"}
    )
    assert [*config.hosted()] == ["local"]
    assert config.namespaces["ghcr.io"].offline
    assert len(config.cached()) == len(load(None, {}).namespaces)


def test_an_option_replaces_a_variable_that_replaces_the_file(path: Path) -> None:
    environ = {"ENTREPOT_DISK__PATH": "/b", "ENTREPOT_DISK__CACHE_LIMIT": "2GiB"}
    config = load(path, environ, [parse_setting("disk.path=/c")])
    assert (str(config.disk.path), config.disk.cache_limit) == ("/c", 2 << 30)


def test_variables_of_others_are_no_keys() -> None:
    environ = {
        "ENTREPOT_PORT": "tcp://10.0.0.1:80",
        "ENTREPOT_SERVICE_HOST": "10.0.0.1",
        **{f"ENTREPOT_{name}_PORT_5000_TCP_ADDR": "10.0.0.1" for name in ("DISK", "PEERS", "TLS")},
        **{f"ENTREPOT_{name}_SERVICE_PORT": "80" for name in ("DISK", "PEERS", "NAMESPACES", "TLS")},
        "ENTREPOT_CONFIG": "/x",
    }
    assert load(None, environ) == load(None, {})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DISK_CACHE_LIMIT", "DISK__CACHE_LIMIT"),
        ("ACCESS_TOKEN_ENDPOINT_LIFETIME", "ACCESS__TOKEN_ENDPOINT__LIFETIME"),
        ("NAMESPACES_DOCKER_IO_FRESH_FOR", "NAMESPACES__DOCKER_IO__FRESH_FOR"),
        ("WEBHOOKS_0_URL", "WEBHOOKS__0__URL"),
        ("NAMESPACES_DOCKER_IO_UPSTREAM_URL", "NAMESPACES__DOCKER_IO__UPSTREAM__URL"),
    ],
)
def test_a_variable_with_one_underscore_for_two_is_refused(variable: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {f"ENTREPOT_{variable}": "1"})
    assert str(caught.value) == f"ENTREPOT_{variable}: is no key; did you mean ENTREPOT_{meant}?"


@pytest.mark.parametrize(
    ("variable", "key", "text", "cause"),
    [
        ("DISK__CACHE_LIMIT", "disk.cache_limit", "much", "disk.cache_limit: expected a size"),
        ("DISK__PTH", "disk.pth", "/x", "disk.pth: unknown key; did you mean path?"),
        ("DRAIN__X", "drain.X", "1s", "drain: has no key X in it"),
        (
            "WEBHOOKS__5__URL",
            "webhooks[5].url",
            "x",
            "webhooks: expected the number of an item from 0 to 1, got 5",
        ),
        (
            "WEBHOOKS__A__URL",
            "webhooks.A.url",
            "x",
            "webhooks: expected the number of an item from 0 to 1, got A",
        ),
        ("TLS", "tls", "[", "tls: is not YAML"),
        ("DISK__PATH", "disk.path", "a\nb", "disk.path: holds a line break or another control character"),
        ("NAMESPACES__X__LAZY", "namespaces.x.lazy", "true", "namespaces.x: needs upstream, for a cache"),
        (
            "NAMESPACES__DOCKER_IO__STORE",
            "namespaces.docker.io.store",
            "{}",
            "namespaces.docker.io: has both",
        ),
        ("LOG__LEVEL__X", "log.level.X", "1", "log.level: has no key X in it"),
    ],
)
def test_an_error_names_its_source(path: Path, variable: str, key: str, text: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, {f"ENTREPOT_{variable}": text})
    assert str(caught.value).startswith(f"ENTREPOT_{variable}: {cause}")
    with pytest.raises(ConfigError) as caught:
        load(path, {}, [parse_setting(f"{key}={text}")])
    assert str(caught.value).startswith(f"--set: {cause}")


def test_all_errors_come_at_once(path: Path) -> None:
    path.write_text("disk: {path: 5, scrub: x}\nqqq: 1\nlog: {level: loud}\nwarm: [{every: 1h}, {at: '3'}]\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {"ENTREPOT_DRAIN": "x"})
    lines = [line.removeprefix(f"{path}: ").split(": ")[:2] for line in str(caught.value).splitlines()]
    assert [first if first != "ENTREPOT_DRAIN" else second for first, second in lines] == [
        "disk.path",
        "disk.scrub",
        "qqq",
        "log.level",
        "warm[0]",
        "warm[1].at",
        "drain",
    ]


@pytest.mark.parametrize("text", ["", "disk.path", "=x", "..=x"])
def test_a_setting_needs_key_and_value(text: str) -> None:
    with pytest.raises(ValueError, match="expected key=value"):
        parse_setting(text)


# Which file


def test_where_a_configuration_is_looked_for(tmp_path: Path) -> None:
    system, package = tmp_path / "etc" / "entrepot.yml", tmp_path / "etc" / "entrepot" / "config.yml"
    systems = (system, package)
    environ = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": "relative"}
    own = tmp_path / ".config" / "entrepot.yml"
    assert find_configuration(environ, systems) is None
    for each in (package, system, own):
        each.parent.mkdir(parents=True, exist_ok=True)
        each.write_text("")
        assert find_configuration(environ, systems) == each
    other = tmp_path / "xdg" / "entrepot.yml"
    assert find_configuration({"XDG_CONFIG_HOME": str(other.parent)}, systems) == system
    other.parent.mkdir()
    other.write_text("")
    assert find_configuration({"XDG_CONFIG_HOME": str(other.parent)}, systems) == other


def check(*words: str, **environ: str) -> str:
    result = CliRunner().invoke(main, ["check", *words], env=environ)
    return result.output


def test_which_file_is_read(path: Path, tmp_path: Path) -> None:
    for words, environ in (
        ([str(path)], {}),
        (["-c", str(path)], {}),
        ([str(path)], {"ENTREPOT_CONFIG": "/absent.yml"}),
        ([], {"ENTREPOT_CONFIG": str(path)}),
        ([], {"XDG_CONFIG_HOME": str(tmp_path)}),
    ):
        assert check(*words, **environ).startswith(f"{path} is valid")
    assert "/absent.yml: cannot be read" in check(ENTREPOT_CONFIG="/absent.yml")
    assert "give FILE or --config, not both" in check(str(path), "-c", str(path))
    assert "expected key=value" in check("--set", "x")


def test_what_a_configuration_comes_from() -> None:
    assert used(None, []) == "the built-in configuration"
    settings = [parse_setting("drain=1s"), parse_setting("workers=1")]
    assert used(Path("/e.yml"), settings) == "/e.yml, with --set"


# The help


def test_every_command_is_in_a_group_and_has_an_example() -> None:
    assert set(main.commands) <= {name for names in GROUPS.values() for name in names}
    subcommands = {
        f"{name} {each}"
        for name, group in main.commands.items()
        if isinstance(group, click.Group)
        for each in group.commands
    }
    assert {*main.commands, *subcommands} == EXAMPLES.keys() - {""}
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    for name, command in main.commands.items():
        assert any(line.split()[:1] == [name] and command.get_short_help_str(80) in line for line in lines)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_right(name: str) -> None:
    shown = CliRunner().invoke(main, [*name.split(), "--help"], env={"COLUMNS": "80"}).output
    for line, _ in EXAMPLES[name]:
        program, *words = shlex.split(re.split(" [<>]", line)[0])  # without what a shell does
        assert program == "entrepot"
        assert words[: len(name.split())] == name.split()
        command: click.Command = main
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # raises for an option that there is not
        assert line in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_options_of_serve_are_keys(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    asked: list[Config] = []

    def start(config: Config, *rest: object) -> None:
        asked.append(config)
        raise click.ClickException("enough")

    monkeypatch.setattr("proxy.cli.serve.Supervisor", start)
    words = ["--listen", "0.0.0.0:7000", "--disk", "/d", "--store", "local", "--set", "disk.path=/e"]
    words += ["--upstream", "https://quay.example:8443/path", "--upstream", "hub=https://h.example/a"]
    CliRunner().invoke(main, ["serve", str(path), *words])
    (config,) = asked
    assert (str(config.listen), str(config.disk.path)) == ("0.0.0.0:7000", "/d")
    assert [*config.hosted()] == ["local"]
    urls = {name: upstream.url for name, (_, upstream) in config.cached().items()}
    assert urls["quay.example:8443"] == ("https://quay.example:8443/path",)
    assert urls["hub"] == ("https://h.example/a",)
    for option, value in (
        ("--listen", "x"),
        ("--upstream", "ftp://x"),
        ("--store", "A B"),
        ("--disk", "~/x"),
    ):
        result = CliRunner().invoke(main, ["serve", str(path), option, value])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"entrepot: {option}: ")
