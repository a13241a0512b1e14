"""The commands `copy` and `import`, as people and programs call them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from proxy.cli import console, migrate
from proxy.cli.main import main
from storage.errors import StorageFailed
from storage.migration.migration import Migration
from tests.conftest import Serve
from tests.layout import Layout, digest_of
from tests.upstream import OCI_MANIFEST, Basic, Bearer, Status, Takes, Upstream

HOSTED = {"local": {"store": {}}}


async def call(*words: str, **environment: str) -> Result:
    # The program has a loop of its own.  No login of whoever runs the tests is to be found.
    nobody: dict[str, str | None] = dict.fromkeys(("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"))
    given = {"HOME": "/nonexistent", **nobody, **environment}
    return await asyncio.to_thread(CliRunner().invoke, main, [*words], env=given)


async def told(*words: str, **environment: str) -> Any:
    result = await call(*words, "--json", **environment)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def address(registry: Upstream) -> str:
    return registry.url.removeprefix("http://")


@pytest.fixture
async def destination() -> AsyncIterator[Upstream]:
    async with Upstream(takes=Takes(checks=True)) as registry:
        yield registry


# Copy


async def test_one_image(upstream: Upstream, destination: Upstream) -> None:
    image = upstream.image("team/app", "1", [b"one"])
    source, target = f"{address(upstream)}/team/app:1", f"{address(destination)}/app:2"
    found = await told("copy", source, target)
    seconds = found.pop("seconds")
    assert seconds > 0
    config = upstream.repositories["team/app"].blobs[image.config]
    row = {"source": source, "destination": target, "digest": image.digest}
    assert found == {
        "images": [{**row, "outcome": "copied", "error": None}],
        "manifests": 1,
        "tags": 1,
        "blobs": 2,
        "bytes": len(config) + 3,
        "mounted": 0,
        "present": 0,
        "dry_run": False,
    }
    assert destination.repositories["app"].tags == {"2": image.digest}
    again = await told("copy", source, target)
    assert [each["outcome"] for each in again["images"]] == ["present"]


async def test_what_people_see(upstream: Upstream, destination: Upstream) -> None:
    upstream.image("app", "1", [b"one"])
    source, target = f"{address(upstream)}/app:1", f"{address(destination)}/app"
    result = await call("copy", "--dry-run", source, target)
    assert result.exit_code == 0
    assert "app" not in destination.repositories
    assert "would be copied" in result.stdout
    result = await call("copy", source, target)
    header, row, summary = result.stdout.splitlines()
    assert header.split() == ["SOURCE", "DESTINATION", "DIGEST", "RESULT", "ERROR"]
    assert row.split()[:2] == [source, f"{target}:1"]
    assert row.endswith("  copied")
    assert re.fullmatch(
        r"1 manifest and 2 blobs of \d+ B copied, 0 mounted, 0 already present, 1 tag set; \d+\.\d s", summary
    )
    lines = result.stderr.splitlines()
    assert lines[-1] == f"{source}: copied"
    assert f"{digest_of(b'one')}: 3 B of 3 B" in lines


async def test_several_of_several_registries(upstream: Upstream, destination: Upstream) -> None:
    async with Upstream() as third:
        upstream.image("team/app", "1.0", [b"1.0"])
        upstream.image("team/app", "1.1", [b"1.1"])
        upstream.image("team/base", "2", [b"2"])
        third.image("tool", "latest", [b"tool"])
        found = await told(
            "copy",
            f"{address(upstream)}/team/*:1.*",
            f"{address(third)}/tool",
            f"{address(destination)}/mirror/",
        )
    assert {each["destination"].partition("/")[2] for each in found["images"]} == {
        "mirror/app:1.0", "mirror/app:1.1", "mirror/tool:latest",
    }  # fmt: skip
    assert set(destination.repositories) == {"mirror/app", "mirror/tool"}


async def test_all_tags(upstream: Upstream, destination: Upstream) -> None:
    for number in range(30):
        upstream.image("a", f"v{number}", [b"%d" % (number % 3)])
    found = await told("copy", "--all-tags", f"{address(upstream)}/a", f"{address(destination)}/b")
    assert (len(found["images"]), found["tags"], found["manifests"]) == (30, 30, 3)
    assert destination.repositories["b"].tags == upstream.repositories["a"].tags


async def test_what_fails_is_told_and_others_are_copied(upstream: Upstream, destination: Upstream) -> None:
    upstream.image("good", "1")
    bad = upstream.image("bad", "1", [b"lost"])
    upstream.delete_blob("bad", bad.layers[0])
    sources = [f"{address(upstream)}/{name}:1" for name in ("bad", "good", "none")]
    words = ["copy", *sources, f"{address(destination)}/x/"]
    result = await call(*words, "--json")
    assert result.exit_code == 1
    rows = {each["source"].rpartition("/")[2]: each for each in json.loads(result.stdout)["images"]}
    assert {name: each["outcome"] for name, each in rows.items()} == {
        "bad:1": "failed", "good:1": "copied", "none:1": "failed",
    }  # fmt: skip
    assert rows["bad:1"]["error"].startswith(f"blob {bad.layers[0]}: ")
    assert json.loads(result.stderr) == {"error": "2 of 3 images could not be copied", "code": "NOT_COPIED"}
    assert set(destination.repositories["x/good"].tags) == {"1"}
    assert not destination.repositories.get("x/bad") or not destination.repositories["x/bad"].tags
    result = await call(*words)
    assert result.stderr.splitlines()[-1] == "entrepot: 2 of 3 images could not be copied"


async def test_a_registry_that_does_not_list(upstream: Upstream, destination: Upstream) -> None:
    upstream.next("GET", "catalog", Status(404))
    result = await call("copy", f"{address(upstream)}/*:1", f"{address(destination)}/", "--json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["images"]
    assert (row["source"], row["outcome"]) == (f"{address(upstream)}/*:1", "failed")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["copy", "r.example/a"], "Missing argument 'DESTINATION'|Missing argument 'SOURCE...'"),
        (["copy", "r.example/a", "r.example/b", "s.example/c"], "needs? a destination that ends with /"),
        (["copy", "ftp://r.example/a", "s.example/c"], "ftp://"),
        (["copy", "--platform", "arm64", "r.example/a", "s.example/c"], "expected os/architecture"),
        (["copy", "--transfers", "0", "r.example/a", "s.example/c"], "--transfers"),
        (["copy", "--source-credentials", "who", "r.example/a", "s.example/c"], "expected user:password"),
        (["copy", "--auth-file", "/nonexistent", "r.example/a", "s.example/c"], "--auth-file"),
        (["import"], "give an ARCHIVE, or --from-registry-dir"),
        (["import", "--from-registry-dir", "/nonexistent"], "does not exist"),
    ],
)
async def test_what_is_asked_wrongly(words: list[str], why: str) -> None:
    result = await call(*words)
    assert result.exit_code == 2
    assert re.search(why, result.stderr)


# Credentials


@pytest.mark.parametrize("how", ["option", "variable", "auth file", "docker's", "podman's"])
async def test_credentials(upstream: Upstream, destination: Upstream, tmp_path: Path, how: str) -> None:
    upstream.image("a", "1")
    who = Basic("who", "sec:ret")
    destination.auth = Bearer(who, anonymous=False)
    words = ["copy", f"{address(upstream)}/a:1", f"{address(destination)}/b"]
    environment: dict[str, str] = {}
    file = tmp_path / "auth.json"
    login = {"auth": who.header.removeprefix("Basic ")}
    file.write_text(json.dumps({"auths": {address(destination): login}}))
    if how == "option":
        words += ["--destination-credentials", "who:sec:ret"]
    elif how == "variable":
        environment["ENTREPOT_DESTINATION_CREDENTIALS"] = "who:sec:ret"
    elif how == "auth file":
        words += ["--auth-file", str(file)]
    elif how == "docker's":
        environment["DOCKER_CONFIG"] = str(tmp_path)
        file.rename(tmp_path / "config.json")
    else:
        environment["REGISTRY_AUTH_FILE"] = str(file)
    assert (await told(*words, **environment))["images"][0]["outcome"] == "copied"
    tokens = [each.reference for each in destination.requests if each.kind == "token"]
    assert tokens == ["repository:b:pull,push"]
    assert not any("Authorization" in each.headers for each in upstream.requests)


async def test_a_refusal_shows_no_secret(upstream: Upstream, destination: Upstream) -> None:
    upstream.image("a", "1")
    destination.auth = Basic("who", "right")
    result = await call(
        "copy", f"{address(upstream)}/a:1", f"{address(destination)}/b",
        ENTREPOT_DESTINATION_CREDENTIALS="who:wr0ng",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "401" in result.output
    assert "wr0ng" not in result.output


async def test_each_file_of_logins_is_looked_into_until_one_has_the_login(
    upstream: Upstream, destination: Upstream, tmp_path: Path
) -> None:
    upstream.image("a", "1")
    who = Basic("who", "sec:ret")
    destination.auth = Bearer(who, anonymous=False)
    login = {"auth": who.header.removeprefix("Basic ")}
    podman, docker = tmp_path / "run" / "containers" / "auth.json", tmp_path / "docker" / "config.json"
    for path, auths in ((podman, {"elsewhere.example": login}), (docker, {address(destination): login})):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"auths": auths}))
    places = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "DOCKER_CONFIG": str(docker.parent)}
    found = await told("copy", f"{address(upstream)}/a:1", f"{address(destination)}/b", **places)
    assert found["images"][0]["outcome"] == "copied"


async def test_each_repository_has_the_login_of_the_key_that_fits_best(
    upstream: Upstream, destination: Upstream, tmp_path: Path
) -> None:
    for name in ("team/app", "team/deep/app", "teams/app"):
        upstream.image(name, "1")
    upstream.auth = Bearer(Basic("who", "secret"), anonymous=False)
    host = address(upstream)
    wrong = {"auth": Basic("who", "wrong").header.removeprefix("Basic ")}
    right = {"auth": Basic("who", "secret").header.removeprefix("Basic ")}
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {host: wrong, f"{host}/team": right, f"{host}/team/deep": wrong}}))
    names = [f"{host}/{each}:1" for each in ("team/app", "team/deep/app", "teams/app")]
    result = await call("copy", *names, f"{address(destination)}/x/", "--auth-file", str(file), "--json")
    outcomes = {each["source"]: each["outcome"] for each in json.loads(result.stdout)["images"]}
    assert outcomes == dict(zip(names, ("copied", "failed", "failed"), strict=True))


# Our own server at either end


@pytest.mark.clients
async def test_into_a_namespace_of_our_own_and_out_again(
    serve: Serve, upstream: Upstream, destination: Upstream
) -> None:
    """And not into a cache; nor is what came damaged by that."""
    large = bytes(range(256)) * 20_000
    images = [upstream.image("library/app", None, [each.encode(), large], f"linux/{each}") for each in "ab"]
    index = upstream.index("library/app", "1", images)
    signature = upstream.artifact("library/app", index, "a/signature")
    site = await serve(upstream, more=HOSTED)
    here = site.url.removeprefix("http://")
    source = f"{here}/docker.io/library/app:1"
    result = await call("copy", source, f"{here}/docker.io/library/other", "--json")
    assert result.exit_code == 1
    assert "405" in json.loads(result.stdout)["images"][0]["error"]
    found = await told("copy", source, f"{here}/local/app")
    assert found["images"][0]["digest"] == index.digest
    found = await told("copy", f"{here}/local/app:1", f"{address(destination)}/app")
    assert destination.repositories["app"].tags == {"1": index.digest}
    assert signature.digest in destination.repositories["app"].manifests
    assert large in destination.repositories["app"].blobs.values()
    found = await told("copy", f"{here}/local/app:1", f"{here}/local/team/app:stable")
    assert (found["blobs"], found["bytes"], found["mounted"]) == (0, 0, 6)


# Import


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "registry")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "entrepot.yml"
    # Without an admin address: a server of another test may listen at the default one.
    tree = {"admin": "off", "disk": {"path": str(tmp_path / "disk")}, "namespaces": HOSTED}
    path.write_text(yaml.safe_dump(tree))
    return path


async def take(made: Layout, config: Path, *words: str) -> Result:
    return await call("import", "--config", str(config), "--from-registry-dir", str(made.directory), *words)


async def test_an_import(made: Layout, config: Path, tmp_path: Path) -> None:
    image = made.image("team/app", "1", layers=[b"one"])
    made.image("base", "1", layers=[b"one"])
    result = await take(made, config, "--dry-run")
    assert result.exit_code == 0
    assert "would be imported into local" in result.stdout
    result = await take(made, config, "--json")
    found = json.loads(result.stdout)
    assert found.pop("seconds") > 0
    assert found == {
        "namespace": "local", "repositories": 2, "tags": 2, "manifests": 2, "blobs": 3,
        "bytes": 3 + len('{"of": "team/app"}{"of": "base"}'), "linked": 3, "present": 0,
        "kept": [], "damaged": [], "dry_run": False,
    }  # fmt: skip
    result = await take(made, config)
    assert re.fullmatch(
        r"2 repositories, 0 tags, 0 manifests and 0 blobs \(0 of them hard links\) of 0 B"
        r" imported into local; 2 manifests already present; \d+\.\d s\n",
        result.stdout,
    )
    ls = json.loads((await call("ls", "--tags", "--config", str(config), "--json")).stdout)
    assert [each["repository"] for each in ls["images"]] == ["local/base", "local/team/app"]
    assert ls["images"][1]["digest"] == image


async def test_only_what_matches(made: Layout, config: Path) -> None:
    for name in ("team/app", "team/base", "other"):
        made.image(name, "1")
    result = await take(made, config, "--match", "team/*", "--json")
    assert json.loads(result.stdout)["repositories"] == 2


async def test_damage_is_told(made: Layout, config: Path) -> None:
    made.image("good", "1", layers=[b"fine"])
    bad = made.image("bad", "1", layers=[b"lost"])
    made.data(digest_of(b"lost")).unlink()
    result = await take(made, config, "--json")
    assert result.exit_code == 1
    assert {(each["repository"], each["what"]) for each in json.loads(result.stdout)["damaged"]} == {
        ("bad", digest_of(b"lost")), ("bad", bad), ("bad", "1"),
    }  # fmt: skip
    assert json.loads(result.stderr)["code"] == "DAMAGED"
    result = await take(made, config)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[:2] == ["damaged or missing:", lines[1]]
    assert lines[1].split() == ["REPOSITORY", "CONTENT", "REASON"]
    assert any(digest_of(b"lost") in each and "no data" in each for each in lines)
    assert result.stderr.splitlines()[-1] == "entrepot: 3 damaged or missing; all else was imported"


async def test_where_to_is_to_be_clear(made: Layout, config: Path, tmp_path: Path) -> None:
    made.image("a", "1")
    tree = {"disk": {"path": str(tmp_path / "disk")}, "namespaces": {**HOSTED, "team": {"store": {}}}}
    config.write_text(yaml.safe_dump(tree))
    result = await take(made, config)
    assert (result.exit_code, result.stderr) == (
        2, "entrepot: several namespaces have a store: give --namespace; there are local, team\n",
    )  # fmt: skip
    result = await take(made, config, "--namespace", "docker.io")
    assert result.exit_code == 2
    assert result.stderr == "entrepot: docker.io has no store; there are local, team\n"
    result = await take(made, config, "--namespace", "team", "--json")
    assert json.loads(result.stdout)["namespace"] == "team"
    tree["namespaces"] = {"ghcr.io": {"upstream": "https://ghcr.io"}}
    config.write_text(yaml.safe_dump(tree))
    result = await take(made, config)
    assert result.exit_code == 2
    assert "no namespace has a store to import into" in result.stderr


async def test_a_directory_that_is_no_registrys(config: Path, tmp_path: Path) -> None:
    result = await call("import", "--config", str(config), "--from-registry-dir", str(tmp_path), "--json")
    assert result.exit_code == 1
    assert "is not a directory of Distribution" in json.loads(result.stderr)["error"]


async def test_beside_a_running_server(
    made: Layout, serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    """Several processes share the directory; the server shows at once what was taken."""
    site = await serve(upstream, more=HOSTED)
    image = made.image("app", "1", layers=[b"one"])
    result = await take(made, tmp_path / "entrepot.yml", "--json")
    assert result.exit_code == 0, result.output
    status, headers, content = await site.get("/v2/local/app/manifests/1", Accept=OCI_MANIFEST)
    assert (status, headers["Docker-Content-Digest"]) == (200, image)
    assert content == made.data(image).read_bytes()
    assert (await site.get(f"/v2/local/app/blobs/{digest_of(b'one')}"))[2] == b"one"


async def test_the_rules_of_the_namespace_count(made: Layout, config: Path, tmp_path: Path) -> None:
    rules = {"sparse": True, "immutable_tags": ["v*"]}
    tree = {"disk": {"path": str(tmp_path / "disk")}, "namespaces": {"local": {"store": rules}}}
    config.write_text(yaml.safe_dump(tree))
    first = made.image("a", "v1", layers=[b"1"])
    made.index("a", [first, "sha256:" + "0" * 64], "index")
    assert (await take(made, config)).exit_code == 0
    made.point("a", "v1", made.image("a", layers=[b"2"]))
    result = await take(made, config, "--json")
    assert json.loads(result.stdout)["kept"] == [
        {"repository": "a", "what": "v1", "why": f"it stays {first}: it is immutable"}
    ]
    assert "not replaced:" in (await take(made, config)).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root changes owners")
async def test_what_root_takes_over_is_the_servers(made: Layout, config: Path, tmp_path: Path) -> None:
    made.image("a", "1")
    (tmp_path / "disk").mkdir()
    os.chown(tmp_path / "disk", 1000, -1)
    assert (await take(made, config)).exit_code == 0
    owners = {path: path.stat().st_uid for path in (tmp_path / "disk").rglob("*")}
    assert {path for path, owner in owners.items() if owner != 1000} == set()
    assert len([path for path in owners if path.is_file()]) >= 4


async def test_a_disk_that_fails_ends_it(made: Layout, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.image("a", "1")

    def fail(self: Migration, *_: object) -> None:
        raise StorageFailed("blobs: No space left on device")

    monkeypatch.setattr(Migration, "run", fail)
    result = await take(made, config)
    assert (result.exit_code, result.stderr) == (
        1, "entrepot: blobs: No space left on device; what was imported stays, and the next run continues\n",
    )  # fmt: skip


async def test_progress_of_an_import(made: Layout, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.image("a", "1")
    monkeypatch.setattr(console, "PAUSE", 0)
    original, run, seen = migrate._show, Migration.run, threading.Event()

    def show(migration: Migration, *rest: Any) -> None:
        original(migration, *rest)
        seen.set()

    def hold(self: Migration, *arguments: Any) -> None:
        self.repository, self.begun = "a", 1
        assert seen.wait(30)
        run(self, *arguments)

    monkeypatch.setattr(migrate, "_show", show)
    monkeypatch.setattr(Migration, "run", hold)
    result = await take(made, config)
    assert result.stderr.splitlines()[0] == "repositories: a: 0 manifests, 0 blobs, 0 B"
