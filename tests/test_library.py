"""The public API, and docs/library.md: its programs and those of examples/ run as they stand there."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import tarfile
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import yaml

import proxy
import storage
from proxy import Connect, Credentials, Metrics, UpstreamRegistry, UpstreamSettings
from storage.exports import PublicNames
from tests.documentation import ROOT
from tests.examples import imported
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.upstream import Upstream

PAGE = ROOT / "docs" / "library.md"


def code(section: str) -> str:
    """The program of a section."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


def program(section: str) -> dict[str, Any]:
    """What the program of a section defines."""
    found: dict[str, Any] = {"__name__": "program"}
    exec(compile(code(section), str(PAGE), "exec"), found)
    return found


@pytest.mark.parametrize(
    ("section", "name"), [("A cache", "cache_by_hand"), ("A store in a bucket", "store_in_a_bucket")]
)
def test_the_page_shows_the_examples(section: str, name: str) -> None:
    assert code(section) == (ROOT / "examples" / f"{name}.py").read_text()


@pytest.mark.parametrize("package", [storage, proxy], ids=["storage", "proxy"])
class TestPublic:
    def test_it_is_what_checkers_read(self, package: ModuleType) -> None:
        """The names for type checkers, those for programs and __all__ are the same, of the same modules."""
        lines = ast.walk(ast.parse(Path(str(package.__file__)).read_text()))
        checked = {
            alias.name: str(line.module)
            for line in lines
            if isinstance(line, ast.ImportFrom) and line.module not in ("typing", "storage.exports")
            for alias in line.names
        }
        assert sorted(checked) == sorted(package.__all__)
        for name, module in checked.items():
            assert getattr(package, name) is getattr(importlib.import_module(module), name)

    def test_each_name_is_described(self, package: ModuleType) -> None:
        page = (ROOT / "docs" / "library.md").read_text()
        rest = {each for each in package.__all__ if f"`{each}`" not in page}
        assert all(issubclass(getattr(package, each), storage.RegistryError) for each in rest), rest
        assert [each for each in package.__all__ if not inspect.getdoc(getattr(package, each))] == []

    def test_help_and_completion_list_them(self, package: ModuleType) -> None:
        assert {*package.__all__, "__doc__"} <= set(dir(package))

    def test_no_other_name_is_there(self, package: ModuleType) -> None:
        with pytest.raises(AttributeError, match=rf"^module '{package.__name__}' has no attribute 'Absent'$"):
            _ = package.Absent
        with pytest.raises(ImportError, match="cannot import name 'Absent'"):
            exec(f"from {package.__name__} import Absent")


def test_names_whose_library_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"shelf": "", "near": "class Near: ...", "far": "import ferry"}.items():
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "broken.py").write_text("import anchor")
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    modules = {"near": "Near", "far": "Far Farther", "broken": "Broken"}
    names = PublicNames("shelf", modules, {"far": ("ferry", "sea")})
    importlib.import_module("shelf")
    assert names.installed() == ["Broken", "Near"]
    assert "Near" in names.listed() and "Far" not in names.listed() and "__name__" in names.listed()
    assert names.get("Near").__class__ is type
    with pytest.raises(ImportError, match=r"^shelf\.Far needs ferry: install entrepot\[sea\]$"):
        names.get("Far")
    with pytest.raises(ModuleNotFoundError, match="anchor"):  # of no extra: the installation is broken
        names.get("Broken")
    (tmp_path / "ferry.py").write_text("")
    importlib.invalidate_caches()
    assert names.installed() == ["Broken", "Far", "Farther", "Near"]


@pytest.mark.clients
@pytest.mark.parametrize("library", ["obstore", "psycopg"])
def test_the_public_names_without_the_library_of_an_extra(library: str) -> None:
    names = storage._names
    found = {module for module, (each, _) in names._needs.items() if each == library}
    program = (
        f"import sys; sys.modules[{library!r}] = None; import storage\n"
        "from storage import *\n"
        "print(*sorted({*storage._names._defined} - {*storage.__all__}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    absent = sorted(name for name, module in names._defined.items() if module in found)
    assert done.stdout.decode().split() == absent


@pytest.mark.clients
def test_what_is_not_used_is_not_imported() -> None:
    program = (
        "import sys, proxy, storage; from storage import Digest;"
        "print(*sorted(each for each in sys.modules if each.partition('.')[0] in ('proxy', 'storage')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().split() == [
        "proxy",
        "storage",
        "storage.errors",
        "storage.exports",
        "storage.oci",
    ]


async def test_a_cache(upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("library/alpine", "3", [b"layer"])
    serve = program("A cache")["serve"]
    settings = UpstreamSettings(upstream.url, Connect(plain_http=True))
    metrics = Metrics()
    origin = UpstreamRegistry("hub", settings, [Credentials()], metrics)
    async with AsyncExitStack() as closing, aiohttp.ClientSession() as session:
        runner = await serve(origin, metrics, tmp_path / "cache", 0, closing)
        host, port = runner.addresses[0]
        for _ in range(2):
            for path in ("manifests/3", f"blobs/{image.layers[0]}"):
                async with session.get(f"http://{host}:{port}/v2/alpine/{path}") as response:
                    assert response.status == 200, await response.text()
                    content = await response.read()
        assert content == b"layer"
    assert sum(each.path.endswith(f"/blobs/{image.layers[0]}") for each in upstream.requests) == 1


async def test_a_store_in_a_bucket(tmp_path: Path) -> None:
    found = program("A store in a bucket")
    async with FakeBucket() as fake:
        store = found["open_store"](fake.settings(), tmp_path / "store")
        pushed = await found["push"](store, "a/b", b"content")
        blob = await store.get_blob("a/b", pushed.digest)
        assert b"".join([chunk async for chunk in blob.chunks()]) == b"content"
        await store.close()
    assert list(fake.objects.values()) == [b"content"]


async def test_the_example_of_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    example = imported("store_in_a_bucket")
    async with FakeBucket() as fake:
        monkeypatch.setattr(example, "BucketSettings", lambda url: fake.settings())
        await example.main("s3://it/its", str(tmp_path / "store"), "a/b", str(tmp_path / "file"))
    assert capsys.readouterr().out == f"{storage.Digest.of(b'content')} {tmp_path}/file\n"
    assert list(fake.objects.values()) == [b"content"]


async def test_the_example_of_an_upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = imported("custom_upstream")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "greeting").write_bytes(b"hello")
    async with AsyncExitStack() as closing, aiohttp.ClientSession() as session:
        origin = example.FileImages(tmp_path / "files")
        runner = await example.serve(origin, proxy.Metrics(), tmp_path / "cache", 0, closing)
        url = "http://{}:{}/v2/hub".format(*runner.addresses[0])

        async def get(path: str) -> tuple[int, bytes]:
            async with session.get(f"{url}/{path}") as response:
                return response.status, await response.read()

        status, content = await get("greeting/manifests/latest")
        assert status == 200
        [layer] = json.loads(content)["layers"]
        status, archive = await get(f"greeting/blobs/{layer['digest']}")
        assert status == 200
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            assert opened.extractfile("greeting").read() == b"hello"  # type: ignore[union-attr]
        for path in ("absent/manifests/latest", "greeting/manifests/2", f"greeting/blobs/sha256:{'0' * 64}"):
            assert (await get(path))[0] == 404
        (tmp_path / "files" / "greeting").unlink()  # what was pulled is stored
        assert await get(f"greeting/blobs/{layer['digest']}") == (200, archive)


async def test_the_parts_of_a_configuration(upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("library/alpine", "3", [b"layer"])
    config = tmp_path / "entrepot.yml"
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": upstream.url}},
    }
    config.write_text(yaml.safe_dump(tree))
    digest_of = program("The parts of a configuration")["digest_of"]
    assert await digest_of(config, "docker.io/library/alpine", "3") == image.digest


@pytest.mark.clients
async def test_a_store_in_a_bucket_and_a_database(tmp_path: Path, postgres_server: PostgresServer) -> None:
    found, database = program("A store in a bucket and a database"), postgres_server.database()
    async with FakeBucket() as bucket:
        one, other = (found["shared_store"](bucket.settings(), database, tmp_path / name) for name in "ab")
        digest = await found["push"](one, "local/a", b"content")
        blob = await other.get_blob("local/a", digest)
        assert b"".join([each async for each in blob.chunks()]) == b"content"
        await blob.close()
        for each in (one, other):
            await each.close()
