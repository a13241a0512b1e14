"""docs/air-gap.md is walked, command by command."""

from __future__ import annotations

from tests.clients import images
from tests.clients.conftest import Walks
from tests.clients.site import DockerRegistry


def test_the_page_is_walked(walks: Walks, registries: dict[str, DockerRegistry]) -> None:
    walk = walks("docs/air-gap.md")
    first, second = images.index("first", "amd64", "arm64"), images.index("second", "amd64", "arm64")
    images.push(registries["docker.io"].url, "library/alpine", "3.20", first)
    images.push(registries["ghcr.io"].url, "shop/app", "2.0", images.image("app"))
    walk.section("List the images")
    walk.section("Outside")
    asked = {name: each.requests() for name, each in registries.items()}
    walk.section("Inside")
    assert {name: each.requests() for name, each in registries.items()} == asked
    assert first.amd64.digest in walk.index("alpine")
    images.push(registries["docker.io"].url, "library/alpine", "3.20", second)
    walk.section("Update the site")
    assert second.amd64.digest in walk.index("alpine-week-2")
    walk.check_whole("warm", "ready", "export", "import", "serve", "setup")
