"""The tutorials are walked, command by command."""

from __future__ import annotations

from tests.clients import images
from tests.clients.conftest import Walks
from tests.clients.site import DockerRegistry


def test_a_mirror(walks: Walks, registries: dict[str, DockerRegistry]) -> None:
    image = images.index("alpine", "amd64", "arm64")
    images.push(registries["docker.io"].url, "library/alpine", "3.20", image)
    images.push(registries["ghcr.io"].url, "shop/app", "2.0", images.image("app"))
    walk = walks("docs/tutorials/mirror.md", {"drill 1m": "drill 1s"})
    walk.section("Start a cache")
    walk.section("Pull through it")
    asked = registries["docker.io"].requests()
    assert "library/alpine" in " ".join(asked)
    walk.section("Let clients find it by themselves")
    walk.section("Pull without the internet")
    assert registries["docker.io"].requests() == asked
    assert {walk.index(each) for each in ("again", "usual", "offline")} == {walk.index("alpine")}
    walk.check_whole("check", "serve", "ls", "why", "stats", "setup", "drill")


def test_a_private_registry(walks: Walks, registries: dict[str, DockerRegistry]) -> None:
    hub = registries["docker.io"].url
    images.push(hub, "library/alpine", "3.20", images.image("alpine"))
    there = hub.replace("http:", "docker:")
    walk = walks(
        "docs/tutorials/private-registry.md",
        {" docker://docker.io": f" --src-tls-verify=false {there}"},
    )
    for title in ("Make a user", "Start a registry", "Push", "Name and delete"):
        walk.section(title)
    walk.check_whole("check", "serve", "tag", "ls", "delete", "collect")
