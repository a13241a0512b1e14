"""The image of deploy/image: built without a registry, kept by Entrepôt, and running."""

from __future__ import annotations

import json
import re
import shutil
import stat
import tarfile
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from proxy.cli.main import main
from tests.clients.containers import Podman
from tests.clients.image import DIRECTORY, EPOCH, Layout, build_trees, running_podman
from tests.clients.processes import Process, environment, free_port, require, run
from tests.clients.site import SERVER
from tests.documentation import site
from tests.test_docs import ROOT

__all__ = ["site"]  # a fixture
TREES = ("data", "system", "libraries", "application")  # in the order of their layers
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SBOM = "application/vnd.cyclonedx+json"
USER = 65532
NAME = "local/entrepot"

pytestmark = pytest.mark.timeout(900)  # the image is built once, which takes half a minute of an idle core

# In the container: leaves a process behind, ends that, and returns once process 1 has waited for it.
ORPHAN = """
import os, time
pids, pid = os.pipe()
life, end = os.pipe()
parent = os.fork()
if not parent:
    orphan = os.fork()
    if not orphan:
        os.close(end)
        os.read(life, 1)
        os._exit(0)
    os.write(pid, str(orphan).encode())
    os._exit(0)
os.waitpid(parent, 0)
orphan = os.read(pids, 20).decode()
with open(f"/proc/{orphan}/stat") as status:
    assert status.read().rpartition(")")[2].split()[1] == "1", "process 1 is not its parent"
os.close(end)
deadline = time.monotonic() + 60
while os.path.exists(f"/proc/{orphan}"):  # nothing tells when a process of others is waited for
    assert time.monotonic() < deadline
    time.sleep(0.01)
print("ended")
"""
LIBRARIES = "import cbor2, cel, obstore, opentelemetry.sdk.trace, psycopg, sigstore, ssl, sqlite3"


def test_what_it_says_of_itself(layout: Layout) -> None:
    config = layout.config["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["ExposedPorts"].keys() == {"5000/tcp", "5001/tcp"}
    assert config["Volumes"].keys() == {"/var/lib/entrepot"}
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "/usr/bin/entrepot"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/usr/bin/entrepot", "health"]
    named = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (named["version"], named["revision"], named["licenses"]) == (VERSION, "0123abc", "Apache-2.0")
    assert layout.config["created"] == "2025-10-09T08:53:20Z"
    assert layout.manifest["annotations"].items() >= config["Labels"].items()
    assert layout.top["annotations"] == {"org.opencontainers.image.ref.name": VERSION}
    assert sum(each["size"] for each in layout.manifest["layers"]) < 75_000_000


def test_it_has_the_same_bytes_each_time(layout: Layout, site: Path, tmp_path: Path) -> None:
    """All of it is compared with the files of a second build, under another umask.

    The documentation in that one was built by this Python.
    """
    build_trees(tmp_path / "trees", 0o007, "--site", site)
    for tree, layer in zip(TREES, layout.manifest["layers"], strict=True):
        owner = (USER, 0) if tree == "data" else (0, 0)
        with tarfile.open(layout.path(layer)) as archive:
            found = dict(_members(archive, owner))
        assert found == dict(_files(tmp_path / "trees" / tree))
    for each in layout.config["history"]:
        assert each["created"] == layout.config["created"]
        assert "comment" not in each  # buildah's differ each time


def _members(
    archive: tarfile.TarFile, owner: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, str | bytes]]]:
    for member in archive:
        assert (member.mtime, member.uid, member.gid) == (EPOCH, *owner), member.name
        content = archive.extractfile(member) if member.isreg() else None
        yield member.name, (member.mode & 0o7777, content.read() if content else member.linkname)


def _files(root: Path) -> Iterator[tuple[str, tuple[int, str | bytes]]]:
    for path in root.rglob("*"):
        assert path.lstat().st_mtime == EPOCH, path
        link = str(path.readlink()) if path.is_symlink() else ""
        content = path.read_bytes() if path.is_file() and not link else link
        yield path.relative_to(root).as_posix(), (stat.S_IMODE(path.lstat().st_mode), content)


def test_its_files(layout: Layout) -> None:
    """Neither shell nor package manager, nothing that makes anybody root, and licences of everything."""
    names: dict[str, tarfile.TarInfo] = {}
    for layer in layout.manifest["layers"]:
        with tarfile.open(layout.path(layer)) as archive:
            names |= {member.name: member for member in archive}
    programs = {name for name in names if PurePath(name).parent.name in ("bin", "sbin")}
    assert programs == {"usr/bin/entrepot", "usr/bin/python3.11", "usr/bin/tini"}
    assert [name for name, member in names.items() if member.mode & 0o6000] == []
    writable = {name for name, member in names.items() if member.mode & 0o022 and not member.issym()}
    assert writable == {"tmp", "var/lib/entrepot"}
    packages = {name.partition("status.d/")[2] for name in names if "status.d/" in name}
    assert packages == {
        name.split("/")[3]
        for name in names
        if re.fullmatch("usr/share/doc/[^/]+/copyright", name)
        or (name.startswith("usr/share/doc/") and names[name].issym())
    }


def test_its_bill_of_materials(layout: Layout) -> None:
    """It refers to the image, and has exactly what the two lists have, and Entrepôt."""
    attached = layout.read(layout.index["manifests"][1])
    assert attached["artifactType"] == SBOM
    assert attached["subject"]["digest"] == layout.top["digest"]
    bom = layout.read(attached["layers"][0])
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["purl"] == f"pkg:pypi/entrepot@{VERSION}"
    found = {re.match(r"pkg:(?:pypi|deb/debian)/([^@]+)@", each["purl"])[1] for each in bom["components"]}  # type: ignore[index]
    assert found == {*locked(), *debian()}


def locked() -> dict[str, str]:
    """The libraries of requirements.txt, and their versions."""
    text = (DIRECTORY / "requirements.txt").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)}


def debian() -> set[str]:
    return {each for each in (DIRECTORY / "debian.txt").read_text().split("\n") if each and each[0] != "#"}


def test_libraries_are_those_that_it_needs() -> None:
    """What pyproject.toml asks for, with the extras of the image, is locked at a version that will do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][each] for each in ("fleet", "policy", "tracing"))
    versions = locked()
    for each in map(Requirement, chain(project["dependencies"], *extras)):
        assert each.specifier.contains(versions[canonicalize_name(each.name)]), each


@dataclass(frozen=True)
class Running:
    """The image in a container named `server`, at `url`, that caches the registry which has it."""

    podman: Podman
    url: str
    admin_url: str
    log: Process


@pytest.fixture(scope="module")
def registry(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a private registry that has the image, imported with its bill of materials."""
    directory = tmp_path_factory.mktemp("registry")
    port, admin = free_port(), free_port()
    config = directory / "entrepot.yml"
    config.write_text(
        f"listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:{admin}\nworkers: 1\n"
        f"disk: {{path: {directory / 'disk'}}}\nnamespaces: {{local: {{store: {{}}}}}}\n"
    )
    server = Process([*SERVER, config], ready="listening on")
    try:
        words = ["import", "--config", str(config), "--as", NAME, str(layout.directory)]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        yield f"127.0.0.1:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def running(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As strictly as it can be run: nothing but its volume can be written, and it may do nothing special."""
    require("skopeo")
    home = Path(tempfile.mkdtemp(prefix="entrepot-"))
    podman = running_podman(home)
    try:
        port, admin = free_port(), free_port()
        config = home / "config.yml"
        config.write_text(
            f"listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:{admin}\n"
            f"namespaces: {{up: {{upstream: 'http://{registry}'}}, mine: {{store: {{}}}}}}\n"
        )
        config.chmod(0o644)
        podman.run("pull", "--quiet", "--tls-verify=false", f"{registry}/{NAME}:{VERSION}")
        strictly = (
            "--read-only",
            "--read-only-tmpfs=false",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
        )
        mounted = f"--volume={config}:/etc/entrepot/config.yml:ro"
        podman.start("server", f"{registry}/{NAME}:{VERSION}", *strictly, mounted, "--env=ENTREPOT_WORKERS=1")
        follow = Process(
            podman.command("logs", "--follow", "server"), podman.environment, ready="listening on"
        )
        yield Running(podman, f"127.0.0.1:{port}", f"http://127.0.0.1:{admin}", follow)
        follow.stop()
    finally:
        podman.clear()
        shutil.rmtree(home)


def test_entrepot_keeps_it_whole(layout: Layout, registry: str) -> None:
    """A client gets the manifest that was built, and its bill of materials by the referrers API."""
    with urllib.request.urlopen(f"http://{registry}/v2/{NAME}/referrers/{layout.top['digest']}") as answer:
        found = json.load(answer)["manifests"]
    assert [each["artifactType"] for each in found] == [SBOM]
    assert found[0]["digest"] == layout.index["manifests"][1]["digest"]


def test_skopeo_copies_it_as_the_page_says(registry: str, layout: Layout, home: Path) -> None:
    """By its name in the layout, where its bill of materials is beside it."""
    require("skopeo", root=False)
    page = (ROOT / "docs/install/container.md").read_text()
    [(copy, source)] = re.findall(r"(?m)^(skopeo copy --all) oci:layout(\S*) docker://", page)
    words = [*copy.split(), "--quiet", "--dest-tls-verify=false"]
    run([*words, f"oci:{layout.directory}{source}", f"docker://{registry}/local/copied:1"], environment(home))
    with urllib.request.urlopen(f"http://{registry}/v2/local/copied/manifests/1") as answer:
        assert answer.headers["Docker-Content-Digest"] == layout.top["digest"]


def test_it_serves(running: Running, layout: Layout, home: Path) -> None:
    """Pulled from Entrepôt, it caches Entrepôt, and keeps what is pushed to it."""
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
    source = f"docker://{running.url}/up/{NAME}:{VERSION}"
    run([*copy, source, f"oci:{home / 'pulled'}:1"], environment(home))
    pulled = Layout(home / "pulled")
    assert pulled.top["digest"] == layout.top["digest"]
    run([*copy, source, f"docker://{running.url}/mine/entrepot:1"], environment(home))
    listed = running.podman.run("exec", "server", "entrepot", "ls", "--json")
    assert {each["repository"] for each in json.loads(listed)["repositories"]} == {
        f"up/{NAME}",
        "mine/entrepot",
    }


def test_it_has_the_documentation(running: Running) -> None:
    for page in ("", "reference/python-api.html"):
        with urllib.request.urlopen(f"{running.admin_url}/docs/{page}") as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


def test_its_health_check(running: Running) -> None:
    assert running.podman.run("exec", "server", "entrepot", "health") == "ready\n"
    wrong = ("--server", "http://127.0.0.1:1")
    assert "no server at" in running.podman.fails("exec", "server", "entrepot", "health", *wrong)


def test_it_has_every_library_and_no_shell(running: Running) -> None:
    running.podman.run("exec", "server", "python3.11", "-c", LIBRARIES)
    for program in ("sh", "/bin/sh", "apt-get", "ls"):
        assert (
            "not found" in (said := running.podman.fails("exec", "server", program)) or "no such file" in said
        )


def test_what_others_leave_behind_is_ended(running: Running) -> None:
    """Process 1 waits for processes whose parent has ended."""
    assert running.podman.run("exec", "server", "python3.11", "-c", ORPHAN) == "ended\n"


def test_it_stops_when_it_is_asked_to(running: Running) -> None:
    """The last test of the container: it gets a signal, ends in order, and says so."""
    running.podman.run("stop", "--time=60", "server")
    assert running.podman.run("inspect", "server", "--format={{.State.ExitCode}}") == "0\n"
    running.log.wait_for("server.stopping")
