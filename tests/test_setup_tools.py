"""Lazy pullers, models and tools: each file is compared as its reader parses it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from yarl import URL

from proxy.setup.renderers import RENDERERS
from proxy.setup.site import Setup, site_of
from tests.conftest import configuration
from tests.test_setup import PEM, PLAIN, SECURE, content, made, notes

NAMED = {"ghcr.io": "ghcr.cache.example:5000", "registry.ollama.ai": "ollama.cache.example:5000"}


def example(setup: Setup) -> str:
    """What is printed, for nobody's file."""
    (piece,) = (each for each in setup.pieces if each.kind == "example")
    return piece.content


def hosts(setup: Setup, path: str) -> dict[str, Any]:
    """The mirrors of each registry, by stargz and SOCI."""
    tables: dict[str, Any] = content(setup, path)["resolver"]["host"]
    return {name: table["mirrors"] for name, table in tables.items()}


STARGZ = "/etc/containerd-stargz-grpc/config.toml"
SOCI = "/etc/soci-snapshotter-grpc/config.toml"


def test_stargz_has_mirrors_where_a_host_says_which_registry() -> None:
    insecure = {"insecure": True}
    setup = made("stargz", PLAIN, named=NAMED)
    assert hosts(setup, STARGZ) == {
        "docker.io": [{"host": "cache.example:5000", **insecure}],
        "ghcr.io": [{"host": "ghcr.cache.example:5000", **insecure}],
        "cache.example:5000": [{"host": "cache.example:5000", **insecure}],
    }
    assert "no mirror is possible for registry.example:5000," in notes(setup)
    assert hosts(made("stargz", SECURE), STARGZ) == {"docker.io": [{"host": "cache.example"}]}
    # Whoever asks for docker.io here would get another namespace.
    nothing = made("stargz", SECURE, hub=False)
    assert nothing.pieces == [] and "docker.io" in notes(nothing)


def test_soci_has_the_path_of_each_registry() -> None:
    assert hosts(made("soci", PLAIN), SOCI) == {
        **{
            each: [{"host": f"http://cache.example:5000/v2/{each}", "insecure": True}]
            for each in PLAIN.namespaces
        },
        "cache.example:5000": [{"host": "http://cache.example:5000", "insecure": True}],
    }
    assert hosts(made("soci", SECURE), SOCI)["ghcr.io"] == [{"host": "https://cache.example/v2/ghcr.io"}]
    assert "parallel" in notes(made("soci", PLAIN))


def test_nydus_falls_back_only_where_it_may() -> None:
    setup = made("nydus", PLAIN, named=NAMED)
    directory = content(setup, "/etc/nydus/config.toml")["remote"]["mirrors_config"]["dir"]
    assert content(setup, f"{directory}/index.docker.io/hosts.toml") == {
        "host": {"http://cache.example:5000": {"ping_url": "http://cache.example:5000/v2/"}}
    }
    assert content(setup, f"{directory}/ghcr.io/hosts.toml") == {
        "host": {"http://ghcr.cache.example:5000": {"ping_url": "http://ghcr.cache.example:5000/v2/"}}
    }
    assert "registry.example:5000" in notes(setup)
    strict = content(made("nydus", PLAIN, bypass=False), f"{directory}/index.docker.io/hosts.toml")
    assert strict == {"host": {"http://cache.example:5000": {}}}
    secure = made("nydus", SECURE)
    (table,) = content(secure, f"{directory}/index.docker.io/hosts.toml")["host"].values()
    assert list(table) == ["ca"] and content(secure, table["ca"]) == PEM


def test_ollama_is_named_with_two_elements() -> None:
    site = replace(
        PLAIN, aliases={"registry.ollama.ai": "models"}, named={**NAMED, "hf.co": "hf.cache.example"}
    )
    names = [line.split() for line in example(RENDERERS["ollama"](site)).splitlines()]
    assert names[0] == ["ollama", "pull", "http://cache.example:5000/models/llama3.2:1b", "--insecure"]
    assert [words[2].split("/")[2] for words in names[1:]] == [
        *["ollama.cache.example:5000"] * 2,
        "hf.cache.example",
    ]
    assert all(len(URL(words[2]).path.split("/")) == 3 for words in names)
    site = replace(SECURE, aliases={"registry.ollama.ai": "ollama"})
    setup = RENDERERS["ollama"](site)
    assert example(setup) == "ollama pull cache.example/ollama/llama3.2:1b\n"
    assert "need a namespace with a name of its own" in notes(setup)
    setup = made("ollama", PLAIN)
    assert setup.pieces == [] and "no name is possible" in notes(setup)


def test_model_runner() -> None:
    words = shlex.split(example(made("model-runner", PLAIN, hub=False)))
    assert words[0] == "MODEL_RUNNER_REGISTRY_MIRRORS=http://cache.example:5000/docker.io"
    assert "give --url" in notes(made("model-runner", PLAIN, url=URL("http://localhost:5000")))
    none = made("model-runner", PLAIN, namespaces=("ghcr.io",))
    assert none.pieces == [] and "docker.io is not among" in notes(none)


RENOVATE = "/etc/entrepot/clients/renovate/config.json"


def test_renovate_looks_up_both_kinds_of_names() -> None:
    found = content(made("renovate", PLAIN, stores={"local": "cache.example:5001"}), RENOVATE)
    assert found["packageRules"] == [
        {"matchDatasources": ["docker"], "registryUrls": ["http://cache.example:5000"]}
    ]
    assert found["registryAliases"]["ghcr.io"] == "cache.example:5000/ghcr.io"
    assert found["registryAliases"]["registry.example:5000"] == "cache.example:5000/registry.example_5000"
    assert {each["matchHost"] for each in found["hostRules"]} == {
        "https://cache.example:5001",
        "https://cache.example:5000",
    }
    assert all(each["insecureRegistry"] for each in found["hostRules"])
    secure = content(made("renovate", SECURE, hub=False), RENOVATE)
    assert secure["packageRules"][0]["registryUrls"] == ["https://cache.example/docker.io"]
    assert "hostRules" not in secure
    assert "packageRules" not in content(made("renovate", SECURE, namespaces=("ghcr.io",)), RENOVATE)


def test_argocd_image_updater_asks_for_each_registry_by_its_path() -> None:
    path = "/etc/entrepot/clients/argocd-image-updater/config.yaml"
    conf = content(made("argocd-image-updater", PLAIN), path)["data"]["registries.conf"]
    found = {each["prefix"]: each for each in yaml.safe_load(conf)["registries"]}
    assert found["docker.io"]["defaultns"] == "library" and found["docker.io"]["default"] is True
    assert {name: each["api_url"] for name, each in found.items()} == {
        **{each: f"http://cache.example:5000/{each}" for each in PLAIN.namespaces},
        "cache.example:5000": "http://cache.example:5000",
    }
    conf = content(made("argocd-image-updater", SECURE), path)["data"]["registries.conf"]
    assert {each["ca_data"] for each in yaml.safe_load(conf)["registries"]} == {PEM}


def test_trivy_has_its_databases_from_a_mirror() -> None:
    path = "/etc/entrepot/clients/trivy/trivy.yaml"
    found = content(made("trivy", PLAIN), path)
    assert found["registry"]["mirrors"]["index.docker.io"] == ["cache.example:5000/docker.io"]
    assert found["insecure"] is True
    databases = [*found["db"]["repository"], *found["db"]["java-repository"]]
    assert {each.split("/")[0] for each in databases} <= found["registry"]["mirrors"].keys()
    secure = content(made("trivy", SECURE, namespaces=("mirror.gcr.io", "ghcr.io", "[::1]:5000")), path)
    assert secure == {
        "registry": {
            "mirrors": {
                "mirror.gcr.io": ["cache.example/mirror.gcr.io"],
                "ghcr.io": ["cache.example/ghcr.io"],
            }
        }
    }
    local = content(made("trivy", PLAIN, url=URL("http://127.0.0.1:5000")), path)
    assert "insecure" not in local


def test_flux_names_the_server() -> None:
    sources = {each["kind"]: each["spec"] for each in yaml.safe_load_all(example(made("flux", PLAIN)))}
    for spec in sources.values():
        assert spec["url"].startswith("oci://cache.example:5000/ghcr.io/")
        assert spec["insecure"] is True
    setup = made("flux", SECURE)
    for source in yaml.safe_load_all(example(setup)):
        assert source["spec"]["certSecretRef"] == {"name": "entrepot"}
        assert "insecure" not in source["spec"]
    (file,) = (each for each in setup.pieces if each.kind == "file")
    assert file.content == PEM and f"--from-file={file.path}" in setup.after


def test_names_of_namespaces_are_those_of_the_configuration(tmp_path: Path) -> None:
    upstream = {"upstream": "https://x.example"}
    namespaces = {
        "ghcr.io": {**upstream, "hosts": ["ghcr.example", "other.example"]},
        "quay.io": {**upstream, "hosts": ["quay.example:6000"], "aliases": ["q.example", "quay"]},
        "local": {"store": {}, "hosts": ["local.example"]},
        "free.example:5000": upstream,
        "taken.example:5000": upstream,
        "alias.example:5000": {**upstream, "aliases": ["taken.example_5000"]},
    }
    config = configuration(tmp_path, {"namespaces": namespaces})
    found = site_of(config, url="http://cache.example:5000")
    assert found.named == {"ghcr.io": "ghcr.example:5000", "quay.io": "quay.example:6000"}
    assert found.aliases == {"quay.io": "quay", "taken.example:5000": ""}
    secure = site_of(config, url="https://cache.example")
    assert secure.named == {"ghcr.io": "ghcr.example", "quay.io": "quay.example:6000"}


@pytest.mark.parametrize("client", RENDERERS)
@pytest.mark.parametrize("port", ["", ":5000"])
def test_every_file_parses(client: str, port: str) -> None:
    """For each client, and whatever the server is."""
    kinds = {".json": json.loads, ".yaml": lambda text: list(yaml.safe_load_all(text))}
    for base in (PLAIN, replace(SECURE, bypass=False), replace(PLAIN, named=NAMED, every=False)):
        scheme = base.url.scheme
        for url in (
            f"{scheme}://cache.example{port}",
            f"{scheme}://127.0.0.1{port}",
            f"{scheme}://[fd00::1]{port}",
        ):
            for names in (PLAIN.namespaces, ("ghcr.io",), ("docker.io", "[::1]:5000"), ()):
                site = replace(base, url=URL(url), namespaces=names, stores={"local": "127.0.0.1:5001"})
                setup = RENDERERS[client](site)
                assert setup.client == client and setup.after
                for piece in setup.pieces:
                    assert piece.content.endswith("\n")
                    if piece.kind == "flags":
                        assert shlex.split(piece.content)
                    elif piece.kind == "example":
                        assert piece.path
                    elif (suffix := Path(piece.path).suffix) in kinds:
                        assert kinds[suffix](piece.content)
                    elif suffix in (".toml", ".conf"):
                        content(replace(setup, pieces=[piece]), piece.path)
                    else:
                        assert piece.content == base.ca
