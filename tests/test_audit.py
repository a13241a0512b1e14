"""The audit log: who did what, when, and with which result; and never a secret."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.admin.audit_control import audit_rows
from proxy.config.audit import AuditConfig
from proxy.config.errors import ConfigError, StartError
from proxy.telemetry import audit_reader
from proxy.telemetry.audit import AuditLog
from proxy.telemetry.audit_file import AuditFile
from proxy.telemetry.exchange import Exchange
from storage.errors import StorageFailed, Unsupported
from storage.oci import OCI_MANIFEST
from tests.conftest import Clock, Serve, Site, configuration
from tests.processes import Place, place
from tests.test_access import login
from tests.test_hits import hits
from tests.test_htpasswd import line
from tests.test_policed import LATEST
from tests.upstream import Upstream, digest_of

__all__ = ["hits", "place"]  # fixtures

EVERY = ["pull", "push", "delete", "login", "admin", "policy", "override"]
AGENT = "docker/27.3 go/go1.21"
CONFIG = b'{"a": "configuration"}'
TOKEN = "the-token-of-the-admin"
Log = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def log(path: Path) -> Log:
    """The records since the last call."""
    seen = 0

    def read() -> list[dict[str, Any]]:
        nonlocal seen
        lines = path.read_text().splitlines()
        new, seen = lines[seen:], len(lines)
        return [json.loads(each) for each in new]

    return read


def audit(path: Path, *kinds: str, **keys: Any) -> dict[str, Any]:
    return {"audit": {"file": str(path), "kinds": list(kinds or EVERY), **keys}}


def access(directory: Path) -> dict[str, Any]:
    users = directory / "users"
    users.write_text(line("alice", "wonderland"))
    everything = {"who": ["user:alice"], "may": ["pull", "push", "delete"]}
    return {"access": {"htpasswd": str(users), "rules": [everything]}}


async def send(site: Site, method: str, path: str, user: Mapping[str, str] = {}, **options: Any) -> int:
    headers = {"User-Agent": AGENT, **user, **options.pop("headers", {})}
    async with site.request(method, path, headers=headers, **options) as response:
        await response.read()
        return int(response.status)


async def operate(site: Site, method: str, path: str, token: str = TOKEN, **body: Any) -> int:
    assert site.app.admin_url is not None
    headers = {"Authorization": f"Bearer {token}", "User-Agent": "entrepot"}
    url = site.app.admin_url / "api/v1" / path
    async with site.session.request(method, url, json=body, headers=headers) as response:
        return response.status


def members(record: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(record.get(name, "") for name in names)


async def test_a_push_a_pull_and_a_deletion(serve: Serve, upstream: Upstream, path: Path, log: Log) -> None:
    site = await serve(upstream, top={**audit(path), **access(path.parent)}, more={"local": {"store": {}}})
    alice, app = login("alice", "wonderland"), "/v2/local/team/app"
    config = digest_of(CONFIG)
    async with site.request("POST", f"{app}/blobs/uploads/", headers=alice) as response:
        assert response.status == 202  # a step
    assert await send(site, "DELETE", response.headers["Location"].removeprefix(site.url), alice) == 204
    assert await send(site, "POST", f"{app}/blobs/uploads/?digest={config}", alice, data=CONFIG) == 201
    descriptor = {"mediaType": "application/json", "digest": config, "size": len(CONFIG)}
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor, "layers": []}
    ).encode()
    typed = {"Content-Type": OCI_MANIFEST}
    assert await send(site, "PUT", f"{app}/manifests/1.0", alice, data=manifest, headers=typed) == 201
    assert await send(site, "GET", f"{app}/manifests/1.0", alice) == 200
    assert await send(site, "GET", f"{app}/tags/list", alice) == 200
    assert await send(site, "PUT", f"{app}/manifests/2.0", alice, data=b"{", headers=typed) == 400
    assert await send(site, "DELETE", f"{app}/manifests/1.0", alice) == 202
    assert await send(site, "GET", "/v2/", alice) == 200  # a ping
    names = ("kind", "result", "status", "method", "object", "reference")
    records = log()
    assert [members(each, *names) for each in records] == [
        ("push", "done", 201, "POST", "blob", ""),
        ("push", "done", 201, "PUT", "manifest", "1.0"),
        ("pull", "done", 200, "GET", "manifest", "1.0"),
        ("pull", "done", 200, "GET", "tags", ""),
        ("push", "failed", 400, "PUT", "manifest", "2.0"),
        ("delete", "done", 202, "DELETE", "manifest", "1.0"),
    ]
    assert {members(each, "user", "address", "agent", "repository") for each in records} == {
        ("alice", "127.0.0.1", AGENT, "local/team/app")
    }
    assert records[1]["digest"] == records[2]["digest"] == digest_of(manifest)
    assert records[0]["time"] == "2023-11-14T22:13:20Z"
    assert records[4]["code"] == "MANIFEST_INVALID"
    assert len({each["id"] for each in records}) == len(records)


async def test_credentials_that_are_refused_are_not_in_it(
    serve: Serve, upstream: Upstream, path: Path, log: Log
) -> None:
    top = {**audit(path), **access(path.parent), "admin_token": TOKEN}
    site = await serve(upstream, top=top, more={"local": {"store": {}}})
    wrong, tags = login("oops-my-password", "also-a-secret"), "/v2/local/team/app/tags/list"
    assert await send(site, "GET", tags) == 401  # nobody's credentials: a pull that is refused
    assert await send(site, "GET", f"{tags}?n=hidden-in-a-query", wrong) == 401
    assert await send(site, "GET", "/v2/", wrong) == 401
    assert await send(site, "GET", tags, {"Authorization": "Bearer a-secret-token"}) == 401
    assert await send(site, "GET", tags, {"Authorization": "a-secret-without-a-scheme"}) == 401
    assert await operate(site, "POST", "purge", "a-wrong-token", pattern="*") == 401
    assert await operate(site, "GET", "pins", "a-wrong-token") == 401
    names = ("kind", "result", "status", "object", "operation")
    records = log()
    assert [members(each, *names) for each in records] == [
        ("pull", "refused", 401, "tags", ""),
        ("login", "refused", 401, "tags", ""),
        ("login", "refused", 401, "base", ""),
        ("login", "refused", 401, "tags", ""),
        ("login", "refused", 401, "tags", ""),
        ("login", "refused", 401, "", "/api/v1/purge"),
        ("login", "refused", 401, "", "/api/v1/pins"),
    ]
    assert records[1]["reason"].startswith("the user name or the password is wrong")
    assert records[4]["reason"].startswith("such credentials are not accepted")
    text = path.read_text()
    for secret in ("oops", "secret", "hidden", "token", wrong["Authorization"].split()[1]):
        assert secret not in text


async def test_acts_of_an_administrator(serve: Serve, upstream: Upstream, path: Path, log: Log) -> None:
    upstream.image("library/alpine", "latest")
    site = await serve(upstream, top={**audit(path), "admin_token": TOKEN})
    assert await operate(site, "POST", "pins", pattern="docker.io/library/*:latest") == 200
    assert await operate(site, "GET", "pins") == 200  # only reads
    assert await operate(site, "DELETE", "pins", pattern="https://joe:p@ss@registry.example/app") == 400
    assert await operate(site, "POST", "purge", patern="*") == 400
    first, second, third = log()
    assert members(first, "kind", "result", "status", "operation", "address", "agent", "method") == (
        *("admin", "done", 200, "pin", "127.0.0.1", "entrepot", "POST"),
    )
    assert first["arguments"]["pattern"] == "docker.io/library/*:latest"
    assert members(second, "operation", "result", "status") == ("unpin", "failed", 400)
    assert second["arguments"] == {"pattern": "https://***@registry.example/app"}
    assert members(third, "operation", "status", "arguments") == ("/api/v1/purge", 400, "")
    assert TOKEN not in path.read_text()


async def test_verdicts_of_the_policy_and_exceptions(
    serve: Serve, upstream: Upstream, path: Path, log: Log
) -> None:
    upstream.image("a/b", "latest")
    upstream.image("a/b", "edge")
    watched = {"name": "watched", "action": "deny", "tags": ["edge"], "reason": "edges", "mode": "audit"}
    top = {**audit(path), "policy": {"rules": [LATEST, watched]}, "admin_token": TOKEN}
    site = await serve(upstream, top=top)
    latest = "/v2/a/b/manifests/latest"
    assert await send(site, "GET", latest) == 403
    assert await send(site, "GET", "/v2/a/b/manifests/edge") == 200
    body = {"reference": "a/b:latest", "seconds": 3600, "reason": "hotfix https://joe:pw@ci.example/1"}
    assert await operate(site, "POST", "overrides", **body) == 200
    assert await send(site, "GET", latest) == 200
    assert await operate(site, "DELETE", "overrides", reference="a/b:latest") == 200
    records = log()
    names = ("kind", "result", "status", "rule", "mode", "operation")
    assert [members(each, *names) for each in records] == [
        ("policy", "refused", 403, "moving", "enforce", ""),
        ("pull", "refused", 403, "", "", ""),
        ("policy", "done", 200, "watched", "audit", ""),
        ("pull", "done", 200, "", "", ""),
        ("override", "done", 200, "", "", "override"),
        ("override", "done", 200, "moving", "override", ""),
        ("pull", "done", 200, "", "", ""),
        ("override", "done", 200, "", "", "end_override"),
    ]
    assert records[0]["reason"] == "latest moves"
    assert records[5]["reason"] == "hotfix https://***@ci.example/1"
    assert members(records[0], "repository", "reference") == ("docker.io/a/b", "latest")
    assert "pw" not in path.read_text()


async def test_hits_are_in_it_if_pulls_are(
    serve: Serve, upstream: Upstream, path: Path, log: Log, hits: Counter[bool]
) -> None:
    upstream.image("library/alpine", "latest")
    site = await serve(upstream, top=audit(path), fresh_for="30d")
    for _ in range(5):
        assert await send(site, "GET", "/v2/library/alpine/manifests/latest") == 200
    assert hits[True]
    records = log()
    names = ("kind", "repository", "reference", "digest", "agent", "status", "method", "address")
    assert len({members(each, *names) for each in records}) == 1
    assert len({each["id"] for each in records}) == len(records) == 5
    # Another configuration of the same directory and file, as after a reload.
    await site.app.stop()
    again = await serve(upstream, top={"audit": {"file": str(path)}, "admin_token": TOKEN}, fresh_for="30d")
    assert await send(again, "GET", "/v2/library/alpine/manifests/latest") == 200
    assert await operate(again, "POST", "pins", pattern="*:1") == 200
    assert [each["kind"] for each in log()] == ["admin"]  # by default no pulls


@pytest.mark.errors("audit.failed")
async def test_a_full_disk_fails_no_request(
    serve: Serve,
    upstream: Upstream,
    path: Path,
    log: Log,
    events: LogCapture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream.image("library/alpine", "latest")
    site = await serve(upstream, top=audit(path))
    write, space = os.write, 100

    def full(descriptor: int, data: bytes) -> int:
        nonlocal space
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return write(descriptor, data)
        if not space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cut, space = data[:space], 0
        return write(descriptor, cut)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for _ in range(3):
            assert await send(site, "GET", "/v2/library/alpine/manifests/latest") == 200
    assert await send(site, "GET", "/v2/library/alpine/tags/list") == 200
    assert await send(site, "GET", "/v2/library/alpine/manifests/latest") == 200
    cut, *others = path.read_text().splitlines()
    assert len(cut) == 100
    assert [json.loads(each)["object"] for each in others] == ["tags", "manifest"]
    (failed,) = [each for each in events.entries if each["event"] == "audit.failed"]
    (recovered,) = [each for each in events.entries if each["event"] == "audit.recovered"]
    assert (failed["path"], recovered["lost"]) == (str(path), 3)


async def test_a_server_without_the_section_writes_none(serve: Serve, upstream: Upstream, path: Path) -> None:
    upstream.image("library/alpine", "latest")
    site = await serve(upstream)
    assert await send(site, "GET", "/v2/library/alpine/manifests/latest") == 200
    assert not path.exists()


@pytest.mark.clients
@pytest.mark.errors("config.refused")
async def test_all_workers_write_it_and_a_reload_changes_it(
    place: Place, upstream: Upstream, path: Path, log: Log
) -> None:
    upstream.image("a/b", "latest")
    place.tree.update(audit(path, "pull"))
    server = await place.start()
    workers = await server.workers()
    for worker in workers:
        await worker.get("/v2/a/b/manifests/latest")
    assert {each["id"].partition("-")[0] for each in log()} == {each.prefix for each in workers}
    assert len(workers) > 1
    place.tree.update(audit(path, "policy"), policy={"rules": [LATEST]})
    place.configure()
    old = server.pids()
    server.send(signal.SIGHUP)
    await server.heard("config.reloaded")
    await server.gone(*old)
    workers = await server.workers()
    for worker in workers:
        await worker.get("/v2/a/b/manifests/latest", status=403)
    assert [each["kind"] for each in log()] == ["policy"] * len(workers)
    place.tree["audit"]["file"] = str(path / "no" / "directory")
    place.configure()
    server.send(signal.SIGHUP)
    refused = await server.heard("config.refused")
    assert f"audit.file: cannot write {path}/no/directory: Not a directory" in refused["error"]
    await server.stop()


# The file


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir() if each.name.startswith("audit.log"))


def test_two_writers_rotate_and_lose_and_tear_no_line(path: Path) -> None:
    number = 400
    text = [f"{name}{each:04} {'x' * (each % 50)}".encode() for name in "ab" for each in range(number)]
    writers = [AuditFile(path, 2000, 1000) for _ in "ab"]  # each as another process has it

    def write(writer: AuditFile, lines: list[bytes]) -> None:
        for each in lines:
            writer.append(each)
        writer.close()

    threads = [
        threading.Thread(target=write, args=(writer, text[at * number : (at + 1) * number]))
        for at, writer in enumerate(writers)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = [each for name in files(path) for each in (path.parent / name).read_bytes().splitlines()]
    assert sorted(found) == sorted(text)
    assert len(files(path)) > 5


def test_a_certain_number_of_former_files_is_kept(path: Path) -> None:
    file = AuditFile(path, 10, 2)
    for each in (b"first", b"second", b"third", b"4", b"5th", b"much longer than a whole file"):
        file.append(each)
    file.close()
    assert files(path) == ["audit.log", "audit.log.1", "audit.log.2"]
    assert path.read_bytes() == b"much longer than a whole file\n"
    assert path.with_name("audit.log.1").read_bytes() == b"5th\n"
    assert path.with_name("audit.log.2").read_bytes() == b"third\n4\n"
    assert path.stat().st_mode & 0o007 == 0


@pytest.mark.errors("audit.failed")
def test_a_file_that_cannot_be_renamed_grows(
    path: Path, events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    file = AuditFile(path, 10, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", forbidden)
        for each in (b"a first line", b"a second", b"a third"):
            file.append(each)
    assert path.read_bytes() == b"a first line\na second\na third\n"
    file.append(b"a fourth")
    file.close()
    assert files(path) == ["audit.log", "audit.log.1"]
    (failed,) = events.entries
    assert failed["reason"] == "it grows above max_size, as it cannot be renamed: Permission denied"


@pytest.mark.parametrize("new", [True, False])
def test_another_program_renames_or_removes_the_file(path: Path, new: bool) -> None:
    file = AuditFile(path, 1000, 2)
    file.append(b"before")
    path.rename(path.with_name("elsewhere"))
    if new:
        path.touch()
    file.append(b"after")
    file.close()
    assert path.read_bytes() == b"after\n"
    assert path.with_name("elsewhere").read_bytes() == b"before\n"


def test_a_line_that_another_process_left_half_is_ended(path: Path) -> None:
    path.write_bytes(b'{"cut')
    file = AuditFile(path, 1000, 2)
    file.append(b"whole")
    file.append(b"next")
    file.close()
    assert path.read_bytes() == b'{"cut\nwhole\nnext\n'


def test_a_record_of_bytes_that_are_no_text(path: Path, clock: Clock) -> None:
    log = AuditLog(AuditConfig(file=path, kinds=("pull",)), clock)
    log.served(Exchange("1", kind="manifest", method="GET", agent="\udcff" + "a" * 500), 499)
    log.close()
    (record,) = map(json.loads, path.read_text().splitlines())
    assert members(record, "agent", "result", "repository") == ("\udcff" + "a" * 199, "failed", "")


def test_a_file_that_cannot_be_written_keeps_the_server_from_starting(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "file", "No such file")):
        with pytest.raises(StartError, match=f"audit.file: cannot write {path}: {reason}"):
            AuditLog(AuditConfig(file=path))
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(StartError, match="it is no regular file"):
        AuditLog(AuditConfig(file=pipe))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_no_reason_not_to_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(self: AuditFile) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(AuditFile, "open", full)
    AuditLog(AuditConfig(file=path)).close()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "file"),
        ({"file": "a", "kinds": []}, "kinds is empty"),
        ({"file": "a", "kinds": ["reads"]}, "kinds"),
        ({"file": "a", "keep": 0}, "keep"),
        ({"file": "a", "max_size": 100}, "max_size"),
        ({"file": "~/audit"}, "~ is not expanded"),
    ],
)
def test_the_section_is_validated(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(tmp_path, {"audit": section})


# Read again


def entries(config: AuditConfig, match: str = "", limit: int = 100) -> list[str]:
    return [str(each.arguments["pattern"]) for each in audit_rows(config, match, limit)]


def written(config: AuditConfig, *patterns: str, kind: Any = "admin", status: int = 200) -> None:
    log = AuditLog(config, Clock())
    for each in patterns:
        log.administered(kind, "192.0.2.1", AGENT, "POST", "purge", {"pattern": each}, status)
    log.close()


def test_the_last_acts_come_first(path: Path) -> None:
    config = AuditConfig(file=path, kinds=("admin", "login"))
    written(config, "a", "b")
    written(config, "c", kind="login", status=401)
    assert entries(config) == ["c", "b", "a"]
    assert entries(config, limit=2) == ["c", "b"]
    (row,) = audit_rows(config, "refused LOGIN", 10)
    assert (row.at, row.kind, row.status, row.operation) == (Clock().now, "login", 401, "purge")
    assert entries(config, "admin") == ["b", "a"]
    assert entries(config, "admin nonsense") == []


def test_former_files_are_read_too(path: Path) -> None:
    config = AuditConfig(file=path, kinds=("admin",), max_size=600, keep=3)
    names = [str(number) for number in range(8)]
    written(config, *names)
    assert path.with_name("audit.log.2").exists()
    assert entries(config) == names[::-1]


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 16])
def test_lines_of_any_length_and_lines_that_are_none(
    path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_reader, "BLOCK", block)
    config = AuditConfig(file=path, kinds=("admin",))
    written(config, "a" * 500, "\u00fc\n", "b")
    with path.open("ab") as file:
        file.write(b'{"cut": \n\n\xff\n[]\n{"time": 5}\n')
    written(config, "c")
    with path.open("ab") as file:
        file.write(b'{"time": "2026')
    assert entries(config) == ["c", "b", "\u00fc\n", "a" * 500]


def test_so_much_is_read(path: Path) -> None:
    config = AuditConfig(file=path, kinds=("admin",), max_size=1000, keep=5)
    names = [str(number) for number in range(10, 30)]
    written(config, *names)
    line = len(path.read_bytes().splitlines(keepends=True)[0])
    found = [str(each.arguments["pattern"]) for each in audit_reader.last_records(config, 3 * line + 1)]
    assert found == names[:-4:-1]


def test_a_log_that_is_not_there_or_cannot_be_read(path: Path) -> None:
    with pytest.raises(Unsupported, match=r"audit\.file"):
        audit_rows(None, "", 1)
    assert audit_rows(AuditConfig(file=path), "", 1) == []
    path.mkdir()
    with pytest.raises(StorageFailed, match=str(path)):
        audit_rows(AuditConfig(file=path), "", 1)
