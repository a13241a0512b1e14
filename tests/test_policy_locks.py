"""Lock files: written by `entrepot lock`, and what a rule with `locked` serves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.admin.dockerfiles import base_images, is_dockerfile
from proxy.cli.main import main
from proxy.config.errors import StartError
from proxy.policy.locks import read_lock
from storage.oci import Digest
from tests.configuring import fault
from tests.conftest import Clock, Serve, Site
from tests.test_policed import policy, refusal, served, status
from tests.test_policy_moves import COOLDOWN, at
from tests.upstream import Upstream

A = Digest.of(b"a")


def locked(path: Path, **keys: Any) -> dict[str, Any]:
    rule = {"name": "pinned", "action": "allow", "repositories": ["docker.io/a/*"], "locked": str(path)}
    return policy(rule, **keys)


async def lock(site: Site, *words: str) -> Result:
    words = ("lock", *words, "--server", str(site.app.admin_url))
    return await asyncio.to_thread(CliRunner().invoke, main, words)


# Lock files


def test_what_a_lock_file_says(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    path.write_text(f"# all\n\ndocker.io/a/b:1@{A}  # why\ndocker.io/a/c@{A}\n[::1]:5000/x/y:2@{A}\n")
    assert read_lock(path) == {
        "docker.io/a/b": {A: "docker.io/a/b:1"},
        "docker.io/a/c": {A: "docker.io/a/c"},
        "[::1]:5000/x/y": {A: "[::1]:5000/x/y:2"},
    }


@pytest.mark.parametrize("line", ["docker.io/a/b:1", "docker.io/a/b:1@sha256:00", "docker.io/a/b:1@"])
def test_what_is_no_lock_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "images.lock"
    path.write_text(f"docker.io/a/b:1@{A}\n{line}\n")
    with pytest.raises(StartError, match=r"images\.lock:2: expected namespace/repository:tag@sha256:"):
        read_lock(path)
    with pytest.raises(StartError, match=r"other\.lock cannot be read: No such file"):
        read_lock(tmp_path / "other.lock")
    path.write_bytes(b"\xff")
    with pytest.raises(StartError, match="is not UTF-8 at byte 0"):
        read_lock(path)


def test_a_rule_that_denies_cannot_be_locked() -> None:
    rule = {"name": "a", "action": "deny", "reason": "x", "locked": "/x"}
    assert fault(json.dumps(policy(rule))).startswith("policy.rules[0]: rule a denies, whatever is locked")


# Dockerfiles


@pytest.mark.parametrize(
    ("path", "found"),
    [
        *[(name, True) for name in ("Dockerfile", "x/Dockerfile.dev", "app.dockerfile", "Containerfile")],
        *[(name, False) for name in ("compose.yml", "images.txt", "Dockerfiles", "-")],
    ],
)
def test_which_file_is_a_dockerfile(path: str, found: bool) -> None:
    assert is_dockerfile(path) is found


def test_what_a_dockerfile_builds_on() -> None:
    text = """\
# syntax=docker/dockerfile:1
ARG VERSION=3.20
ARG BASE="alpine:${VERSION}"
ARG GIVEN
FROM --platform=$BUILDPLATFORM ${BASE} AS build
ARG VERSION=ignored
COPY --from=ghcr.io/tools/make:${VERSION} /make /
RUN FROM nothing
from build as Test
# FROM comment
FROM scratch
FROM \\
  $GIVEN
COPY --from=test /x /
COPY --from=0 /x /
COPY --chown=1 --from=quay.io/x/y /x /
"""
    assert list(base_images(text, {"GIVEN": "team/app:1", "VERSION": "9"})) == [
        (5, "alpine:3.20"),
        (7, "ghcr.io/tools/make:3.20"),
        (12, "team/app:1"),
        (16, "quay.io/x/y"),
    ]
    with pytest.raises(ValueError, match="the variable GIVEN is not set"):
        list(base_images(text, {}))


# What is served


async def test_exactly_what_is_locked_is_served(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock
) -> None:
    children = [upstream.image("a/b", None, [each]) for each in (b"amd64", b"arm64")]
    index = upstream.index("a/b", "v1", children)
    signature = upstream.artifact("a/b", index, "application/vnd.example.signature")
    other = upstream.image("a/c", "1", [b"other"])
    site = await serve(upstream)
    assert await status(site, "v1") == 200
    dockerfile, images = tmp_path / "Dockerfile", tmp_path / "images.txt"
    dockerfile.write_text("FROM a/b:v1\n")
    images.write_text(f"a/b:v1\na/b@{children[0].digest}\n")
    assert await status(site, children[0].digest) == 200
    result = await lock(site, str(dockerfile), str(images))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"docker.io/a/b:v1@{index.digest}",
        f"docker.io/a/b@{children[0].digest}",
    ]
    path = tmp_path / "images.lock"
    path.write_text(result.stdout)
    await site.app.stop()
    site = await serve(upstream, top=locked(path))
    assert await status(site, "v1") == 200
    assert await status(site, signature.digest) == 200
    for child in children:
        for kind, digest in served(child):
            assert await status(site, digest, kind) == 200
    assert (
        f"policy rule pinned refuses docker.io/a/c:1: it is {other.digest}, which is not in images.lock:"
        " of docker.io/a/c it has nothing."
    ) in await refusal(site, "1", repository="a/c")
    moved = upstream.image("a/b", "v1", [b"moved"])
    clock.advance(3600)
    assert (
        f"it is {moved.digest}, which is not in images.lock: of docker.io/a/b it has"
        f" docker.io/a/b:v1@{index.digest}, docker.io/a/b@{children[0].digest}."
    ) in await refusal(site, "v1")
    assert await status(site, index.digest) == 200


async def test_a_lock_has_what_a_held_tag_stands_for(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock
) -> None:
    old = upstream.image("a/b", "latest", [b"old"])
    site = await serve(upstream, top=policy(moves=[COOLDOWN]))
    assert await at(site, "latest") == old.digest
    upstream.image("a/b", "latest", [b"new"])
    clock.advance(3600)
    assert await at(site, "latest") == old.digest
    images = tmp_path / "images.txt"
    images.write_text("a/b\n")
    result = await lock(site, str(images), "--json")
    assert json.loads(result.stdout) == [{"image": "docker.io/a/b:latest", "digest": old.digest}]


async def test_what_cannot_be_locked(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    site = await serve(upstream)
    images = tmp_path / "images.txt"
    images.write_text("a/b:1\na/c:2\n")
    result = await lock(site, str(images))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not stored: a/b:1, a/c:2; fetch them first (entrepot warm)" in result.stderr
    images.write_text("# nothing\n")
    assert "no image is named in" in (await lock(site, str(images))).stderr
    result = await lock(site, str(tmp_path / "Dockerfile"))
    assert (result.exit_code, "Dockerfile: cannot be read" in result.stderr) == (2, True)


def test_a_lock_file_that_is_missing_keeps_the_server_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "entrepot.yml"
    path.write_text(
        json.dumps({**locked(tmp_path / "images.lock"), "disk": {"path": str(tmp_path / "disk")}})
    )
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 1
    assert "images.lock cannot be read: No such file" in result.output
