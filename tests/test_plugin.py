"""The plugin of pytest: its fixtures, as tests of others use them, and the page about it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tomllib
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from proxy.testing.failures import FailurePlan, UpstreamFailure
from proxy.testing.mirror import LocalMirror, UpstreamStandIn
from proxy.testing.recording import Recording, RecordingInvalid
from proxy.testing.registry import LocalRegistry
from proxy.testing.serving import listen
from storage.errors import RegistryError
from tests import archives
from tests.clients.processes import environment, require
from tests.clients.processes import run as run_client
from tests.examples import imported
from tests.upstream import Upstream

pytest_plugins = "pytester"

Run = Callable[..., pytest.RunResult]

OTHERS = ("-p", "no:xdist", "-p", "no:rerunfailures", "-p", "no:aiohttp", "-p", "no:asyncio")  # plugins

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testing.md"
BLOCKS = {
    re.findall(r"def (test_\w+)", block)[-1]: block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
}
FETCH = """
import urllib.error
import urllib.request


def fetch(registry, path):
    with urllib.request.urlopen(f"{registry.url}/v2/{path}") as answer:
        return answer.read()

"""


@pytest.fixture
def run(pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the tests of a source with the plugin, in this process; returns their result."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    installed = request.config.pluginmanager.has_plugin("entrepot")
    with_plugin = () if installed else ("-p", "proxy.testing.plugin")

    def run(source: str, *words: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess(*OTHERS, *with_plugin, *words)

    return run


def write_layout(path: Path) -> str:
    """An image with the tag 1; returns its digest."""
    made = archives.image(b"a layer")
    archives.write(archives.layout([(made, {"org.opencontainers.image.ref.name": "1"})]), path)
    return made.digest


@pytest.mark.parametrize("name", BLOCKS)
async def test_the_page(run: Run, pytester: pytest.Pytester, upstream: Upstream, name: str) -> None:
    write_layout(pytester.path / "layouts" / "app")
    if "recordings" in BLOCKS[name]:
        upstream.image("library/alpine", "3")

        def record() -> None:
            with LocalMirror(
                pytester.path / "made", upstream.url, pytester.path / "recordings" / "alpine"
            ) as mirror:
                mirror.tags("library/alpine")
                mirror.digest("library/alpine", "3")

        await asyncio.to_thread(record)
        await upstream.stop()
    result = await asyncio.to_thread(run, BLOCKS[name])
    result.assert_outcomes(passed=1)


def test_the_page_has_examples() -> None:
    assert len(BLOCKS) == 6


def test_an_entry_point_leads_to_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"entrepot": "proxy.testing.plugin"}


def test_it_imports_nothing_that_no_fixture_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith(("proxy.testing", "storage"))]:
        monkeypatch.delitem(sys.modules, name)
    source = """
    import sys

    def test_modules():
        assert "proxy.testing.plugin" in sys.modules
        assert not {"proxy.testing.serving", "proxy.testing.mirror", "storage.oci"} & set(sys.modules)
    """
    run(source).assert_outcomes(passed=1)


FAILING = {
    "429 after some requests": """
def test_it(entrepot_registry, entrepot_mirror):
    for tag in "123":
        entrepot_registry.push_image(f"app:{tag}", {"file": tag.encode()})
    entrepot_mirror.fail(429, after=2, retry_after=7)
    fetch(entrepot_mirror, "app/manifests/1")
    fetch(entrepot_mirror, "app/manifests/2")
    try:
        fetch(entrepot_mirror, "app/manifests/3")
    except urllib.error.HTTPError as error:
        error.close()
        assert error.code == 503
    else:
        raise AssertionError("it was answered")
    fetch(entrepot_mirror, "app/manifests/1")
    assert entrepot_mirror.upstream_requests == [f"GET /v2/app/manifests/{tag}" for tag in "123"]
""",
    "cut": """
import json

def test_it(entrepot_registry, entrepot_mirror):
    entrepot_registry.push_image("app:1", {"file": bytes(range(256)) * 4096})
    layer = json.loads(fetch(entrepot_registry, "app/manifests/1"))["layers"][0]["digest"]
    whole = fetch(entrepot_registry, f"app/blobs/{layer}")
    entrepot_mirror.cut(1000, times=1)
    assert fetch(entrepot_mirror, f"app/blobs/{layer}") == whole
    assert entrepot_mirror.upstream_requests == [f"GET /v2/app/blobs/{layer}"] * 2
""",
    "some paths": """
def test_it(entrepot_registry, entrepot_mirror):
    for tag in "12":
        entrepot_registry.push_image(f"app:{tag}", {"file": tag.encode()})
    entrepot_mirror.fail(403, path="manifests/2$")
    fetch(entrepot_mirror, "app/manifests/1")
    try:
        fetch(entrepot_mirror, "app/manifests/2")
    except urllib.error.HTTPError as error:
        error.close()
        assert error.code == 404
    entrepot_mirror.heal()
    assert entrepot_registry.digest("app", "2") == entrepot_mirror.digest("app", "2")
""",
}


@pytest.mark.parametrize("name", FAILING)
def test_failures(run: Run, name: str) -> None:
    run(FETCH + FAILING[name]).assert_outcomes(passed=1)


RECORDED = (
    FETCH
    + """
import json
import os

import pytest


@pytest.mark.entrepot_mirror(os.environ["UPSTREAM"], recording="recorded")
def test_it(entrepot_mirror):
    manifest = json.loads(fetch(entrepot_mirror, "team/app/manifests/1"))
    assert fetch(entrepot_mirror, f"team/app/blobs/{manifest['layers'][0]['digest']}") == b"a layer"
"""
)


@pytest.mark.clients
async def test_a_recording_is_made_once(
    run: Run, pytester: pytest.Pytester, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM", upstream.url)
    upstream.image("team/app", "1")
    (await asyncio.to_thread(run, RECORDED, "--entrepot-record=none")).assert_outcomes(errors=1)
    assert upstream.requests == []
    (await asyncio.to_thread(run, RECORDED)).assert_outcomes(passed=1)
    asked = len(upstream.requests)
    assert asked > 0
    for words in ((), ("--entrepot-record=none",)):
        (await asyncio.to_thread(run, RECORDED, *words)).assert_outcomes(passed=1)
    assert len(upstream.requests) == asked
    (await asyncio.to_thread(run, RECORDED, "--entrepot-record=all")).assert_outcomes(passed=1)
    assert len(upstream.requests) > asked
    lacking = RECORDED.replace('b"a layer"\n', 'b"a layer"\n    entrepot_mirror.upstream_requests.clear()\n')
    lacking += "    try:\n        fetch(entrepot_mirror, 'team/app/manifests/2')\n"
    lacking += "    except urllib.error.HTTPError as error:\n        error.close()\n"
    result = await asyncio.to_thread(run, lacking)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*has no answer to GET /v2/team/app/manifests/2: record it anew*"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read"),
        (b'{"upstream": "x", "answers": [1]}', "cannot be read"),
    ],
)
def test_a_recording_that_is_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "exchanges.json").write_bytes(content)
    with pytest.raises(RecordingInvalid, match=says):
        Recording(tmp_path, "x", "none")


@pytest.mark.parametrize("repair", [False, True])
def test_an_upstream_that_fails_is_not_recorded(tmp_path: Path, repair: bool) -> None:
    """Also if it answers later: the recording would lack what the first answer led to."""
    with LocalRegistry(tmp_path / "upstream") as registry:
        registry.push_image("app:1", {"file": b"content"})
        address = registry.url if repair else "http://127.0.0.1:9"
        with LocalMirror(tmp_path / "mirror", address, tmp_path / "recording") as mirror:
            if repair:
                assert mirror.tags("app") == ["1"]
            else:
                with pytest.raises(RegistryError):
                    mirror.tags("app")
            assert not mirror.replays
    assert (tmp_path / "recording" / "exchanges.json").exists() == repair


def test_failures_are_planned_by_count_and_time() -> None:
    now = 0.0
    plan = FailurePlan(lambda: now)
    plan.add(UpstreamFailure(status=429, after=1, times=2))
    assert [plan.next("/v2/").status for _ in range(4)] == [None, 429, 429, None]
    plan.clear()
    plan.add(UpstreamFailure(status=503, seconds=30, path="/blobs/"))
    plan.add(UpstreamFailure(cut=100))
    plan.add(UpstreamFailure(cut=50, rate=10, path="blobs"))
    struck = plan.next("/v2/a/blobs/b")
    assert (struck.status, struck.cut, struck.rate) == (503, 50, 10)
    assert plan.next("/v2/a/manifests/b") == UpstreamFailure(cut=100)
    now = 30.0
    assert plan.next("/v2/a/blobs/b").status is None
    plan.clear()
    assert plan.next("/v2/a/blobs/b") == UpstreamFailure()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", (200, 0, 10)), ("bytes=2-4", (206, 2, 5)), ("bytes=7-", (206, 7, 10)), ("bytes=-3", (206, 7, 10))],
)
async def test_a_slow_upstream(
    tmp_path: Path, upstream: Upstream, asked: str, expected: tuple[int, int, int]
) -> None:
    """It pauses for each piece as long as that takes, and honours ranges."""
    content, paused = b"0123456789", []

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    image = upstream.image("app", "1", [content])
    plan = FailurePlan()
    plan.add(UpstreamFailure(rate=4))
    async with AsyncExitStack() as closing:
        session = await closing.enter_async_context(aiohttp.ClientSession())
        recording = Recording(tmp_path / "recording", upstream.url)
        stand_in = UpstreamStandIn(recording, session, upstream.url, plan, pause)
        url = await listen(stand_in.handle, closing)
        headers = {"Range": asked} if asked else {}
        async with session.get(f"{url}/v2/app/blobs/{image.layers[0]}", headers=headers) as response:
            status, start, stop = expected
            assert (response.status, await response.read()) == (status, content[start:stop])
    assert sum(paused) == (stop - start) / 4
    assert max(paused) <= 1


def test_a_name_that_does_not_fit(tmp_path: Path) -> None:
    write_layout(tmp_path / "layout")
    with LocalRegistry(tmp_path / "registry") as registry:
        with pytest.raises(RegistryError, match="has only the tag '1'"):
            registry.load(tmp_path / "layout")
        with pytest.raises(ValueError, match="name"):
            registry.push_image("Upper:1", {})
        assert registry.repositories() == []


def test_full_names(tmp_path: Path) -> None:
    """It stands for the built-in registries; an archive may name images of them."""
    made = archives.image(b"a layer")
    named = [
        (made, {"io.containerd.image.name": f"{host}/library/alpine:3"}) for host in ("docker.io", "quay.io")
    ]
    for at, each in enumerate(named):
        archives.write(archives.layout([each]), tmp_path / str(at))
    with LocalRegistry(tmp_path / "registry") as registry:
        for at in range(len(named)):
            assert registry.load(tmp_path / str(at)) == ["library/alpine:3"]
        registry.push_image("ghcr.io/team/app:1", {})
        assert registry.repositories() == ["library/alpine", "team/app"]
        with pytest.raises(ValueError, match=r"unknown\.example"):
            registry.push_image("unknown.example/team/app:1", {})


def test_hosts_of_the_configuration(run: Run) -> None:
    source = """
    def test_it(entrepot_registry):
        for host in ("registry.example", "localhost:5000", "quay.io"):
            entrepot_registry.push_image(f"{host}/team/{host[0]}:1", {})
        assert entrepot_registry.repositories() == ["team/l", "team/q", "team/r"]
    """
    words = ("-o", "entrepot_hosts=registry.example localhost:5000 quay.io")
    run(source, *words).assert_outcomes(passed=1)


@pytest.mark.clients
def test_the_example_of_a_registry(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_layout(tmp_path / "layout")
    ask = (
        "import os, urllib.request as client;"
        "client.urlopen('http://' + os.environ['REGISTRY'] + '/v2/app/tags/list').close()"
    )
    command = [sys.executable, "-c", ask]
    assert imported("in_process_registry").main(str(tmp_path / "layout"), "app", command) == 0
    said = capfd.readouterr().err
    assert re.fullmatch(r"127\.0\.0\.1:\d+/app:1\n1 requests\n", said)


def test_the_example_of_a_copy(tmp_path: Path) -> None:
    copy = imported("copy_between_registries").copy
    with LocalRegistry(tmp_path / "a") as source, LocalRegistry(tmp_path / "b") as destination:
        digest = source.push_image("team/app:1", {"file": b"content"})
        done = asyncio.run(copy(source.url, "team/app", "1", destination.url, "copied/app"))
        assert (done.manifests, done.blobs, done.tags) == (1, 2, 1)
        assert destination.digest("copied/app", "1") == digest
        again = asyncio.run(copy(source.url, "team/app", digest, destination.url, "copied/app"))
        assert (again.manifests, again.blobs, again.tags) == (0, 0, 0)


@pytest.mark.clients
def test_skopeo(tmp_path: Path) -> None:
    """It pushes to the registry, and pulls through a mirror whose upstream breaks off, then is recorded."""
    require("skopeo", root=False)
    write_layout(tmp_path / "layout")
    words = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    here = environment(tmp_path)
    recording = tmp_path / "recording"
    with LocalRegistry(tmp_path / "registry") as registry:
        run_client([*words, f"oci:{tmp_path}/layout:1", f"docker://{registry.address}/app:1"], here)
        assert registry.tags("app") == ["1"]
        assert any(each.agent.startswith("skopeo") for each in registry.requests)
        url = registry.url
        with LocalMirror(tmp_path / "mirror", url, recording) as mirror:
            mirror.cut(1, times=1)
            run_client([*words, f"docker://{mirror.address}/app:1", f"dir:{tmp_path}/first"], here)
            assert "miss" in {each.result for each in mirror.requests}
    with LocalMirror(tmp_path / "replay", url, recording) as mirror:
        assert mirror.replays
        run_client([*words, f"docker://{mirror.address}/app:1", f"dir:{tmp_path}/second"], here)
        assert mirror.lacking == []
    first, second = (sorted((tmp_path / each).iterdir()) for each in ("first", "second"))
    assert [each.read_bytes() for each in first] == [each.read_bytes() for each in second]
    assert json.loads((tmp_path / "second" / "manifest.json").read_bytes())["layers"]
