"""What the tests with real clients stand on: filled upstream registries, and the site before them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from tests.clients import images
from tests.clients.image_page import layout as layout
from tests.clients.processes import free_port, own_address, require
from tests.clients.site import DockerRegistry, Site
from tests.clients.walk import Walk

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LARGE = 6 << 20  # bytes of a file: each client unpacks it again at each pull
Walks = Callable[..., Walk]


def pytest_itemcollected(item: pytest.Item) -> None:
    """All tests here are such."""
    if item.path.is_relative_to(HERE):
        item.add_marker(pytest.mark.clients)


@dataclass(frozen=True)
class Images:
    """What lies upstream, by where it lies (namespace/repository:tag)."""

    layers: images.Image  # docker.io/library/layers:1
    schema2: images.Image  # docker.io/library/schema2:1
    platforms: images.Image  # docker.io/library/platforms:1
    artifact: images.Image  # docker.io/team/artifact:1
    app: images.Image  # quay.example/team/app:1


@dataclass(frozen=True)
class Filled:
    """Directories of docker-registry with `images` in them, by namespace."""

    images: Images
    roots: dict[str, Path]


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Content pushed once to registries that every test starts anew, and only reads."""
    require("docker-registry", root=False)
    directory = tmp_path_factory.mktemp("upstream")
    program = Path(shutil.which("docker-registry") or "")  # certain to be here
    large = directory / "large"
    large.write_bytes(program.read_bytes()[:LARGE])
    made = Images(
        layers=images.image("layers", large),
        schema2=images.image("schema2", types=images.DOCKER),
        platforms=images.index("platforms", "amd64", "arm64"),
        artifact=images.artifact(),
        app=images.image("app"),
    )
    contents = {
        "docker.io": {
            "library/layers": made.layers,
            "library/schema2": made.schema2,
            "library/platforms": made.platforms,
            "team/artifact": made.artifact,
        },
        "quay.example": {"team/app": made.app},
    }
    for namespace, repositories in contents.items():
        registry = DockerRegistry(directory / namespace, directory)
        try:
            for repository, image in repositories.items():
                images.push(registry.url, repository, "1", image)
        finally:
            registry.stop()
    return Filled(made, {namespace: directory / namespace for namespace in contents})


@pytest.fixture
def pushed(filled: Filled) -> Images:
    return filled.images


@pytest.fixture
def site(filled: Filled, tmp_path: Path) -> Iterator[Site]:
    """An empty cache before the filled upstreams."""
    with before(filled, tmp_path) as site:
        yield site


@pytest.fixture(scope="module")
def shared(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests of a module, which do not mind what others have pulled through it."""
    with before(filled, tmp_path_factory.mktemp("shared")) as site:
        yield site


@pytest.fixture
def encrypted(filled: Filled, tmp_path: Path) -> Iterator[Site]:
    """The same by TLS."""
    authority = Authority(tmp_path)
    with before(filled, tmp_path, authority.issue("server", own_address()), authority.ca) as site:
        yield site


@contextmanager
def before(
    filled: Filled,
    tmp_path: Path,
    tls: Mapping[str, str] | None = None,
    ca: Path | None = None,
    **top: Any,
) -> Iterator[Site]:
    """An empty cache before the filled upstreams; `top` are keys of the configuration's top level."""
    upstreams: dict[str, DockerRegistry] = {}
    try:
        for namespace, root in filled.roots.items():
            upstreams[namespace] = DockerRegistry(root, tmp_path)
        site = Site(upstreams, tmp_path, tls=tls, ca=ca, **top)
        try:
            yield site
        finally:
            site.stop()
    finally:
        for upstream in upstreams.values():
            upstream.stop()


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory for a client's own state; short, for a socket's path holds 107 bytes.

    Its removal fails where a client left a mount behind.
    """
    directory = Path(tempfile.mkdtemp(prefix="entrepot-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[dict[str, DockerRegistry]]:
    """Empty upstream registries, by namespace."""
    require("docker-registry", "skopeo", root=False)
    found: dict[str, DockerRegistry] = {}
    try:
        for name in ("docker.io", "ghcr.io"):
            found[name] = DockerRegistry(tmp_path / name, tmp_path)
        yield found
    finally:
        for each in found.values():
            each.stop()


@pytest.fixture
def walks(home: Path, registries: dict[str, DockerRegistry]) -> Iterator[Walks]:
    """Walks through a page, of which are changed: the addresses of the registries and of the server, the
    directories below /var/lib, where `setup --write` puts what is the machine's, and what a test says.
    """
    started: list[Walk] = []

    def walk(page: str, changes: Mapping[str, str] | None = None) -> Walk:
        common = {
            "https://registry-1.docker.io": registries["docker.io"].url,
            "https://ghcr.io": registries["ghcr.io"].url,
            "127.0.0.1:5000": f"127.0.0.1:{free_port()}",
            "127.0.0.1:5001": f"127.0.0.1:{free_port()}",
            "/var/lib": str(home / "lib"),
        }
        started.append(Walk(ROOT / page, home, {**(changes or {}), **common}))
        return started[-1]

    yield walk
    for each in started:
        each.stop()
