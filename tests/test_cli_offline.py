"""warm, ready and drill as commands, against a running server and on a directory."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import pytest

from proxy.admin import reports
from proxy.cli import offline
from tests.conftest import Serve
from tests.test_cli_operations import NAME, Shop, served, shop, stocked
from tests.upstream import Hold, Upstream

__all__ = ["served", "shop"]  # fixtures


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Write it, and tell its path."""

    def write(text: str) -> str:
        path = tmp_path / f"file-{len(list(tmp_path.glob('file-*')))}"
        path.write_text(text)
        return str(path)

    return write


COMPOSE = "services:\n  a:\n    image: alpine:3\n  b:\n    image: ${REGISTRY:-docker.io}/team/new:1\n"
POD = "kind: Pod\nspec:\n  containers:\n  - image: docker.io/team/new:1\n"


# warm


@pytest.mark.clients
async def test_warm_fetches_what_is_named_in_all_ways(
    shop: Shop, upstream: Upstream, file: Callable[[str], str]
) -> None:
    new = upstream.image("team/new", "1", [b"new" * 1000])
    listed = upstream.image("team/listed", "2")
    words = ["--from", file(COMPOSE), "--from", file(POD), "--list", file("# all\nteam/listed:2\n")]
    heads, *rows, sums = await shop.lines("warm", "alpine:3", *words)
    assert heads.split()[:2] == ["REFERENCE", "COMPLETE"]
    found = {row.split()[0]: row.split()[1:6] for row in rows}
    assert found == {
        f"{NAME}:3": ["yes", "3", "0", "5", "2"],
        "docker.io/team/listed:2": ["yes", "1", "0", "2", "2"],
        "docker.io/team/new:1": ["yes", "1", "0", "2", "2"],
    }
    assert sums.startswith("3 of 3 images complete; fetched 6 blobs, ")
    stored = {f"sha256:{path.name}" for path in (shop.site.directory / "cache" / "blobs").glob("*/*/*")}
    assert {each for image in (new, listed, shop.other) for each in image.layers} <= stored
    upstream.clear()
    told = msgspec.convert(await shop.told("warm", "alpine:3"), list[reports.WarmRow])
    assert [(each.here, each.fetched) for each in told] == [(True, 0)]
    assert not [each for each in upstream.log if "GET blob" in each]


@pytest.mark.clients
async def test_warm_names_what_is_not_here_and_why(
    shop: Shop, upstream: Upstream, file: Callable[[str], str]
) -> None:
    words = ["warm", "alpine:3", "alpine:4", "nowhere.example/x", "--platform", "linux/arm64"]
    result = await shop.run(*words)
    assert result.exit_code == 1
    _, here, unknown, nowhere, sums = result.stdout.splitlines()
    assert here.split()[:2] == [f"{NAME}:3", "yes"]
    assert unknown.split()[:2] == [f"{NAME}:4", "no"]
    assert "docker.io answered 404" in unknown
    assert nowhere.split()[:2] == ["nowhere.example/x", "no"]
    assert "is not a configured namespace" in nowhere
    assert sums.startswith("1 of 3 images complete")
    assert "entrepot: 2 of 3 images are not complete" in result.stderr
    told = json.loads((await shop.run(*words, "--json")).stdout)
    assert [each["here"] for each in told] == [True, False, False]
    lacks = await shop.run("warm", "alpine:3", "--platform", "linux/s390x")
    assert (lacks.exit_code, "there is no image for linux/s390x" in lacks.stdout) == (1, True)


async def test_warm_without_what_refers_to_it(shop: Shop, upstream: Upstream) -> None:
    upstream.clear()
    await shop.lines("warm", "alpine:3", "--no-referrers")
    assert not [each for each in upstream.log if "referrers" in each or ".sig" in each]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no image is named: give REF, --list or --from"),
        (["--list", "/dev/null"], "no image is named"),
        (["--from", "/nowhere.yml"], "/nowhere.yml: cannot be read: No such file"),
        (["alpine", "--platform", "amd64"], "expected os/architecture"),
        (["alpine", "--jobs", "0"], "--jobs"),
    ],
)
async def test_warm_asked_wrongly(shop: Shop, words: list[str], says: str) -> None:
    assert says in await shop.fails("warm", *words, status=2)


async def test_a_broken_file_is_named_with_its_line(shop: Shop, file: Callable[[str], str]) -> None:
    broken = file("services:\n  a: [\n")
    for command in (["warm", "alpine", "--from", broken], ["ready", broken]):
        assert f"{broken}:3: " in await shop.fails(*command, status=2)
    told = json.loads(await shop.fails("ready", broken, "--json", status=2))
    assert told["code"] == "FILE_INVALID"


async def test_warm_reads_standard_input(shop: Shop, upstream: Upstream) -> None:
    upstream.image("team/new", "1")
    result = await shop.run("warm", "--from", "-", input=POD)
    assert (result.exit_code, "docker.io/team/new:1  yes" in result.stdout) == (0, True)


async def test_names_with_an_address_of_the_cache(
    shop: Shop, upstream: Upstream, file: Callable[[str], str]
) -> None:
    upstream.image("team/new", "1")
    path = file("services: {a: {image: 'cache.example:5000/docker.io/team/new:1'}}")
    assert "docker.io/team/new:1  yes" in "\n".join(
        await shop.lines("warm", "--from", path, "--registry", "cache.example:5000")
    )


async def test_warm_makes_the_cache_where_there_is_none(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    shop = await stocked(serve, upstream, tmp_path, running=False)
    text = shop.config.read_text().replace(str(tmp_path / "disk"), str(tmp_path / "new"))
    shop.config.write_text(text)
    assert "there is no cache" in await shop.fails("ready", "-", input="alpine:3")
    assert len(await shop.lines("warm", "alpine:3")) == 3
    assert (await shop.lines("ls"))[1].split()[:3] == [NAME, "1", "3"]


async def test_several_at_once_with_progress(served: Shop, upstream: Upstream) -> None:
    images = [upstream.image("team/new", str(number), [b"%d" % number * 1000]) for number in range(3)]
    gate = asyncio.Event()
    holds = [Hold(gate, after=500) for _ in images]
    for image, hold in zip(images, holds, strict=True):
        upstream.next("GET", image.layers[0], hold)
    names = [f"team/new:{number}" for number in range(3)]
    warming = asyncio.create_task(served.run("warm", *names, "--jobs", "2"))
    await asyncio.gather(*(hold.reached.wait() for hold in holds[:2]))
    assert not holds[2].reached.is_set()
    gate.set()
    result = await warming
    assert result.exit_code == 0
    assert [row.split()[0] for row in result.stdout.splitlines()[1:4]] == [f"docker.io/{n}" for n in names]


# ready


async def test_ready_tells_what_is_complete_partial_and_absent(
    shop: Shop, upstream: Upstream, file: Callable[[str], str]
) -> None:
    path = file(COMPOSE + "  c:\n    build: .\n")
    await shop.lines("warm", "docker.io/library/alpine@" + shop.image.digest)
    upstream.clear()
    result = await shop.run("ready", path)
    assert (result.exit_code, upstream.log) == (1, [])
    lines = result.stdout.splitlines()
    heads, partial, absent, sums, built, _, missing, *rows = lines
    assert heads.split() == ["REFERENCE", "STATE", "REFERRERS", "MISSING", "NAMED", "IN", "PROBLEM"]
    assert partial.split() == [f"{NAME}:3", "partial", "-", "1", f"{path}:3"]
    assert absent.split() == ["docker.io/team/new:1", "absent", "-", f"{path}:5"]
    assert sums == "0 of 2 images complete"
    assert built == f"{path}:7: built where it runs, so it is not pulled"
    assert missing.split() == ["REFERENCE", "MISSING", "DIGEST", "KIND", "SIZE", "PLATFORMS"]
    assert [row.split() for row in rows] == [
        [f"{NAME}:3", shop.other.digest, "manifest", str(len(shop.other.content)), "B", "linux/arm64"]
    ]
    assert "entrepot: 2 of 2 images are not complete" in result.stderr
    told = msgspec.convert(
        json.loads((await shop.run("ready", path, "--json")).stdout), list[reports.ReadyRow]
    )
    assert [each.state for each in told] == ["partial", "absent"]


async def test_ready_for_a_platform(shop: Shop, file: Callable[[str], str]) -> None:
    path = file("alpine:3\n")
    assert (await shop.lines("ready", path, "--platform", "linux/amd64"))[-1] == "1 of 1 image complete"
    result = await shop.run("ready", path, "--platform", "linux/s390x")
    assert (result.exit_code, "no image for linux/s390x" in result.stdout) == (1, True)


async def test_ready_fetches(shop: Shop, upstream: Upstream, file: Callable[[str], str]) -> None:
    upstream.image("team/new", "1")
    path = file(COMPOSE)
    assert (await shop.lines("ready", path, "--fetch"))[-1] == "2 of 2 images complete"
    upstream.clear()
    assert (await shop.lines("ready", path))[-1] == "2 of 2 images complete"
    assert upstream.log == []


async def test_ready_that_cannot_fetch_says_why(shop: Shop, file: Callable[[str], str]) -> None:
    result = await shop.run("ready", file("alpine:3\nteam/absent:1\n"), "--fetch")
    assert result.exit_code == 1
    _, here, absent, *_ = result.stdout.splitlines()
    assert here.split()[:2] == [f"{NAME}:3", "complete"]
    assert absent.split()[:2] == ["docker.io/team/absent:1", "absent"]
    assert "docker.io answered 404" in absent


async def test_nothing_named_is_no_proof(shop: Shop, file: Callable[[str], str]) -> None:
    path = file("kind: Service\n")
    assert f"no image is named in {path}" in await shop.fails("ready", path)


async def test_many_references_are_asked_for_page_by_page(
    shop: Shop, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PAGE", 2)
    path = file("alpine:a\nalpine:b\nalpine:c\nalpine:d\nalpine:e\n")
    told = json.loads((await shop.run("ready", path, "--json")).stdout)
    assert [each["reference"] for each in told] == ["a", "b", "c", "d", "e"]


# drill


async def test_drill_needs_a_server(shop: Shop) -> None:
    if not shop.running:
        assert "no server is running" in await shop.fails("drill", "10m")
    assert "expected a duration" in await shop.fails("drill", "soon", status=2)


async def test_drill_tells_what_failed_when_its_time_is_up(served: Shop, upstream: Upstream) -> None:
    drilling = asyncio.create_task(served.run("drill", "10m"))
    drill = served.site.app.composition.drill
    await until_it_is_on(served)
    upstream.clear()
    assert (await served.site.get("/v2/library/alpine/manifests/3"))[0] == 200
    assert (await served.site.get(f"/v2/library/alpine/manifests/{served.other.digest}"))[0] == 404
    served.site.clock.advance(600)
    result = await drilling
    assert (result.exit_code, upstream.log, drill.left) == (1, [], 0)
    heads, row = result.stdout.splitlines()
    assert heads.split() == ["MISSING", "KIND", "CLIENT", "REQUESTS", "LAST", "REQUEST"]
    assert row.split()[:4] == [f"{NAME}@{served.other.digest}", "manifest", "127.0.0.1", "1"]
    assert "entrepot: 1 request could not be served" in result.stderr


async def test_drill_without_a_failure(served: Shop) -> None:
    drilling = asyncio.create_task(served.run("drill", "10m", "--namespace", "docker.io", "--json"))
    await until_it_is_on(served)
    served.site.clock.advance(600)
    result = await drilling
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["running"], told["namespaces"], told["missed"]) == (False, ["docker.io"], [])


async def test_drill_of_what_is_not_configured(served: Shop) -> None:
    assert "nowhere.example is not a configured cache" in await served.fails(
        "drill", "10m", "--namespace", "nowhere.example", status=2
    )


@pytest.mark.clients
async def test_drill_ends_early_by_ctrl_c(served: Shop) -> None:
    words = ["drill", "10m", "--server", str(served.site.app.admin_url)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await until_it_is_on(served)
    assert process.stderr is not None
    await process.stderr.readline()  # it looks on
    assert (await served.site.get("/v2/library/alpine/manifests/4"))[0] == 404
    process.send_signal(signal.SIGINT)
    said, _ = await process.communicate()
    assert process.returncode == 1
    assert f"{NAME}:4" in said.decode()
    assert served.site.app.composition.drill.left == 0
    await asyncio.sleep(0)  # its pipes are closed in the next turn of the loop


async def until_it_is_on(shop: Shop) -> None:
    """Wait for the drill to begin."""
    drill = shop.site.app.composition.drill
    begun, begin = asyncio.Event(), drill.begin

    def noted(order: object) -> None:
        begin(order)  # type: ignore[arg-type]
        begun.set()

    drill.begin = noted  # type: ignore[method-assign, assignment]
    if not drill.left:
        await begun.wait()


def test_every_command_has_the_common_options() -> None:
    for command in offline.COMMANDS:
        names = {each.name for each in command.params if isinstance(each, click.Option)}
        assert {"path", "server", "token", "as_json"} <= names
        assert command.help
