"""What is built to be installed: it has what it should, and works with the libraries that it names alone."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path, PurePath
from urllib.parse import urljoin
from zipfile import ZipFile

import aiohttp
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.once import built_once
from tests.processes import Server
from tests.test_docs import ROOT, SOURCES
from tests.test_layers import statements

pytestmark = pytest.mark.clients

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a clone has besides the repository, in its root and anywhere.
WORK = (".git", ".venv", ".hypothesis", ".*_cache", "build", "dist")
SITE = PurePath("proxy/ui/site")  # the documentation, where it was built
MADE = ("__pycache__", "*.pyc", "*.egg-info", "node_modules")
IMPORTER = """
from typing import assert_type

from proxy.config.image_names import ImageName, parse
from storage.oci import Digest, Tag

assert_type(parse("alpine:3"), ImageName)
assert_type(Digest.of(b""), Digest)
wrong: int = Digest.of(b"")  # type: ignore[assignment]
tag: Tag = Digest.of(b"")  # type: ignore[assignment]
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a program that has to succeed."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@cache
def repository() -> frozenset[PurePath]:
    """The files of the repository, as far as a clone shows them."""
    found = set()
    for directory, below, files in os.walk(ROOT):
        place = PurePath(directory).relative_to(ROOT)
        left_out = MADE if place.parts else (*MADE, *WORK)
        below[:] = [each for each in below if not any(map(PurePath(each).match, left_out))]
        found |= {place / each for each in files if not any(map(PurePath(each).match, left_out))}
    return frozenset(each for each in found if not each.is_relative_to(SITE))


# What tests/test_site.py builds takes longer than a part of it, which is carried in the same way.
BUILT = {SITE / "index.html", SITE / "files" / "deploy" / "entrepot.service", SITE / "search" / "index.json"}
PAGE = "<!doctype html><title>Built before</title>"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with sdist and wheel; the wheel is built from the sdist."""
    source = tmp_path_factory.mktemp("source")
    for name in repository():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for page in BUILT:
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text(PAGE)
    words = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    return built_once(tmp_path_factory, "built", lambda place: run(*words, place, ".", cwd=source))


def needed() -> Iterator[metadata.Distribution]:
    """The distributions that this one needs, without extras, and those that these need."""
    waiting = [(Requirement(each), "") for each in PROJECT["dependencies"]]
    known = set()
    while waiting:
        requirement, extra = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in known or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        known.add(key)
        found = metadata.distribution(requirement.name)
        waiting += [(Requirement(each), name) for each in found.requires or () for name in ("", *key[1])]
        yield found


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment: it has the wheel, and links to what that needs and is here."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin/python"
    [wheel] = built.glob("*.whl")
    quietly = ("--quiet", "--no-index", "--no-deps", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quietly, wheel, cwd=place)
    [packages] = place.glob("lib/python*/site-packages")
    for distribution in needed():
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / part).exists():
                (packages / part).symlink_to(Path(str(distribution.locate_file(part))))
    return place / "bin"


def test_the_wheel_has_the_packages_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    about = f"{PROJECT['name']}-{PROJECT['version']}.dist-info/"
    wanted = {str(each) for each in repository() | BUILT if each.parts[0] in ("proxy", "storage")}
    assert {each for each in names if not each.startswith(about)} == wanted
    assert {each.removeprefix(about) for each in names if each.startswith(about)} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_the_sdist_is_the_repository(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {PurePath(*PurePath(each.name).parts[1:]) for each in archive if each.isfile()}
    made = {each for each in names if each.parts[0] in ("PKG-INFO", "setup.cfg", "entrepot.egg-info")}
    assert names - made == repository() | BUILT


def test_libraries_that_are_imported_are_named_and_the_reverse() -> None:
    """Also those that are imported late, or only with an extra."""
    extras = (
        libraries
        for extra, libraries in PROJECT["optional-dependencies"].items()
        if extra not in ("docs", "test")
    )
    requirements = map(Requirement, chain(PROJECT["dependencies"], *extras))
    named = {canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate()}
    imported = set()
    for node in chain.from_iterable(statements(path.read_text()) for path in SOURCES):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    offered = metadata.packages_distributions()
    # Since Python 3.14, compression is a package of it, and backports is not installed.
    ours_and_pythons = {"proxy", "storage", "compression"} | (
        {"backports"} if sys.version_info >= (3, 14) else set()
    )
    libraries = imported - sys.stdlib_module_names - ours_and_pythons
    found = {each: set(map(canonicalize_name, offered.get(each, ()))) for each in libraries}
    assert {each for each, distributions in found.items() if not distributions & named} == set()
    assert named - set().union(*found.values()) == set()


def test_the_program_says_its_version(installed: Path, tmp_path: Path) -> None:
    assert (
        run(installed / "entrepot", "--version", cwd=tmp_path) == f"entrepot, version {PROJECT['version']}\n"
    )
    schema = run(installed / "entrepot", "config", "schema", cwd=tmp_path)
    assert schema == (ROOT / "proxy/config/config.schema.json").read_text()


async def get(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(url) as response:
        assert response.status == 200, url
        return await response.text()


async def test_it_serves(installed: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "entrepot.yml"
    tree = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "workers": 1,
        "disk": {"path": str(tmp_path / "disk")},
    }
    configuration.write_text(yaml.safe_dump(tree))
    process = await asyncio.create_subprocess_exec(
        *(installed / "entrepot", "serve", "--config", configuration),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    server = Server(process, tmp_path / "disk")
    try:
        await server.serving()
        async with aiohttp.ClientSession() as client:
            assert await get(client, f"{server.url}/v2/")
            assert "openapi" in await get(client, f"{server.admin_url}/api/v1/openapi.json")
            page = await get(client, f"{server.admin_url}/ui/")
            parts = re.findall(r'(?:href|src)="([^"]*\?v=[^"]*)"', page)
            assert len(parts) > 2
            for each in parts:
                assert await get(client, urljoin(f"{server.admin_url}/ui/", each))
            assert await get(client, f"{server.admin_url}/docs/") == PAGE
            assert await get(client, f"{server.admin_url}/docs/search/index.json") == PAGE
        await server.stop()
    finally:
        await server.clear()
    assert not server.noise


def test_importers_see_its_types(installed: Path, tmp_path: Path) -> None:
    """A wrong type is an error: mypy would complain of an ignore that nothing needs."""
    (tmp_path / "importer.py").write_text(IMPORTER)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache")
    run(*mypy, "--python-executable", installed / "python", "importer.py", cwd=tmp_path)
