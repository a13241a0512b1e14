"""`entrepot export` and `import`, as they are called."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import main
from tests.archives import REF_NAME, image, layout, tar
from tests.conftest import Serve, Site
from tests.upstream import Upstream

MADE = image(b"layer" * 1000)
NAME = "docker.io/library/alpine:3"


@dataclass
class Ground:
    directory: Path
    config: Path
    archive: Path

    def run(self, *words: str | Path, **options: Any) -> Result:
        # The program has a loop of its own.
        return CliRunner().invoke(main, [*map(str, words), "--config", str(self.config)], **options)

    def done(self, *words: str | Path) -> Result:
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        return result

    def fails(self, *words: str | Path, status: int = 1) -> str:
        result = self.run(*words)
        assert result.exit_code == status, result.output
        return result.stderr


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    config, archive = tmp_path / "entrepot.yml", tmp_path / "archive.tar"
    tree = {
        "admin": "off",
        "offline": True,
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": {"url": "http://127.0.0.1:9"}}},
    }
    config.write_text(json.dumps(tree))
    archive.write_bytes(tar(layout([(MADE, {REF_NAME: NAME})])))
    yield Ground(tmp_path, config, archive)


def test_in_and_out(ground: Ground) -> None:
    result = ground.done("import", ground.archive)
    assert result.stdout.splitlines()[1].split() == [NAME, MADE.digest]
    assert result.stdout.splitlines()[2].endswith("1 reference, 1 manifest, 2 new blobs, 5.1 KiB")
    assert str(ground.archive) in result.stderr  # how far it is
    bundle = ground.directory / "bundle.tar"
    result = ground.done("export", bundle, "alpine:3")
    assert result.stdout.splitlines()[1].split() == [NAME, MADE.digest, "all"]
    assert result.stdout.splitlines()[2] == f"{bundle}: 1 reference, 0 referrers, 3 blobs, 5.5 KiB"
    result = ground.done("import", bundle)
    assert result.stdout.splitlines()[1].split() == [NAME, MADE.digest, "the", "same"]


def test_in_json(ground: Ground) -> None:
    result = ground.done("import", ground.archive, "--json")
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert found["references"] == [
        {"repository": "docker.io/library/alpine", "tag": "3", "digest": MADE.digest, "before": None}
    ]
    found = json.loads(ground.done("export", ground.directory / "b", "alpine:3", "--json").stdout)
    assert [each["reference"] for each in found["references"]] == [NAME]
    told = json.loads(ground.fails("export", ground.directory / "c", "alpine:4", "--json"))
    assert told["code"] == "MANIFEST_UNKNOWN"


def test_names_from_a_list(ground: Ground) -> None:
    ground.done("import", ground.archive)
    names = ground.directory / "images.txt"
    names.write_text("# of the site\n\nalpine:3   # the base\n")
    ground.done("export", ground.directory / "bundle", "--list", names)
    names.write_text("# nothing\n")
    assert "no name" in ground.fails("export", ground.directory / "b", "--list", names, status=2)
    assert "none.txt" in ground.fails("export", ground.directory / "b", "--list", "none.txt", status=2)


@pytest.mark.clients
def test_through_pipes(ground: Ground) -> None:
    ground.done("import", ground.archive)
    command = [sys.executable, "-m", "proxy"]
    config = ["--config", str(ground.config)]
    exported = subprocess.run([*command, "export", "-", "alpine:3", *config], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as archive:
        assert archive.getnames()[:3] == ["oci-layout", "index.json", "entrepot.json"]
    assert NAME in exported.stderr.decode()
    imported = subprocess.run(
        [*command, "import", "-", *config], input=exported.stdout, capture_output=True, check=True
    )
    assert "imported from standard input: 1 reference" in imported.stdout.decode()
    cut = ground.run("import", "-", input=exported.stdout[:-600])
    assert (cut.exit_code, "it is truncated" in cut.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["export", "b"], 2, "name what to export"),
        (["export", "b", "alpine:3"], 1, "there is no cache in"),
        (["export", "b", "alpine:3", "--since", "none.tar"], 1, "there is no cache in"),
        (["export", "b", "alpine:3", "--platform", "linux"], 2, "platform"),
        (["export", "b", "alpine:3", "--used-within", "soon"], 2, "--used-within"),
        (["export", "b", "alpine:3", "--server", "http://127.0.0.1:1"], 2, "must end in .tar"),
        (["export", "b.tar", "alpine:3", "--server", "http://127.0.0.1:1"], 1, "no server at"),
        (["import", "x", "--server", "http://127.0.0.1:1", "--verify-key", "k"], 2, "without --server"),
        (["export", "-", "a", "--server", "http://127.0.0.1:1", "--sign-key", "k"], 2, "without --server"),
        (["import"], 2, "ARCHIVE"),
        (["import", "archive.tar", "--from-registry-dir", "."], 2, "with --namespace, --match and"),
        (["import", "--from-registry-dir", ".", "--server", "http://127.0.0.1:1"], 2, "and --dry-run"),
        (["import", "archive.tar", "--match", "*"], 2, "need --from-registry-dir"),
        (["import", "none.tar"], 1, "none.tar: No such file"),
        (["import", "archive.tar", "--as", "quay.io/x:1"], 2, "not a configured namespace"),
        (["import", "archive.tar", "--verify-key", "none.pub"], 1, "is not signed"),
    ],
)
def test_what_cannot_be(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, says: str
) -> None:
    monkeypatch.chdir(ground.directory)
    if words[:2] == ["export", "b"] and status == 2 and len(words) == 2:
        ground.done("import", ground.archive)
    assert says in ground.fails(*words, status=status)
    assert not (ground.directory / "b").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may work on what is another's")
@pytest.mark.parametrize("fresh", [True, False])
def test_what_root_leaves_is_of_the_servers_user(ground: Ground, fresh: bool) -> None:
    disk = ground.directory / "disk"
    disk.mkdir()
    if not fresh:
        ground.done("import", ground.archive)
        for path in disk.rglob("*"):
            os.chown(path, 65534, 65534)
    os.chown(disk, 65534, 65534)
    ground.done("import", ground.archive)
    ground.done("export", ground.directory / "b", "alpine:3")
    ground.done("pin", "alpine:3")
    ground.done("scrub")
    ground.done("purge", "alpine:3", "--force", "--yes")
    found = {path: path.stat().st_uid for path in disk.rglob("*")}
    assert {path for path, owner in found.items() if owner != 65534} == set()
    assert disk / "cache" / "records" / "cache.db" in found


def test_a_dry_run(ground: Ground) -> None:
    result = ground.done("import", ground.archive, "--dry-run")
    assert "would be imported from " in result.stdout
    assert "nothing that is stored matches" in ground.fails("export", ground.directory / "b", "*")


async def test_under_a_running_server(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    """What is imported is served at once, by a server that has just said that there is no such thing."""
    site: Site = await serve(upstream, top={"offline": True})
    path = "/v2/library/alpine/manifests/3"
    status, _, body = await site.get(path)
    assert (status, b"is not cached, and docker.io is set offline" in body) == (404, True)
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar(layout([(MADE, {REF_NAME: NAME})])))
    words = ["import", str(archive), "--config", str(tmp_path / "entrepot.yml")]
    result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert result.exit_code == 0, result.output
    status, headers, body = await site.get(path)
    assert (status, body, headers["Docker-Content-Digest"]) == (200, MADE.manifest, MADE.digest)
    for blob in MADE.blobs[:-1]:
        digest = next(each for each in layout([(MADE, {})]) if layout([(MADE, {})])[each] == blob)
        status, _, body = await site.get(f"/v2/library/alpine/blobs/sha256:{digest.rpartition('/')[2]}")
        assert (status, body) == (200, blob)
    status, _, body = await site.get("/v2/library/alpine/tags/list")
    assert json.loads(body)["tags"] == ["3"]
    assert upstream.requests == []


async def test_online_it_is_brought_up_to_date(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    newer = upstream.image("library/alpine", "3", [b"newer"])
    site: Site = await serve(upstream, fresh_for="10m")
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar(layout([(MADE, {REF_NAME: NAME})])))
    words = ["import", str(archive), "--config", str(tmp_path / "entrepot.yml")]
    result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert result.exit_code == 0, result.output
    # It says nothing of when it was validated: so that was at the import, by the clock on the wall.
    site.clock.now = 0.0
    status, _, body = await site.get("/v2/library/alpine/manifests/3")
    assert (status, body) == (200, newer.content)
