"""A release is made as docs/releasing.md says, on a machine whose registry and repository are its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients.image import Layout
from tests.clients.machine import ELSEWHERE, Machine
from tests.clients.processes import require
from tests.clients.surroundings import (
    CLONE,
    Page,
    provide_clone,
    provide_hub,
    provide_names,
    provide_packages,
)

pytestmark = pytest.mark.timeout(900)
REGISTRY, RELEASE, SMOKE = "registry.example", "/tmp/entrepot-release", "/tmp/entrepot-smoke"
LOCKED = ("deploy/image/requirements.txt", "deploy/image/build-requirements.txt")
SECRET = "gpg --batch --quiet --passphrase '' --quick-generate-key 'Ann <ann@cache.example>'"


@pytest.fixture
def machine(home: Path) -> Iterator[Machine]:
    """Which reaches Docker Hub and REGISTRY, into which it may push."""
    require("docker-registry", "dnsmasq", "git", "gpg", "skopeo")
    machine, authority = Machine(home), Authority(home)
    try:
        provide_names(machine, home, **{REGISTRY: ELSEWHERE})
        provide_hub(machine, home, authority)
        configuration = {
            "version": "0.1",
            "log": {"formatter": "text"},
            "storage": {"filesystem": {"rootdirectory": str(home / "registry")}},
            "http": {"addr": f"{ELSEWHERE}:443", "tls": authority.issue("registry", REGISTRY)},
        }
        (home / "registry.yml").write_text(json.dumps(configuration))
        machine.serve("listening on", "docker-registry", "serve", str(home / "registry.yml"))
        provide_packages(machine, home)
        provide_clone(machine)
        yield machine
    finally:
        machine.stop()


def pinned(text: str) -> set[str]:
    return set(re.findall(r"^[\w.-]+==[\w.]+", text, re.MULTILINE))


def test_a_release(machine: Machine, layout: Layout) -> None:
    page = Page("docs/releasing.md")

    def follow(words: str, directory: str) -> str:
        return machine.run(page.script(words), directory=directory)

    machine.run("python3 -m venv .venv; .venv/bin/pip install --quiet uv", directory=CLONE)
    locked = [machine.path(f"{CLONE}/{name}") for name in LOCKED]
    before = [pinned(each.read_text()) for each in locked]
    follow("uv pip compile", CLONE)
    assert [pinned(each.read_text()) for each in locked] == before  # the index has no others
    machine.run("git checkout --quiet .", directory=CLONE)

    assert follow("-m build", CLONE).count("PASSED") == 2
    said = follow("entrepot-smoke/bin/entrepot serve", RELEASE)
    assert "entrepot, version 0.1.0" in said
    assert '"Name": "127.0.0.1:5000/docker.io/library/alpine"' in said

    machine.run(SECRET)
    follow("git tag --sign", RELEASE)
    assert "Good signature" in machine.run("git verify-tag v0.1.0", directory=CLONE)

    helm = machine.path("/usr/local/bin/helm")
    shutil.copy(Path(sys.executable).parent / "helm", helm)
    assert f"Pushed: {REGISTRY}/charts/entrepot:0.1.0" in follow("helm push", RELEASE)

    shutil.copytree(layout.directory, machine.path(f"{RELEASE}/layout"))
    machine.run(f"ln -s {SMOKE}/bin/entrepot /usr/local/bin/entrepot")
    configuration = machine.path("/root/.config/entrepot.yml")
    configuration.parent.mkdir()
    configuration.write_text("namespaces: {local: {store: {}}}\n")
    machine.start("complete instructions", "entrepot", "serve")
    follow("entrepot import", RELEASE)
    assert layout.top["digest"] in machine.run(f"skopeo inspect docker://{REGISTRY}/entrepot:0.1.0")
    page.check_whole()
