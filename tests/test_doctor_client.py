"""A client's machine looked over: who is told to ask the server, what goes past it, what comes through."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest
import trustme
from click.testing import CliRunner, Result
from yarl import URL

from proxy.cli.main import main
from proxy.doctor import containerd, docker, podman
from proxy.doctor.checks import Check, Diagnosis
from proxy.doctor.machine import Machine
from proxy.setup.install import install, plan_install
from proxy.setup.renderers import RENDERERS
from proxy.setup.site import Site
from tests import conftest
from tests.clients.processes import free_port
from tests.conftest import Serve
from tests.relay import Relay, server_side
from tests.upstream import Status, Upstream

BASE = "http://cache.example:5000"
ALIASES = {"registry.example:5000": "own"}
SITE = Site(URL(BASE), ("docker.io", "ghcr.io", "registry.example:5000"), aliases=ALIASES)
CERTS = "etc/containerd/certs.d"
CONFIG_PATH = (
    'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/containerd/certs.d"\n'
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def put(root: Path, path: str, text: str | bytes) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
    return file


def set_up(root: Path, client: str, site: Site = SITE) -> None:
    planned = plan_install(RENDERERS[client](site), root)
    assert not planned.refused
    install(planned.changes)


def states(checks: list[Check]) -> list[tuple[str, str]]:
    """What is not well."""
    return [(each.name, each.state) for each in checks if each.state != "ok"]


def said(checks: list[Check], state: str) -> str:
    return "\n".join(f"{each.subject}: {each.message}" for each in checks if each.state == state)


# dockerd


def look_docker(root: Path, text: str | bytes | None = None, **changes: Any) -> list[Check]:
    if text is not None:
        put(root, "etc/docker/daemon.json", text)
    return docker.check(Machine(replace(SITE, **changes), root))


def test_no_docker(root: Path) -> None:
    assert look_docker(root) == []


def test_docker_as_setup_makes_it(root: Path) -> None:
    set_up(root, "docker")
    found = look_docker(root)
    # Docker 20 to 28 have mirrors for nothing but Docker Hub, and that is said.
    assert states(found) == [("namespaces", "warning")]
    assert "ghcr.io, registry.example:5000" in said(found, "warning")
    assert "dockerd asks Docker Hub itself" in said(found, "ok")
    # With the containerd image store it has.
    put(
        root,
        "etc/docker/daemon.json",
        json.dumps({**_daemon(root), "features": {"containerd-snapshotter": True}}),
    )
    assert states(look_docker(root)) == []


def _daemon(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "etc/docker/daemon.json").read_text())
    return found


def test_docker_cannot_be_kept_from_docker_hub(root: Path) -> None:
    set_up(root, "docker")
    found = look_docker(root, bypass=False)
    assert ("bypass", "failed") in states(found)


@pytest.mark.parametrize(
    ("text", "state", "says"),
    [
        ("{", "failed", "it is not JSON"),
        ("[]", "failed", "not an object"),
        ('{"registry-mirrors": "x"}', "failed", "not a list of strings"),
        (b"\xff", "failed", "not UTF-8"),
        ("{}", "failed", "does not name http://cache.example:5000"),
        ('{"registry-mirrors": ["http://cache.example:5001"]}', "failed", "does not name"),
        ('{"registry-mirrors": ["https://cache.example:5000"]}', "failed", "uses http"),
        ('{"registry-mirrors": ["https://x.y", "http://cache.example:5000/"]}', "warning", "asked before"),
        ('{"registry-mirrors": ["http://cache.example:5000"]}', "warning", "not in insecure-registries"),
    ],
)
def test_docker_that_is_not_well(root: Path, text: str | bytes, state: str, says: str) -> None:
    assert says in said(look_docker(root, text), state)


@pytest.mark.parametrize("network", ["[fd00::2]:5000", "fd00::/8", "fd00::2"])
def test_docker_takes_ipv6_networks_for_insecure(root: Path, network: str) -> None:
    keys = {"registry-mirrors": ["http://[fd00::2]:5000"], "insecure-registries": [network]}
    found = look_docker(root, json.dumps(keys), url=URL("http://[fd00::2]:5000"))
    assert "insecure" not in said(found, "warning")


def test_docker_takes_networks_for_insecure(root: Path) -> None:
    keys = {"registry-mirrors": ["http://10.1.2.3:5000"], "insecure-registries": ["no net", "10.0.0.0/8"]}
    found = look_docker(root, json.dumps(keys), url=URL("http://10.1.2.3:5000"))
    assert "insecure" not in said(found, "warning")
    found = look_docker(
        root, json.dumps(keys | {"insecure-registries": ["192.168.0.0/16"]}), url=URL("http://10.1.2.3:5000")
    )
    assert "insecure" in said(found, "warning")


# containerd


def look_containerd(root: Path, *files: tuple[str, str], **changes: Any) -> list[Check]:
    put(root, "etc/containerd/config.toml", CONFIG_PATH)
    for path, text in files:
        put(root, f"{CERTS}/{path}/hosts.toml", text)
    return containerd.check(Machine(replace(SITE, **changes), root))


def test_no_containerd(root: Path) -> None:
    assert containerd.check(Machine(SITE, root)) == []


@pytest.mark.parametrize("every", [True, False])
def test_containerd_as_setup_makes_it(root: Path, every: bool) -> None:
    set_up(root, "containerd", replace(SITE, every=every))
    found = look_containerd(root)
    assert states(found) == []
    assert "the registry itself, since server is not set" in said(found, "ok")
    # The same is a failure where nothing may go past the server.
    assert {name for name, _ in states(look_containerd(root, bypass=False))} == {"bypass"}


def test_containerd_without_bypass_as_setup_makes_it(root: Path) -> None:
    authority = "-----BEGIN CERTIFICATE-----\n"
    site = replace(SITE, bypass=False, url=URL("https://cache.example"), ca=authority)
    set_up(root, "containerd", site)
    found = look_containerd(root, bypass=False, url=URL("https://cache.example"))
    assert states(found) == []
    assert not [each for each in found if each.name == "bypass"]
    (root / CERTS / "_default" / "ca.crt").unlink()
    assert "does not exist" in said(look_containerd(root, bypass=False, url=site.url), "failed")


OURS = f'[host."{BASE}"]\ncapabilities = ["pull", "resolve"]\n'


@pytest.mark.parametrize(
    ("text", "state", "says"),
    [
        ('[host."http://cache.example:5000"\n', "failed", "it is not TOML"),
        ('host = "x"\n', "failed", "host is not a table"),
        (f'[host."{BASE}"]\ncapabilities = ["pull", "fly"]\n', "failed", "are known"),
        (f'[host."{BASE}"]\ncapabilities = "pull"\n', "failed", "are known"),
        (f'[host."{BASE}"]\nca = 1\n', "failed", "is not a file name"),
        ('[host."http://"]\n', "failed", "is not a URL"),
        ('[host."http://other.example"]\n', "failed", "does not name http://cache.example:5000"),
        ("", "failed", "does not name"),
        (f'[host."{BASE}"]\ncapabilities = ["pull"]\n', "failed", "have no resolve: tags bypass the server"),
        (f'[host."{BASE}"]\ncapabilities = ["resolve"]\n', "failed", "have no pull"),
        (f'[host."{BASE}/docker.io"]\noverride_path = true\n', "failed", "with override_path"),
        (f'[host."{BASE}"]\nca = "/etc/absent.crt"\n', "failed", "/etc/absent.crt, which its ca names"),
        (f'[host."https://other.example"]\n{OURS}', "warning", "https://other.example is asked before"),
        (f'server = "{BASE}"\n', "warning", "has no [host]: older versions of containerd"),
    ],
)
def test_containerd_that_is_not_well(root: Path, text: str, state: str, says: str) -> None:
    found = look_containerd(root, ("_default", text))
    assert says in said(found, state)
    assert "docker.io, ghcr.io, registry.example:5000" in said(found, state)


@pytest.mark.parametrize(
    "text",
    [
        OURS,
        f'[host."{BASE}"]\n',
        f'[host."{BASE}/v2/docker.io"]\noverride_path = true\n',
        f'[host."{BASE}/v2/docker.io"]\n',
        f'server = "{BASE}"\n[host]\n',
    ],
)
def test_containerd_that_is_well(root: Path, text: str) -> None:
    assert states(look_containerd(root, ("_default", text))) == []


def test_a_directory_of_its_own_goes_before_the_default(root: Path) -> None:
    found = look_containerd(root, ("_default", OURS), ("ghcr.io", '[host."https://other.example"]\n'))
    assert "containerd, ghcr.io: " in said(found, "failed")
    assert "docker.io" not in said(found, "failed")


def test_a_directory_without_a_file_hides_the_default(root: Path) -> None:
    (root / CERTS / "registry.example_5000_").mkdir(parents=True)
    found = look_containerd(root, ("_default", OURS))
    assert states(found) == [("namespaces", "warning")]
    assert "registry.example:5000: asked directly" in said(found, "warning")


def test_containerd_that_does_not_know_of_it(root: Path) -> None:
    assert states(look_containerd(root)) == [("namespaces", "failed")]


@pytest.mark.parametrize(
    ("text", "state", "says"),
    [
        ("version = 2\n", "warning", "has no config_path"),
        ("version = = 2\n", "failed", "it is not TOML"),
        (
            f'{CONFIG_PATH}[plugins."io.containerd.grpc.v1.cri".registry.mirrors."x.y"]\nendpoint = []\n',
            "failed",
            "registry.mirrors or registry.configs beside config_path",
        ),
    ],
)
def test_config_path(root: Path, text: str, state: str, says: str) -> None:
    put(root, f"{CERTS}/_default/hosts.toml", OURS)
    put(root, "etc/containerd/config.toml", text)
    assert says in said(containerd.check(Machine(SITE, root)), state)


def test_config_path_elsewhere(root: Path) -> None:
    text = 'version = 3\n[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/opt/a:/opt/b"\n'
    put(root, "etc/containerd/config.toml", text)
    put(root, f"{CERTS}/_default/hosts.toml", OURS)
    assert states(containerd.check(Machine(SITE, root))) == [("namespaces", "failed")]
    put(root, "opt/b/_default/hosts.toml", OURS)
    assert states(containerd.check(Machine(SITE, root))) == []


# podman


def look_podman(root: Path, text: str = "", **changes: Any) -> list[Check]:
    put(root, "etc/containers/registries.conf", text)
    return podman.check(Machine(replace(SITE, **changes), root))


def test_no_podman(root: Path) -> None:
    assert podman.check(Machine(SITE, root)) == []


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_podman_as_setup_makes_it(root: Path, client: str) -> None:
    set_up(root, client)
    found = look_podman(root)
    assert states(found) == []
    assert "podman asks docker.io, ghcr.io, registry.example:5000 directly" in said(found, "ok")
    assert states(look_podman(root, bypass=False)) == [("bypass", "failed")]


def test_podman_without_bypass_as_setup_makes_it(root: Path) -> None:
    set_up(root, "podman", replace(SITE, bypass=False))
    found = look_podman(root, bypass=False)
    assert states(found) == []
    assert "pulled through the server" in said(found, "ok")


HUB = '[[registry]]\nlocation = "docker.io"\n'
MIRROR = '[[registry.mirror]]\nlocation = "cache.example:5000/docker.io"\ninsecure = true\n'


@pytest.mark.parametrize(
    ("text", "state", "says"),
    [
        ("[[registry]\n", "failed", "it is not TOML"),
        ("registry = 1\n", "failed", "not an array of tables"),
        ('[registries.search]\nregistries = ["docker.io"]\n', "failed", "version 1"),
        (HUB + MIRROR.replace("insecure = true\n", ""), "failed", "has no insecure = true"),
        (HUB + MIRROR.replace("5000/docker.io", "5000/hub"), "failed", "ends in /hub"),
        (f"{HUB}mirror-by-digest-only = true\n{MIRROR}", "warning", "tags bypass it"),
        (f'{HUB}{MIRROR}pull-from-mirror = "digest-only"\n', "warning", "tags bypass it"),
        (f'{HUB}{MIRROR}pull-from-mirror = "tag-only"\n', "warning", "digests bypass the server"),
        (
            f'{HUB}[[registry.mirror]]\nlocation = "x.y"\n{MIRROR}',
            "warning",
            "x.y is asked before the server",
        ),
        (HUB, "failed", "docker.io: asked directly"),
        (
            HUB + MIRROR + '[[registry]]\nlocation = "docker.io/team"\n',
            "warning",
            "docker.io/team has its own table",
        ),
        (
            'unqualified-search-registries = ["docker.io", "x.y"]\n' + HUB + MIRROR,
            "warning",
            "is searched in x.y, without the server",
        ),
    ],
)
def test_podman_that_is_not_well(root: Path, text: str, state: str, says: str) -> None:
    found = look_podman(root, text, namespaces=("docker.io",))
    assert says in said(found, state)


def test_podman_whose_registry_is_blocked_asks_the_mirror(root: Path) -> None:
    """OpenShift makes such tables: NeverContactSource, one mirror for digests, and one for tags."""
    mirrors = [f'{MIRROR}pull-from-mirror = "{each}"\n' for each in ("digest-only", "tag-only")]
    for text in (f"{HUB}blocked = true\n{MIRROR}", f"{HUB}blocked = true\n{''.join(mirrors)}"):
        found = look_podman(root, text, namespaces=("docker.io",), bypass=False)
        assert [(each.name, each.state) for each in found] == [("configuration", "ok")]


def test_podman_takes_no_path_with_a_colon(root: Path) -> None:
    text = HUB.replace("docker.io", "a.b:5000") + MIRROR.replace("5000/docker.io", "5000/a.b:5000")
    found = said(look_podman(root, text, namespaces=("a.b:5000",)), "failed")
    assert "ends in /a.b:5000, but the path at the server is /a.b_5000" in found
    found = said(look_podman(root, text, namespaces=("a.b:5000",), aliases={"a.b:5000": ""}), "failed")
    assert "give the namespace an alias" in found
    text = text.replace("5000/a.b:5000", "5000/own")
    assert states(look_podman(root, text, namespaces=("a.b:5000",), aliases={"a.b:5000": "own"})) == []


def test_podman_that_is_well_by_the_bare_address(root: Path) -> None:
    text = HUB + MIRROR.replace("5000/docker.io", "5000")
    assert states(look_podman(root, text, namespaces=("docker.io",))) == []
    # It is Docker Hub's only where a bare name is.
    assert states(look_podman(root, text, namespaces=("docker.io",), hub=False)) != []


def test_registries_that_are_left_out_are_named(root: Path) -> None:
    found = look_podman(root, HUB + MIRROR)
    assert states(found) == [("namespaces", "warning")]
    assert "ghcr.io, registry.example:5000: asked directly" in said(found, "warning")


def test_a_later_file_replaces_a_table(root: Path) -> None:
    put(root, "etc/containers/registries.conf.d/zz.conf", HUB)
    put(root, "etc/containers/registries.conf.d/ignored.bak", "[[[")
    assert "asked directly" in said(look_podman(root, HUB + MIRROR, namespaces=("docker.io",)), "failed")


# All of it, by the command


MORE = ("--namespace", "docker.io", "--json")


class Cache:
    """A server, and how a client's machine is looked over that is to ask it."""

    def __init__(self, site: conftest.Site, root: Path) -> None:
        self.site = site
        self.root = root
        self.status = 0
        for client in ("docker", "containerd", "podman"):
            set_up(root, client, Site(URL(site.url), ("docker.io",)))
        put(root, "etc/containerd/config.toml", CONFIG_PATH)

    async def look(self, *words: str, url: str = "") -> list[Check]:
        result = await asyncio.to_thread(
            CliRunner().invoke,
            main,
            [*("doctor", "--client", url or self.site.url, "--root", str(self.root)), *MORE, *words],
        )
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        self.status = result.exit_code
        return msgspec.json.decode(result.stdout, type=Diagnosis).checks


@pytest.fixture
async def cache(serve: Serve, upstream: Upstream, root: Path) -> Cache:
    upstream.image("library/hello-world", "latest")
    images = [upstream.image("library/alpine", None, platform=f"linux/{each}") for each in ("amd64", "arm64")]
    upstream.index("library/alpine", "3", images)
    listen, admin = free_port(), free_port()
    return Cache(
        await serve(upstream, top={"listen": f"127.0.0.1:{listen}", "admin": f"127.0.0.1:{admin}"}), root
    )


def named(checks: list[Check], name: str) -> dict[str, Check]:
    return {each.subject: each for each in checks if each.name == name}


@pytest.mark.clients
async def test_all_comes_through(cache: Cache, upstream: Upstream) -> None:
    found = await cache.look()
    assert (states(found), cache.status) == ([], 0)
    canaries = named(found, "canary")
    assert set(canaries) == {"docker", "containerd", "podman"}
    assert all("is served: entrepot; " in each.message for each in canaries.values())
    assert "request " in canaries["docker"].message
    # Manifests are asked for once by the server; no blob is transferred for it.
    assert upstream.log[0] == "GET manifest library/hello-world:latest"
    assert [each.partition(" library")[0] for each in upstream.log[1:]] == ["HEAD blob"] * 3


async def test_another_canary(cache: Cache, upstream: Upstream) -> None:
    found = await cache.look("--canary", "alpine:3")
    assert states(found) == []
    assert not any("hello-world" in each for each in upstream.log)


async def test_a_canary_that_does_not_come(cache: Cache, upstream: Upstream) -> None:
    found = await cache.look("--canary", "docker.io/library/absent:1")
    assert [state for _, state in states(found)] == ["failed"] * 3
    assert cache.status == 1
    assert "404 MANIFEST_UNKNOWN" in named(found, "canary")["podman"].message


async def test_a_server_that_is_not_there(cache: Cache) -> None:
    port = free_port()
    found = await cache.look(url=f"http://127.0.0.1:{port}")
    server = found[0]
    assert (server.name, server.state) == ("server", "failed")
    assert "(connection refused)" in server.message
    assert not named(found, "canary")  # it would fail for the same
    assert cache.status == 1


async def test_another_registry_is_not_taken_for_it(cache: Cache, upstream: Upstream) -> None:
    found = await cache.look(url=upstream.url)
    assert (found[0].name, found[0].state) == ("server", "warning")
    assert "not entrepot" in found[0].message


async def test_what_is_between_may_change_content(cache: Cache, upstream: Upstream) -> None:
    """Asked is the upstream itself, in the place of a proxy that does harm."""
    upstream.next(
        "GET",
        "manifest",
        Status(200, headers={"Docker-Content-Digest": "sha256:" + "0" * 64}, body=b"{}"),
        times=9,
    )
    found = await cache.look(url=upstream.url)
    assert "is a proxy in between?" in named(found, "canary")["docker"].message


async def test_without_clients_the_server_is_looked_at(cache: Cache, tmp_path: Path) -> None:
    cache.root = tmp_path / "empty"
    cache.root.mkdir()
    found = await cache.look()
    assert states(found) == [("client", "warning")]
    assert list(named(found, "canary")) == ["podman"]


async def test_the_client_is_told_by_listen_if_by_nothing(cache: Cache, tmp_path: Path) -> None:
    words = [
        "doctor",
        "--config",
        str(tmp_path / "entrepot.yml"),
        "--root",
        str(cache.root),
        "--json",
        "--client",
    ]
    result: Result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert json.loads(result.stdout)["checks"][0]["subject"] == cache.site.url


async def test_by_https_with_an_authority(cache: Cache, root: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    pem = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(pem))
    port = URL(cache.site.url).port
    assert port
    async with Relay(port, server_side(authority)) as relay:
        url = f"https://localhost:{relay.port}"
        found = await cache.look(url=url)
        assert found[0].state == "failed"
        assert "is from an authority that is not trusted here" in found[0].message
        found = await cache.look("--ca-file", str(pem), url=url)
        assert found[0].state == "ok"
        # What a client here trusts is trusted.
        put(root, f"etc/docker/certs.d/localhost:{relay.port}/ca.crt", pem.read_bytes())
        assert (await cache.look(url=url))[0].state == "ok"


# By the clients themselves


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are looked for: those of a test alone."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def program(path: Path, name: str, text: str) -> None:
    file = path / name
    file.write_text(f"#!{sys.executable}\n{dedent(text)}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def puller(url: str) -> str:
    return f"""
        import sys, urllib.request
        assert sys.argv[-1] == "docker.io/library/alpine:3", sys.argv
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
        opener.open("{url}/v2/library/alpine/manifests/3").read()
        """


@pytest.mark.clients
async def test_a_client_pulls_itself(cache: Cache, path: Path) -> None:
    program(path, "podman", puller(cache.site.url))
    program(path, "docker", "")  # it has it already, or from elsewhere
    program(path, "ctr", "import sys; print('one', file=sys.stderr); sys.exit('denied')")
    found = named(await cache.look("--pull", "alpine:3", "--server", str(cache.site.app.admin_url)), "pull")
    assert found["podman"].message == "docker.io/library/alpine:3 was pulled through the server: 1 request"
    assert found["docker"].state == "failed"
    assert "was not asked" in found["docker"].message
    assert "status 1: denied" in found["containerd"].message
    assert cache.status == 1


@pytest.mark.clients
async def test_whether_it_came_through_may_not_be_seen(cache: Cache, path: Path) -> None:
    program(path, "podman", puller(cache.site.url))
    found = named(await cache.look("--pull", "alpine:3"), "pull")
    assert list(found) == ["podman"]
    assert found["podman"].state == "warning"
    assert "--server" in found["podman"].advice
    port = free_port()
    found = named(await cache.look("--pull", "alpine:3", "--server", f"http://127.0.0.1:{port}"), "pull")
    assert found["podman"].state == "warning"
