"""Distribution's layout, as it is read: also where it is damaged, or half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from storage.migration import distribution
from storage.migration.distribution import Absent
from storage.oci import Digest
from tests.layout import INDEX, MANIFEST, Layout, described, digest_of


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "registry")


@pytest.mark.parametrize("place", ["", "docker", "docker/registry", "docker/registry/v2"])
def test_the_directory_may_be_named_from_any_of_its_heights(made: Layout, place: str) -> None:
    made.image("a", "1")
    assert list(distribution.DistributionTree(made.directory / place).repositories()) == ["a"]


def test_another_directory_is_none(tmp_path: Path) -> None:
    (tmp_path / "docker" / "registry" / "v2" / "blobs").mkdir(parents=True)
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{directory} is not a directory of Distribution"):
            distribution.DistributionTree(directory)


def test_repositories_nest(made: Layout) -> None:
    for name in ("b", "a", "a/b", "a/b/c", "a-b", "_x/y", "only/below"):
        made.image(name, "1")
    made.blob("pushed/halfway", b"a layer")
    (made.repository("a") / "_uploads" / "0b" / "_manifests").mkdir(parents=True)
    (made.root / "repositories" / "a-file").write_text("")
    (made.root / "repositories" / "around").symlink_to(made.root / "repositories")
    assert list(distribution.DistributionTree(made.directory).repositories()) == [
        "a", "a/b", "a/b/c", "a-b", "b", "only/below",
    ]  # fmt: skip


def test_manifests_tags_and_blobs(made: Layout) -> None:
    one, two = made.image("a/b", "v1", "latest"), made.image("a/b", "v2", layers=[b"x", b"y"])
    made.point("a/b", "latest", two, at=1000.5)
    found = distribution.DistributionTree(made.directory)
    assert list(found.manifests("a/b")) == sorted((one, two))
    assert list(found.tags("a/b")) == ["latest", "v1", "v2"]
    assert found.tag("a/b", "latest") == distribution.TagLink("latest", Digest(two), 1000.5)
    manifest = found.manifest("a/b", Digest(one))
    assert (manifest.media_type, manifest.digest) == (MANIFEST, one)
    assert manifest.content == made.data(one).read_bytes()
    assert found.blob("a/b", Digest(digest_of(b"x"))).read_bytes() == b"x"


def test_what_it_leaves_lying_about_means_nothing(made: Layout) -> None:
    image = made.image("a", "1")
    revisions = made.repository("a") / "_manifests" / "revisions"
    (revisions / "sha256" / ("0" * 64)).mkdir()
    (revisions / "sha256" / ("1" * 64)).mkdir()
    (revisions / "sha256" / ("1" * 64) / "link.0b-1c.tmp").write_text("sha256:")
    (revisions / "sha256" / "a-file").write_text("")
    (made.repository("a") / "_manifests" / "tags" / "half").mkdir()
    (made.data(image).parent / "data.0b.tmp").write_bytes(b"half")
    found = distribution.DistributionTree(made.directory)
    assert list(found.manifests("a")) == [image]
    assert list(found.tags("a")) == ["1"]
    made.tag("a", "1").unlink()
    with pytest.raises(Absent, match="no link"):
        found.tag("a", "1")
    assert list(found.tags("nowhere")) == []
    assert list(found.manifests("nowhere")) == []


def test_a_link_may_name_data_of_another_algorithm(made: Layout) -> None:
    asked = made.blob("a", b"content", "sha512")
    assert asked.startswith("sha512:")
    assert distribution.DistributionTree(made.directory).blob("a", Digest(asked)).read_bytes() == b"content"


def test_a_repository_shows_what_it_links_only(made: Layout) -> None:
    digest = Digest(made.blob("a", b"content"))
    found = distribution.DistributionTree(made.directory)
    with pytest.raises(Absent, match="no link to it in this repository"):
        found.blob("b", digest)
    made.data(digest).unlink()
    with pytest.raises(Absent, match="a link to it, but no data"):
        found.blob("a", digest)


@pytest.mark.parametrize("text", [b"", b"sha256:", b"sha256:" + b"0" * 63, b"\xff", b"md5:00", b"x" * 5000])
def test_a_damaged_link(made: Layout, text: bytes) -> None:
    image = made.image("a", "1")
    made.link("a", "_manifests/revisions", image).write_bytes(text)
    made.tag("a", "1").write_bytes(text)
    found = distribution.DistributionTree(made.directory)
    for ask in (lambda: found.manifest("a", Digest(image)), lambda: found.tag("a", "1")):
        with pytest.raises(Absent, match="its link is damaged"):
            ask()


def test_data_that_is_no_file(made: Layout) -> None:
    digest = Digest(made.blob("a", b"content"))
    data = made.data(digest)
    data.unlink()
    os.mkfifo(data)  # to open it would wait for ever
    with pytest.raises(Absent, match="is not a file"):
        distribution.DistributionTree(made.directory).blob("a", digest)


CONFIG = described("application/vnd.oci.image.config.v1+json", b"{}")


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        ({"schemaVersion": 2, "config": CONFIG, "layers": []}, MANIFEST),
        ({"schemaVersion": 2, "manifests": []}, INDEX),
        ({"mediaType": INDEX, "schemaVersion": 2, "manifests": []}, INDEX),
        (
            {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "schemaVersion": 2},
            "application/vnd.docker.distribution.manifest.v2+json",
        ),
        (
            {"mediaType": "application/vnd.docker.distribution.manifest.list.v2+json", "manifests": []},
            "application/vnd.docker.distribution.manifest.list.v2+json",
        ),
    ],
)
def test_the_type_of_a_manifest_is_told_by_its_content(
    made: Layout, body: dict[str, object], media_type: str
) -> None:
    digest = Digest(made.manifest("a", body))
    assert distribution.DistributionTree(made.directory).manifest("a", digest).media_type == media_type


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no JSON", "cannot be read"),
        (b'{"schemaVersion": 2, "layers": 7}', "cannot be read"),
        (b'{"schemaVersion": "two"}', "cannot be read"),
        (b'{"schemaVersion": 1, "name": "a", "fsLayers": []}', "schema version 1"),
        (b"{}", "schema version 0"),
        (b'{"schemaVersion": 2, "mediaType": "text/plain"}', "type text/plain"),
        (b" " * (4 << 20) + b"{}", "more than a manifest may have"),
    ],
)
def test_a_manifest_that_cannot_be_taken(made: Layout, content: bytes, why: str) -> None:
    digest = Digest(made.manifest("a", content))
    with pytest.raises(Absent, match=why):
        distribution.DistributionTree(made.directory).manifest("a", digest)


def test_a_manifest_that_is_damaged(made: Layout) -> None:
    digest = Digest(made.image("a"))
    made.data(digest).write_bytes(json.dumps({"schemaVersion": 2}).encode())
    with pytest.raises(Absent, match="damaged: its content is sha256:"):
        distribution.DistributionTree(made.directory).manifest("a", digest)
