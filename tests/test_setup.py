"""What clients are told: parsed as they parse it, and compared by its meaning."""

from __future__ import annotations

import base64
import json
import re
import socket
import tomllib
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from click.testing import CliRunner
from yarl import URL

from proxy.cli.main import main
from proxy.config.loader import load
from proxy.setup.renderers import GROUPS, RENDERERS, lines_of
from proxy.setup.site import Setup, Site, site_of
from tests.conftest import configuration

ROOT = Path(__file__).parent.parent
README, CLIENTS = ROOT / "README.md", ROOT / "docs" / "clients.md"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PLAIN = Site(URL("http://cache.example:5000"), ("docker.io", "ghcr.io", "registry.example:5000"))
SECURE = replace(PLAIN, url=URL("https://cache.example"), ca=PEM)
ALIASES = {"registry.example:5000": "own"}
CERTS = "/etc/containerd/certs.d"
PULL = ["pull", "resolve"]


def made(client: str, site: Site, **changes: Any) -> Setup:
    return RENDERERS[client](replace(site, **changes))


def content(setup: Setup, path: str) -> Any:
    """What is in the file there, parsed by what its name says; a certificate as it is."""
    (piece,) = (each for each in setup.pieces if each.path == path)
    if path.endswith(".json"):
        return json.loads(piece.content)
    if path.endswith((".toml", ".conf")):
        return tomllib.loads(piece.content)
    if path.endswith(".yaml"):
        return yaml.safe_load(piece.content)
    return piece.content


def notes(setup: Setup) -> str:
    return "\n".join(setup.notes)


def test_dagger_has_the_path_of_each_registry() -> None:
    path = "~/.config/dagger/engine.json"
    found = content(made("dagger", PLAIN), path)["registries"]
    assert found.pop("cache.example:5000") == {"http": True}
    assert found == {each: {"mirrors": [f"cache.example:5000/{each}"]} for each in PLAIN.namespaces}
    secure = made("dagger", SECURE, bypass=False)
    assert list(content(secure, path)["registries"]) == list(SECURE.namespaces)
    assert "no setting prevents that" in notes(secure)


def test_pack_calls_docker_hub_by_the_name_of_its_index() -> None:
    setup = made("pack", PLAIN)
    assert content(setup, "~/.pack/config.toml") == {
        "registry-mirrors": {
            "index.docker.io": "cache.example:5000/docker.io",
            "ghcr.io": "cache.example:5000/ghcr.io",
            "registry.example:5000": "cache.example:5000/registry.example_5000",
        }
    }
    assert "needs TLS" in notes(setup) and "needs TLS" not in notes(made("pack", SECURE))


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_a_mirror_of_an_ipv6_address_is_not_possible(client: str) -> None:
    names = ("docker.io", "[fd00::1]:5000", "[::1]")
    setup = made(client, PLAIN, namespaces=names)
    tables = content(setup, "/etc/containers/registries.conf.d/entrepot.conf")["registry"]
    assert [each["location"] for each in tables] == ["docker.io", "cache.example:5000"]
    assert "[fd00::1]:5000, [::1]: no mirror is possible" in notes(setup)
    assert "cache.example:5000/<alias>/" in notes(setup)
    assert "no mirror" not in notes(made(client, PLAIN, namespaces=("docker.io",)))


@pytest.mark.parametrize("client", ["podman", "crio", "minikube", "openshift", "trivy", "pack"])
def test_a_registry_with_a_port_has_a_path_without_a_colon(client: str) -> None:
    """containers/image, go-containerregistry and the API of OpenShift refuse a path with a colon."""
    paths = {"registry.example_5000": {}, "own": ALIASES, "": {"registry.example:5000": ""}}
    for path, aliases in paths.items():
        setup = made(client, PLAIN, aliases=aliases)
        text = "".join(each.content for each in setup.pieces)
        assert "cache.example:5000/registry.example:5000" not in text
        assert [each for each in paths if each and f"cache.example:5000/{each}" in text] == [path] * bool(
            path
        )
        assert ("registry.example:5000: no mirror is possible" in notes(setup)) == (not path)


# docker


def test_docker_by_http() -> None:
    setup = made("docker", PLAIN)
    assert content(setup, "/etc/docker/daemon.json") == {
        "registry-mirrors": ["http://cache.example:5000"],
        "insecure-registries": ["cache.example:5000"],
    }
    assert "Docker Hub only" in notes(setup)
    assert "cache.example:5000/ghcr.io/owner/image" in notes(setup)


def test_docker_trusts_loopback_addresses_by_itself() -> None:
    for url in ("http://127.0.0.1:5000", "http://[::1]:5000", "http://localhost:5000"):
        found = content(made("docker", PLAIN, url=URL(url)), "/etc/docker/daemon.json")
        assert found == {"registry-mirrors": [url]}


def test_docker_by_https() -> None:
    setup = made("docker", SECURE)
    assert content(setup, "/etc/docker/daemon.json") == {"registry-mirrors": ["https://cache.example"]}
    # The port that is the scheme's own is none of its name there.
    assert content(setup, "/etc/docker/certs.d/cache.example/ca.crt") == PEM


def test_docker_with_the_containerd_store_asks_for_every_registry() -> None:
    for site in (PLAIN, replace(SECURE, bypass=False)):
        docker, containerd = RENDERERS["docker"](site), RENDERERS["containerd"](site)
        theirs = content(containerd, f"{CERTS}/_default/hosts.toml")
        assert content(docker, "/etc/docker/certs.d/_default/hosts.toml") == theirs


def test_docker_without_bypass_says_what_it_cannot() -> None:
    assert "block registry-1.docker.io" in notes(made("docker", PLAIN, bypass=False))
    assert "block" not in notes(made("docker", PLAIN))


def test_docker_where_a_bare_name_is_not_docker_hubs() -> None:
    setup = made("docker", PLAIN, hub=False)
    found = content(setup, "/etc/docker/daemon.json")
    assert found["registry-mirrors"] == ["http://cache.example:5000/docker.io"]
    assert "Docker 24" in notes(setup)


def test_docker_without_docker_hub_has_no_mirror() -> None:
    setup = made("docker", PLAIN, namespaces=("ghcr.io",))
    found = content(setup, "/etc/docker/daemon.json")
    assert found == {"insecure-registries": ["cache.example:5000"]}
    assert "docker.io is not among the namespaces" in notes(setup)


# containerd


def test_containerd_asks_for_every_registry() -> None:
    setup = made("containerd", PLAIN)
    assert content(setup, f"{CERTS}/_default/hosts.toml") == {
        "host": {"http://cache.example:5000": {"capabilities": PULL}}
    }
    # By its own name it takes pushes too: no capabilities are all of them.
    assert content(setup, f"{CERTS}/cache.example:5000/hosts.toml") == {
        "server": "http://cache.example:5000",
        "host": {},
    }


def test_containerd_asks_for_some() -> None:
    setup = made("containerd", PLAIN, every=False, namespaces=("ghcr.io", "registry.example:5000"))
    paths = [each.path for each in setup.pieces if each.path.endswith("hosts.toml")]
    assert paths == [
        f"{CERTS}/{each}/hosts.toml" for each in ("ghcr.io", "registry.example:5000", PLAIN.host)
    ]
    assert "contacted directly" in notes(setup)


def test_containerd_without_bypass_has_nobody_but_the_server() -> None:
    """And an empty [host]: without any, older containerd takes the file for broken."""
    found = content(made("containerd", PLAIN, bypass=False), f"{CERTS}/_default/hosts.toml")
    assert found == {"server": "http://cache.example:5000", "capabilities": PULL, "host": {}}


@pytest.mark.parametrize("bypass", [True, False])
def test_containerd_by_https(bypass: bool) -> None:
    setup = made("containerd", SECURE, bypass=bypass)
    found = content(setup, f"{CERTS}/_default/hosts.toml")
    told = found["host"]["https://cache.example"] if bypass else found
    # Beside the file that names it.
    assert told["ca"] == "ca.crt"
    assert content(setup, f"{CERTS}/_default/ca.crt") == PEM
    assert content(setup, f"{CERTS}/cache.example/hosts.toml")["ca"] == "ca.crt"
    assert content(setup, f"{CERTS}/cache.example/ca.crt") == PEM


def test_containerd_of_either_version_is_told_where_to_look() -> None:
    parts = [each for each in made("containerd", PLAIN).pieces if each.kind == "part"]
    assert [each.about for each in parts] == ["containerd 1.x", "containerd 2.x"]
    plugins = [tomllib.loads(each.content)["plugins"] for each in parts]
    assert plugins == [
        {"io.containerd.grpc.v1.cri": {"registry": {"config_path": CERTS}}},
        {"io.containerd.cri.v1.images": {"registry": {"config_path": CERTS}}},
    ]


# podman, buildah, skopeo, CRI-O

REGISTRIES = "/etc/containers/registries.conf.d/entrepot.conf"


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_each_registry_has_a_table(client: str) -> None:
    found = content(made(client, PLAIN, aliases=ALIASES), REGISTRIES)["registry"]
    assert found == [
        *(
            {
                "location": each,
                "mirror": [{"location": f"cache.example:5000/{path}", "insecure": True}],
            }
            for each, path in zip(PLAIN.namespaces, ("docker.io", "ghcr.io", "own"), strict=True)
        ),
        {"location": "cache.example:5000", "insecure": True},
    ]


def test_each_registry_has_a_table_by_https() -> None:
    setup = made("podman", SECURE)
    assert content(setup, REGISTRIES)["registry"][0] == {
        "location": "docker.io",
        "mirror": [{"location": "cache.example/docker.io"}],
    }
    assert len(content(setup, REGISTRIES)["registry"]) == 3
    assert content(setup, "/etc/containers/certs.d/cache.example/ca.crt") == PEM


def test_without_bypass_the_registry_is_where_the_server_is() -> None:
    found = content(made("podman", PLAIN, bypass=False), REGISTRIES)["registry"]
    assert found[1] == {"prefix": "ghcr.io", "location": "cache.example:5000/ghcr.io", "insecure": True}
    assert not any("mirror" in each for each in found)


# BuildKit, kaniko


def test_buildkit() -> None:
    setup = made("buildkit", PLAIN)
    assert content(setup, "/etc/buildkit/buildkitd.toml") == {
        "registry": {
            **{each: {"mirrors": [f"cache.example:5000/{each}"]} for each in PLAIN.namespaces},
            "cache.example:5000": {"http": True},
        }
    }
    secure = made("buildkit", SECURE, bypass=False)
    registries = content(secure, "/etc/buildkit/buildkitd.toml")["registry"]
    assert registries["cache.example"] == {"ca": ["/etc/buildkit/entrepot.crt"]}
    assert content(secure, "/etc/buildkit/entrepot.crt") == PEM
    assert "no setting prevents that" in notes(secure)


def test_kaniko() -> None:
    setup = made("kaniko", PLAIN)
    assert setup.pieces[0].content.splitlines() == [
        "--registry-map=index.docker.io=cache.example:5000/v2/docker.io",  # as kaniko calls Docker Hub
        "--registry-map=ghcr.io=cache.example:5000/v2/ghcr.io",
        "--registry-map=registry.example:5000=cache.example:5000/v2/registry.example_5000",
        "--insecure-registry=cache.example:5000",
    ]
    (piece,) = made("kaniko", Site(PLAIN.url, ("localhost:5000",))).pieces  # no host to kaniko
    assert piece.content.startswith("--registry-map=localhost:5000=cache.example:5000/localhost_5000\n")
    (piece,) = made("kaniko", PLAIN, aliases=ALIASES).pieces
    assert piece.content.splitlines()[2] == "--registry-map=registry.example:5000=cache.example:5000/own"
    (piece,) = made("kaniko", SECURE, bypass=False).pieces
    assert piece.content.splitlines()[-2:] == [
        "--registry-certificate=cache.example=/kaniko/entrepot.crt",
        "--skip-default-registry-fallback",
    ]


# k3s, kind, Talos


def test_k3s() -> None:
    setup = made("k3s", PLAIN)
    (piece,) = setup.pieces
    assert yaml.safe_load(piece.content) == {"mirrors": {"*": {"endpoint": ["http://cache.example:5000"]}}}
    secure = made("k3s", SECURE, every=False, bypass=False)
    found = content(secure, "/etc/rancher/k3s/registries.yaml")
    assert list(found["mirrors"]) == list(SECURE.namespaces)
    assert found["configs"] == {"cache.example": {"tls": {"ca_file": "/etc/rancher/k3s/entrepot.crt"}}}
    assert content(secure, "/etc/rancher/k3s/entrepot.crt") == PEM
    assert content(secure, "/etc/rancher/k3s/config.yaml.d/entrepot.yaml") == {
        "disable-default-registry-endpoint": True
    }


def test_kind_mounts_what_containerd_reads() -> None:
    setup = made("kind", SECURE)
    cluster = content(setup, "/etc/entrepot/clients/kind/cluster.yaml")
    (node,) = cluster["nodes"]
    (mount,) = node["extraMounts"]
    assert mount["containerPath"] == CERTS
    containerd = made("containerd", SECURE)
    for each in (piece for piece in containerd.pieces if piece.kind == "file"):
        mounted = each.path.replace(CERTS, mount["hostPath"])
        assert content(setup, mounted) == content(containerd, each.path)
    (patch,) = cluster["containerdConfigPatches"]
    (plugin,) = tomllib.loads(patch)["plugins"].values()
    assert plugin == {"registry": {"config_path": CERTS}}


def test_talos() -> None:
    path = "/etc/entrepot/clients/talos/registries.yaml"
    assert content(made("talos", PLAIN), path) == {
        "machine": {"registries": {"mirrors": {"*": {"endpoints": ["http://cache.example:5000"]}}}}
    }
    found = content(made("talos", SECURE, every=False, bypass=False), path)["machine"]["registries"]
    mirror = {"endpoints": ["https://cache.example"], "skipFallback": True}
    assert found["mirrors"] == dict.fromkeys(SECURE.namespaces, mirror)
    assert base64.b64decode(found["config"]["cache.example"]["tls"]["ca"]).decode() == PEM


@pytest.mark.parametrize("client", ["k3s", "kind", "talos"])
def test_a_node_has_a_loopback_of_its_own(client: str) -> None:
    assert "give --url" in notes(made(client, PLAIN, url=URL("http://127.0.0.1:5000")))
    assert "give --url" not in notes(made(client, PLAIN))


# Private registries with listeners of their own


STORES = {"local": "cache.example:5001", "edge": "127.0.0.1:5003"}


def test_all_clients_know_the_listeners_of_private_registries() -> None:
    known = {
        "docker": lambda made: content(made, "/etc/docker/daemon.json")["insecure-registries"],
        "containerd": lambda made: [content(made, f"{CERTS}/{each}/hosts.toml") for each in STORES.values()],
        "podman": lambda made: content(made, "/etc/containers/registries.conf.d/entrepot.conf")["registry"],
        "buildkit": lambda made: content(made, "/etc/buildkit/buildkitd.toml")["registry"],
        "kaniko": lambda made: made.pieces[0].content.splitlines(),
        "k3s": lambda made: content(made, "/etc/rancher/k3s/registries.yaml")["mirrors"],
        "talos": lambda made: content(made, "/etc/entrepot/clients/talos/registries.yaml"),
    }
    expected: dict[str, Any] = {
        "docker": ["cache.example:5001", "cache.example:5000"],  # dockerd trusts loopback addresses by itself
        "containerd": [{"server": f"http://{each}", "host": {}} for each in STORES.values()],
        "podman": [{"location": each, "insecure": True} for each in STORES.values()],
        "buildkit": {each: {"http": True} for each in STORES.values()},
        "kaniko": [f"--insecure-registry={each}" for each in STORES.values()],
        "k3s": {each: {"endpoint": [f"http://{each}"]} for each in STORES.values()},
    }
    for client, found in known.items():
        said = found(made(client, PLAIN, stores=STORES))
        if client == "talos":
            mirrors = said["machine"]["registries"]["mirrors"]
            assert mirrors["cache.example:5001"] == {"endpoints": ["http://cache.example:5001"]}
        elif client in ("docker", "containerd"):
            assert said == expected[client]
        elif isinstance(said, list):
            assert all(each in said for each in expected[client])
        else:
            assert expected[client].items() <= said.items()


def test_all_clients_trust_the_authority_at_the_listeners_of_private_registries() -> None:
    setup = {client: made(client, SECURE, stores={"local": "cache.example:5001"}) for client in RENDERERS}
    for client, path in {
        "docker": "/etc/docker/certs.d",
        "containerd": CERTS,
        "podman": "/etc/containers/certs.d",
    }.items():
        assert content(setup[client], f"{path}/cache.example:5001/ca.crt") == PEM
    buildkit = content(setup["buildkit"], "/etc/buildkit/buildkitd.toml")
    assert "ca" in buildkit["registry"]["cache.example:5001"]
    k3s = content(setup["k3s"], "/etc/rancher/k3s/registries.yaml")
    assert "ca_file" in k3s["configs"]["cache.example:5001"]["tls"]


@pytest.mark.parametrize(
    ("listen", "url", "host"),
    [
        ("0.0.0.0:5001", "http://cache.example:5000", "cache.example:5001"),
        (":443", "https://cache.example", "cache.example"),
        ("10.1.2.3:5001", "http://cache.example:5000", "10.1.2.3:5001"),
        ("[fd00::1]:5001", "http://cache.example:5000", "[fd00::1]:5001"),
    ],
)
def test_the_host_of_a_private_registry(tmp_path: Path, listen: str, url: str, host: str) -> None:
    config = configuration(tmp_path, {"namespaces": {"local": {"store": {}, "listen": listen}}})
    assert site_of(config, url=url).stores == {"local": host}


# What is printed


@pytest.mark.parametrize("client", RENDERERS)
def test_all_that_is_no_content_is_a_comment(client: str) -> None:
    for site in (PLAIN, replace(SECURE, bypass=False)):
        setup = RENDERERS[client](site)
        printed = "\n".join(lines_of(setup))
        for piece in setup.pieces:
            assert f"# {piece.path or 'flags'}" in printed
            printed = printed.replace(piece.content.rstrip("\n"), "")
        assert all(line.startswith("# ") for line in printed.splitlines() if line)
        assert f"# then: {setup.after}" in printed


def test_the_readme_says_what_is_rendered() -> None:
    """Each block of the section on clients is the whole of a file, for its one registry."""
    section = re.search(r"^## Point clients at it$(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    assert section
    found = blocks(section[1])
    assert len(found) >= 4
    assert found <= rendered(Site(URL("http://cache.example:5000"), ("docker.io",)))


def test_the_page_on_clients_says_what_is_rendered() -> None:
    """It has a section for each of them; the other sections are about clients that `setup` does not know."""
    sections = re.split(r"^## ", CLIENTS.read_text(), flags=re.MULTILINE)[1:]
    heads = [_plain(section.partition("\n")[0]) for section in sections]
    site = Site(URL("http://cache.example:5000"), ("docker.io", "ghcr.io"))
    known = [any(_plain(client) in head for client in RENDERERS) for head in heads]
    found = blocks("".join(compress(sections, known)))
    assert len(found) >= 12
    assert found <= rendered(site) | rendered(replace(site, bypass=False))
    assert not [client for client in RENDERERS if _plain(client) not in " ".join(heads)]


def test_the_help_and_the_page_on_commands_list_the_clients_by_groups() -> None:
    shown = CliRunner().invoke(main, ["setup", "--help"], env={"COLUMNS": "80"}).output
    assert "setup [OPTIONS] CLIENT\n" in shown
    shown = " ".join(shown.split())
    page = (ROOT / "docs" / "commands.md").read_text()
    for name, group in GROUPS.items():
        assert f"{name} {', '.join(group)}" in shown
        assert f"| {name} | {', '.join(f'`{each}`' for each in group)} |" in page.replace(
            " (also for buildah and skopeo)", ""
        )


def _plain(text: str) -> str:
    return re.sub(r"[ -]", "", text.lower())


def blocks(page: str) -> set[str]:
    return set(re.findall(r"^```(?:json|toml|yaml|text)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


def rendered(site: Site) -> set[str]:
    return {each.content for client in RENDERERS for each in RENDERERS[client](site).pieces}


# Of which server


def test_the_site_is_that_of_the_configuration(tmp_path: Path) -> None:
    namespaces = {
        "docker.io": {"upstream": "https://registry-1.docker.io"},
        "edge": {"upstream": "https://edge.example"},  # no client takes that for a registry
        "ghcr.io": {"upstream": "https://ghcr.io"},
        "store.example": {"store": {}},  # pulled by full name
    }
    tree = {"listen": "0.0.0.0:5000", "namespaces": namespaces, "default_namespace": "edge"}
    config = configuration(tmp_path, tree)
    with pytest.raises(ValueError, match="a private registry"):
        site_of(config, namespaces=["store.example"])
    found = site_of(config)
    assert found.base == f"http://{socket.gethostname()}:5000"
    assert found.namespaces == ("docker.io", "ghcr.io")
    assert found.every and found.bypass and not found.hub


def test_what_is_given_goes_before_the_configuration() -> None:
    found = site_of(
        load(None),
        url="https://cache.example/",
        namespaces=("quay.io", "x.example:1", "quay.io"),
        bypass=False,
    )
    assert (found.base, found.host) == ("https://cache.example", "cache.example")
    assert found.namespaces == ("quay.io", "x.example:1")
    assert not found.every and not found.bypass


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "http://cache.example/path"}, "must not have a path"),
        ({"url": "ftp://cache.example"}, "must begin with https:// or http://"),
        ({"url": "http://me:secret@cache.example"}, "must not hold a user name"),
        ({"namespaces": ["edge"]}, "is not a host"),
        ({"namespaces": ['x"\n.example']}, "expected a host"),
        ({"namespaces": ["../x.example"]}, "expected a host"),
        ({"ca_file": Path("ca.pem")}, "has no TLS"),
        ({"url": "https://cache.example", "ca_file": Path("/no/such.pem")}, "No such file"),
        ({"url": "https://cache.example", "ca_file": Path(__file__)}, "holds no PEM certificate"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        site_of(load(None), **given)


def test_an_authority_is_taken_and_a_key_is_not(tmp_path: Path) -> None:
    authority = trustme.CA()
    pem = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(pem))
    found = site_of(load(None), url="https://cache.example", ca_file=pem)
    assert found.ca == pem.read_text()
    pem.write_bytes(authority.cert_pem.bytes() + authority.private_key_pem.bytes())
    with pytest.raises(ValueError, match="private key"):
        site_of(load(None), url="https://cache.example", ca_file=pem)


def test_any_port_cannot_be_told(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"listen": "127.0.0.1:0"})
    with pytest.raises(ValueError, match="give --url"):
        site_of(config)
    assert site_of(config, url="cache.example:5000").base == "http://cache.example:5000"


def test_a_list_of_registries(tmp_path: Path) -> None:
    """Those that it names in full are known; for the others, a client needs to be told, or asks for all."""
    path = tmp_path / "entrepot.yml"
    hosts = ["ghcr.io", "*.example.com", "registry.lan:5000"]
    namespaces = {"quay.io": {"upstream": "https://quay.io"}, "*": {"upstream": {"hosts": hosts}}}
    path.write_text(json.dumps({"namespaces": namespaces}))
    site = site_of(load(path), url="http://cache.example:5000")
    assert site.namespaces == ("quay.io", "ghcr.io", "registry.lan:5000")
    assert site.patterns == ("*.example.com",)
    assert RENDERERS["containerd"](site).pieces[0].path.endswith("/_default/hosts.toml")
    assert any("*.example.com" in each for each in RENDERERS["podman"](site).notes)
    given = site_of(load(path), url="http://cache.example:5000", namespaces=["a.example.com"])
    assert (given.namespaces, given.patterns) == (("a.example.com",), ())
