"""From a file to the configuration: YAML, variables, and faults that name the key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config.errors import ConfigError
from proxy.config.hosts import Address
from proxy.config.loader import load
from proxy.config.schema import (
    Config,
)
from proxy.config.settings import Setting
from proxy.config.wellknown import WELL_KNOWN
from tests.configuring import (
    HOOK,
    SECTIONS,
    TOKEN,
    access,
    at,
    fault,
    namespace,
    read,
    upstream,
    webhook,
)


def test_without_a_file_the_well_known_registries_are_cached() -> None:
    config = load(None, {})
    assert config.listen == Address("127.0.0.1", 5000)
    assert config.admin == Address("127.0.0.1", 5001)
    assert config.default_namespace == "docker.io"
    assert {name: each.upstream.url for name, each in config.namespaces.items()} == {
        name: (url,) for name, url in WELL_KNOWN.items()
    }
    hub = config.namespaces["docker.io"]
    assert hub.library
    assert hub.aliases == ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
    assert not config.namespaces["ghcr.io"].library


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "disk:\nlog:\nnamespaces:\nlisten:\n"])
def test_what_is_left_out_or_without_a_value_has_its_default(text: str) -> None:
    assert read(text) == load(None, {})


def test_given_namespaces_replace_the_well_known() -> None:
    config = read(namespace(""))
    assert list(config.namespaces) == ["x"]
    assert config.default_namespace is None


def test_docker_hub_keeps_its_built_in_aliases_beside_given_ones() -> None:
    hub = read(namespace("aliases: [hub, index.docker.io]", "docker.io")).namespaces["docker.io"]
    assert hub.aliases == ("hub", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
    assert hub.library
    assert not read(namespace("library: false", "docker.io")).namespaces["docker.io"].library


@pytest.mark.parametrize(
    ("listen", "admin"),
    [
        ("'127.0.0.1:5000'", "127.0.0.1:5001"),
        ("'127.0.0.1:5001'", "127.0.0.1:5002"),
        ("'0.0.0.0:5001'", "127.0.0.1:5002"),
        ("':5001'", "127.0.0.1:5002"),
        ("localhost:5001", "127.0.0.1:5002"),
        ("'[::]:5001'", "127.0.0.1:5001"),
        ("'10.0.0.1:5001'", "127.0.0.1:5001"),
    ],
)
def test_the_default_of_admin_is_a_port_that_no_other_listener_has(listen: str, admin: str) -> None:
    assert str(read(f"listen: {listen}").admin) == admin
    more = "" if "5000" in listen else f"\nnamespaces: {{x: {{store: {{}}, listen: {listen}}}}}"
    assert str(read(f"listen: '10.0.0.9:5002'{more}").admin) == (admin if more else "127.0.0.1:5001")
    if more:
        assert str(read(f"listen: ':5002'{more}").admin) == admin.replace("5002", "5003")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:5001", "127.0.0.1:5001"),
        ("0.0.0.0:5001", "127.0.0.1:5001"),
        (":5001", "127.0.0.1:5001"),
        (":5001", "[::1]:5001"),
        ("[::]:5001", "[::1]:5001"),
        ("localhost:5001", "[::1]:5001"),
        ("0.0.0.0:5001", "cache.example:5001"),
    ],
)
def test_a_port_has_one_listener(first: str, second: str) -> None:
    for one, other in ((first, second), (second, first)):
        text = f"admin: off\nnamespaces: {{x: {{store: {{}}, listen: '{one}'}}}}\nlisten: '{other}'"
        cause = f"listen listens on {other} already: choose another port"
        assert fault(text) == f"namespaces.x.listen: {cause}"
        text = f"admin: '{one}'\nlisten: '{other}'"
        assert fault(text) == f"admin: {cause}"


def test_listeners_with_one_port_at_different_addresses() -> None:
    for one, other in (
        ("127.0.0.1:1", "127.0.0.1:2"),
        ("127.0.0.1:1", "127.0.0.2:1"),
        ("0.0.0.0:1", "[::]:1"),
        (":0", ":0"),
    ):
        config = read(f"admin: '{one}'\nlisten: '{other}'")
        assert (str(config.admin), str(config.listen)) == (one, other)


def test_only_a_store_has_a_listener_of_its_own() -> None:
    assert fault(namespace("listen: ':1'")).startswith(
        "namespaces.x: listen applies only to private registries"
    )


@pytest.mark.parametrize("name", ["all", "errors", "off"])
def test_which_requests_are_logged(name: str) -> None:
    assert read(f"log: {{access: {name}}}").log.access == name
    assert fault("log: {access: some}") == "log.access: expected one of all, errors, off"


def test_stores_besides_those_of_the_file(tmp_path: Path) -> None:
    local, edge, cache, bad = (
        Setting("--store", ("namespaces", name, "store"), {}, default=True)
        for name in ("local", "edge", "x", "A b")
    )
    config = load(None, {}, [local, edge])
    assert [*config.namespaces] == [*WELL_KNOWN, "local", "edge"]
    assert [*config.hosted()] == ["local", "edge"]
    path = tmp_path / "entrepot.yml"
    path.write_text("namespaces: {x: {upstream: https://x.example}, local: {store: {sparse: true}}}")
    assert [*load(path, {}, [local, edge]).namespaces] == ["x", "local", "edge"]
    assert load(path, {}, [local]).hosted()["local"].sparse
    with pytest.raises(
        ConfigError, match=r"^--store: namespaces.x: has both upstream, for a cache, and store"
    ):
        load(path, {}, [cache])
    with pytest.raises(ConfigError, match=r"^--store: namespaces.A b: expected a host"):
        load(None, {}, [bad])


def test_default_namespace() -> None:
    assert read("default_namespace: null").default_namespace is None
    assert read("default_namespace: ghcr.io").default_namespace == "ghcr.io"
    assert fault("default_namespace: dokcer.io").endswith("did you mean docker.io?")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lisen: 1", "lisen: unknown key; did you mean listen?"),
        ("lisen:", "lisen: unknown key; did you mean listen?"),
        ("log: {qqq: 1}", "log.qqq: unknown key; known are format, level, access, slow_callbacks"),
        (at("usrname: u"), "namespaces.x.upstream.usrname: unknown key; did you mean username?"),
        (upstream("username: u"), "namespaces.x.upstream: needs url, such as https://registry.example"),
        (
            "namespaces: {docker.io: {}}",
            "namespaces.docker.io: needs upstream, for a cache, or store: {}, for a private registry",
        ),
        (
            "namespaces: {x: {upstream: 'https://x.example', store: {}}}",
            "namespaces.x: has both upstream, for a cache, and store, for a private registry: keep one",
        ),
        (
            "namespaces: {x: {store: {}, fresh_for: 1m}}",
            "namespaces.x: fresh_for applies only to caches, and this namespace has a store",
        ),
        (
            "namespaces: {x: {store: {keep_tags: [{match: a, tags: [b], last: 1}]}}}",
            "namespaces.x.store.keep_tags[0]: has both match and tags: keep one",
        ),
        (
            "namespaces: {x: {store: {keep_tags: [{tags: [b], pushed_within: 0s}]}}}",
            "namespaces.x.store.keep_tags[0].pushed_within: must be more than 0",
        ),
        (
            "namespaces: {x: {store: {keep_tags: [{match: 'ci-*'}]}}}",
            "namespaces.x.store.keep_tags[0]: needs last, such as 10, or pushed_within or pulled_within,"
            " such as 90d",
        ),
        (
            "namespaces: {docker.io: }",
            "namespaces.docker.io: expected a mapping of keys to values, got nothing",
        ),
        ("namespaces: {}", "namespaces: is empty; leave the key out to use the well-known registries"),
        ("namespaces: [a]", "namespaces: expected a mapping of keys to values, got a list"),
        ("log: info", "log: expected a mapping of keys to values, got a string"),
        ("log: {level: trace}", "log.level: expected one of debug, info, warning, error"),
        ("fallback: [allow]", "fallback: expected one of allow, deny"),
        ("offline: 'yes'", "offline: expected true or false, got a string"),
        ("offline: 0", "offline: expected true or false, got a number"),
        ("disk: {path: 5}", "disk.path: expected a string, got a number: put it in quotes"),
        ("disk: {path: 2025-01-01}", "disk.path: expected a string, got a date: put it in quotes"),
        ("disk: {path: ''}", "disk.path: is empty: give it a value or leave the key out"),
        ("disk: {path: ~/cache}", "disk.path: ~ is not expanded: use ${HOME}"),
        (
            "disk: {collect_grace: 59m}",
            "disk.collect_grace: must be 1h or more, so that no push in progress is collected",
        ),
        ("disk: {collect_every: 0s}", "disk.collect_every: must be more than 0, or off"),
        (
            "namespaces: {x: {store: {keep_tags: [{match: 'ci-*', last: 0}]}}}",
            "namespaces.x.store.keep_tags[0].last: expected a number from 1 to 1000000",
        ),
        ("off: 1", "expected strings as keys, got true or false: put it in quotes"),
        (namespace("aliases: a"), "namespaces.x.aliases: expected a list, got a string"),
        (
            namespace("aliases: [a, 5]"),
            "namespaces.x.aliases[1]: expected a string, got a number: put it in quotes",
        ),
        (namespace("aliases: [a, null]"), "namespaces.x.aliases[1]: expected a string, got nothing"),
        (namespace("tags: [{match: a}]"), "namespaces.x.tags[0].fresh_for: is required"),
        (at("username: u"), "namespaces.x.upstream: username needs password or password_file"),
        (at("password: p"), "namespaces.x.upstream: password needs username"),
        (at("password_file: p"), "namespaces.x.upstream: password_file needs username"),
        (
            at("username: u, docker_config: p"),
            "namespaces.x.upstream: username needs password or password_file",
        ),
        (
            at("credentials: [{}]"),
            "namespaces.x.upstream: credentials[0] is empty: give a password, docker_config,"
            " credential_helper or credential_provider",
        ),
        (
            at("credentials: [{username: u}]"),
            "namespaces.x.upstream.credentials[0]: username needs password or password_file",
        ),
        (
            at("credentials: [{docker_config: d, password: p}]"),
            "namespaces.x.upstream.credentials[0]: password and docker_config exclude each other:"
            " keep one source of the password",
        ),
        (
            at("docker_config: d, credentials: [{docker_config: d}]"),
            "namespaces.x.upstream: docker_config and credentials exclude each other: keep one of them",
        ),
        ("webhooks: [{url: 'https://h'}]", "webhooks[0].name: is required"),
        (
            "webhooks: [{name: a}]",
            "webhooks[0]: needs one of url, such as https://hooks.example, and extension",
        ),
        (
            "redirect: {above: 1MiB}",
            "redirect: leads clients to a bucket: set shared.bucket, or remove this key",
        ),
        (
            "redirect: {above: 1MiB, valid_for: 8d}",
            "redirect: valid_for is at most 7d: no bucket takes an older URL",
        ),
        ("redirect: {}", "redirect.above: is required"),
        (
            "shared: {records: 'postgresql://a/b', bucket: 's3://a', caches: {}}\n"
            "namespaces: {local: {store: {}}}",
            "shared.caches: no namespace is a cache, with an upstream: remove this key",
        ),
        (
            f"webhooks: [{{{HOOK}}}, {{{HOOK}}}]",
            "webhooks[1].name: another webhook has the name a",
        ),
        (
            webhook("name: A b, url: 'https://h'"),
            "webhooks[0].name: expected a lower-case word of letters, digits, '.', '_' and '-', at most 63"
            " characters",
        ),
        (webhook("name: a, url: 'ftp://h'"), "webhooks[0].url: must begin with https:// or http://"),
        (
            webhook(f"{HOOK}, actions: [pushed]"),
            "webhooks[0].actions[0]: expected one of push, pull, delete, mount, move, hold",
        ),
        (
            webhook(f"{HOOK}, headers: [a]"),
            "webhooks[0].headers: expected a mapping of header names to values, got a list",
        ),
        (
            webhook(f"{HOOK}, headers: {{X-A: 5}}"),
            "webhooks[0].headers: X-A expected a string, got a number: put it in quotes",
        ),
        (
            webhook(f"{HOOK}, headers: {{Host: h}}"),
            "webhooks[0].headers: Host is set by the server and cannot be changed",
        ),
        (webhook(f"{HOOK}, headers: {{A: h, a: h}}"), "webhooks[0].headers: holds the same header twice"),
        (at("client_key: k"), "namespaces.x.upstream: client_key needs client_certificate"),
        (
            at("username: 'a:b', password: p"),
            "namespaces.x.upstream.username: must not hold a colon",
        ),
        (
            at("username: u, password: 5"),
            "namespaces.x.upstream.password: expected a string, got a number: put it in quotes",
        ),
    ],
)
def test_fault(text: str, line: str) -> None:
    assert fault(text) == line


def test_two_sources_of_a_password() -> None:
    line = fault(at("credential_helper: ecr-login, docker_config: /d"))
    assert line.startswith("namespaces.x.upstream: docker_config and credential_helper exclude each other")


@pytest.mark.parametrize(
    ("first", "second", "key", "shared"),
    [
        ("aliases: [b]", "", "a.aliases", "b"),
        ("hosts: [b]", "", "a.hosts", "b"),
        ("aliases: [c]", "aliases: [c]", "b.aliases", "c"),
        ("aliases: [c]", "hosts: [c]", "b.hosts", "c"),
    ],
)
def test_a_name_belongs_to_one_namespace(first: str, second: str, key: str, shared: str) -> None:
    text = f"namespaces: {{a: {{upstream: http://a, {first}}}, b: {{upstream: http://b, {second}}}}}"
    other = "b" if key.startswith("a") else "a"
    assert fault(text) == f"namespaces.{key}: {shared} already belongs to namespace {other}"


def test_a_built_in_alias_may_not_be_another_namespace() -> None:
    text = "namespaces: {docker.io: {upstream: http://a}, index.docker.io: {upstream: http://b}}"
    assert "index.docker.io already belongs to namespace index.docker.io" in fault(text)


def test_a_namespace_may_have_its_own_name_as_host() -> None:
    assert read(namespace("hosts: [x], aliases: [x]")).namespaces["x"].hosts == ("x",)


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ("drain: 1s\ndrain: 2s", ":2:1", "duplicate key 'drain'"),
        ("log: {level: info, level: info}", ":1:20", "duplicate key 'level'"),
        ("a: [\n", ":2:1", ""),
        ("log:\n\tlevel: info", ":2:1", ""),
        ("a: b: c", ":1:5", ""),
        ("a: 1\n---\nb: 2", ":2:1", ""),
        (
            "disk: {path: 2025-02-30}",
            ":1:14",
            "looks like a YAML timestamp but is not a valid one",
        ),
        ("a: \a", ":1:4", "this character is not allowed in YAML"),
        ("drain: 1s\na: b\x07", ":2:5", "this character is not allowed in YAML"),
        ("[a, b]", "", "expected a mapping of keys to values, got a list"),
        ("false", "", "expected a mapping of keys to values, got true or false"),
        ("x: &x [*x]", "", "nested too deeply"),
        ("[" * 5000, "", "nested too deeply"),
        (r'a: "\U00110000"', "", "not YAML"),
        ('drain: "\\n"', "", "drain: holds a line break or another control character"),
        ('"a\\nb": 1', "", "holds a control character in a key"),
    ],
)
def test_what_is_not_yaml(text: str, place: str, cause: str) -> None:
    line = fault(text)
    assert re.match(r"(:\d+:\d+)?", line).group() == place  # type: ignore[union-attr]
    assert cause in line


def test_a_merged_mapping_may_be_overridden() -> None:
    config = read(
        """namespaces:
          a: &a {upstream: https://a, fresh_for: 1h}
          b: &b {<<: *a, fresh_for: 2h}
          c: {<<: *b, upstream: https://c}"""
    )
    assert [each.fresh_for for each in config.namespaces.values()] == [3600, 7200, 7200]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yml: cannot be read: No such file"):
        load(tmp_path / "absent.yml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="latin: not UTF-8 at byte 3"):
        load(tmp_path / "latin")


def test_variables_are_put_into_values_as_text() -> None:
    config = read(at("username: 'a$$${U}$b', password: '${P}${P}', ca_file: '$$$'"), U="- [x", P="*a #")
    found = config.namespaces["x"].upstream
    assert found.username == "a$- [x$b"
    assert found.password == "*a #*a #"
    assert found.ca_file == Path("$$")


def test_what_a_variable_holds_is_not_interpolated_again() -> None:
    assert read(at("ca_file: '${A}'"), A="${B}$$").namespaces["x"].upstream.ca_file == Path("${B}$$")


def test_typed_values_may_come_from_variables() -> None:
    assert read("drain: ${D}", D="1m").drain == 60


def test_a_missing_variable_is_named() -> None:
    text = at("username: u, password: 'x${HUB_TOKEN}'")
    assert fault(text) == "namespaces.x.upstream.password: the environment variable HUB_TOKEN is not set"
    text = namespace("tags: [{match: '${T}', fresh_for: 1s}]")
    assert fault(text) == "namespaces.x.tags[0].match: the environment variable T is not set"


@pytest.mark.parametrize("text", ["${", "${}", "${a-b}", "${1}", "${A:-b}"])
def test_a_malformed_variable(text: str) -> None:
    assert fault(f"drain: '{text}'", A="1s").startswith("drain: ${ must be followed by a variable's name")


@pytest.mark.parametrize("value", ["a\n", "a\r\nX: y", "\0", "\udcff"])
def test_a_variable_must_not_hold_control_characters(value: str) -> None:
    line = fault(at("username: u, password: '${P}'"), P=value)
    assert line.startswith("namespaces.x.upstream.password: holds a line break")


@pytest.mark.parametrize(
    "text",
    [
        upstream("url: 'https://u:hunter2@h'"),
        upstream("url: 'https://h?hunter2'"),
        upstream("url: https://h, username: u, password:hunter2"),
        upstream("url: https://h, username: u, password: *hunter2"),
        upstream("url: https://h, username: u, password: !hunter2"),
        upstream("url: https://h, username: u, password: !hunter2'x y"),
        upstream("url: https://h, username: u, password: !h!hunter2 y"),
        webhook("name: a, url: 'https://u:hunter2@h'"),
        webhook("name: a, url: 'hunter2'"),
        webhook("name: a, url: 'https://h/#hunter2'"),
        webhook("name: a, url: 'https://h/ hunter2'"),
        webhook(f"{HOOK}, headers: {{'Authorization:hunter2': a}}"),
        webhook(f"{HOOK}, headers: {{Authorization: [hunter2]}}"),
        webhook(f"{HOOK}, secret: [hunter2]"),
        at("password: hunter2"),
        at("credentials: [{password: hunter2}]"),
        at("credentials: [{username: u, password: hunter2, docker_config: /d}]"),
        upstream("url: [https://h, 'https://u:hunter2@h']"),
        at("username: u, password: [hunter2]"),
        at("username: u, password: {hunter2: 1}"),
        at("username: u, password: hunter2, docker_config: /d"),
        at("username: u, password: 'hunter2${'"),
        at("username: u, password: 'hunter2${X}'"),
        at('username: u, password: "hunter2\\n"'),
        at("proxy: 'http://u:hunter2@proxy:99999'"),
        at("proxy: 'https://u:hunter2@proxy:1'"),
    ],
)
def test_faults_do_not_show_passwords(text: str) -> None:
    assert "hunter2" not in fault(text)


KEYS = sorted(
    {field.name for section in SECTIONS for field in msgspec.structs.fields(section)} | {"docker.io", "x"}
)
SCALARS = [
    "10m",
    "0",
    "https://h",
    "off",
    "null",
    "!!int x",
    "!!timestamp x",
    "!!binary é",
    "${X}",
    "re:(",
    "*a",
]
MARKS = [*":-,{}[]?!&*%|>'\"#\t\n ", "&a", "<<", "=", "---", "...", "\n  ", ": "]
TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text()
    | st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXTS = (
    st.text()
    | st.lists(st.sampled_from([*KEYS, *SCALARS, *MARKS])).map(" ".join)
    | st.lists(st.sampled_from([*KEYS, *SCALARS, *MARKS])).map("".join)
    | TREES.map(lambda tree: yaml.dump(tree, allow_unicode=True))
    | st.dictionaries(st.sampled_from(KEYS), TREES).map(yaml.dump)
    | TREES.map(lambda tree: yaml.dump({"namespaces": {"x": {"upstream": "https://h", "tags": tree}}}))
)


@pytest.mark.clients
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_any_text_loads_or_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load(path, {})
    except ConfigError as error:
        assert all(line.startswith(str(path)) for line in str(error).splitlines())
        assert str(error).startswith(str(path))
    else:
        assert isinstance(config, Config)


def test_a_cache_that_nobody_could_pull_from() -> None:
    private = "x: {upstream: 'https://x.example', visibility: rules}"
    cause = "no rule grants access: set access.rules, access.token or access.api_keys"
    assert fault(access("htpasswd: /h", private)) == f"namespaces.x.visibility: {cause}"
    assert read(access("rules: [{who: [authenticated], may: [pull]}]", private))
    assert read(access(TOKEN, private))
    assert read(access("api_keys: true", private))
    assert "visibility applies only to caches" in fault("namespaces: {x: {store: {}, visibility: caller}}")


@pytest.mark.parametrize(
    ("namespaces", "fine"),
    [
        ("a: {store: {}}, b: {store: {}}", True),
        ("a: {store: {}, hosts: [a.example]}, b: {store: {}}", True),
        ("a: {store: {}, hosts: [a.example]}, docker.io: {upstream: 'https://x.example'}", True),
        ("a: {store: {}, hosts: [a.example]}, b: {store: {}, hosts: [b.example]}", False),
        (
            "a: {store: {}, hosts: [a.example]},"
            " docker.io: {upstream: 'https://x.example', visibility: rules}",
            False,
        ),
    ],
)
def test_a_token_must_tell_namespaces_apart(namespaces: str, fine: bool) -> None:
    assert read(access("rules: []", namespaces))
    if fine:
        assert read(access(TOKEN, namespaces))
    else:
        assert fault(access(TOKEN, namespaces)).startswith("access.token: the namespaces a and ")
