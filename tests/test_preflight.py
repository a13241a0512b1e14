"""What `check` finds that `serve` would refuse."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from proxy.cli.main import main
from tests.authority import Authority
from tests.clients.processes import free_port

HUB = "https://registry.example"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A configuration with which the server starts."""
    return {
        "listen": f"127.0.0.1:{free_port()}",
        "admin": "off",
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"x": {"upstream": {"url": HUB}}},
    }


def check(tmp_path: Path, tree: dict[str, Any], *words: str) -> Result:
    path = tmp_path / "entrepot.yml"
    path.write_text(yaml.safe_dump(tree))
    return CliRunner().invoke(main, ["check", str(path), *words])


def test_nothing_is_wrong_and_nothing_is_made(tmp_path: Path, tree: dict[str, Any]) -> None:
    result = check(tmp_path, tree)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [each.name for each in tmp_path.iterdir()] == ["entrepot.yml"]


def test_all_that_is_wrong_comes_at_once(tmp_path: Path, tree: dict[str, Any]) -> None:
    users = tmp_path / "users"
    users.write_text("ann:{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=\nbob:secret\n")
    keys = tmp_path / "keys"
    keys.write_text("none")
    absent, file = tmp_path / "absent.pem", tmp_path / "file"
    file.write_text("no certificate")
    tree["tls"] = {"certificate": str(absent)}
    token = {"realm": "https://auth.example/token", "service": "s", "issuer": "i", "keys": [str(keys)]}
    tree["access"] = {"htpasswd": str(users), "token": token, "ping": "challenge"}
    tree["namespaces"]["x"]["upstream"] |= {"ca_file": str(absent), "client_certificate": str(absent)}
    tree["namespaces"]["y"] = {"upstream": {"url": HUB, "ca_file": str(file)}}
    tree["webhooks"] = [{"name": "a", "url": "https://h.example/", "ca_file": str(absent)}]
    tree["disk"] = {"path": str(file)}
    result = check(tmp_path, tree)
    assert result.exit_code == 1
    found = [line.removeprefix("entrepot: ") for line in result.stderr.splitlines()]
    expected = [
        f"tls.certificate: {absent}: No such file or directory",
        f"{users} (access.htpasswd): line 1 holds no bcrypt hash: use",
        f"{keys}: ",
        f"namespaces.x.upstream.ca_file: {absent}: No such file or directory",
        f"namespaces.x.upstream.client_certificate: {absent}: No such file or directory",
        f"namespaces.y.upstream: {file}: it has no certificate, or no key, in PEM format",
        f"webhooks[0].ca_file: {absent}: No such file or directory",
        f"disk.path: {file} is not a directory: set disk.path to a directory",
    ]
    assert [line.startswith(start) for line, start in zip(found, expected, strict=True)] == [True] * len(
        expected
    ), found
    assert "secret" not in result.output
    result = check(tmp_path, tree, "--no-files")
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_files_of_issuers(tmp_path: Path, tree: dict[str, Any]) -> None:
    absent, bad = str(tmp_path / "absent"), tmp_path / "bad"
    bad.write_text("{}")
    usual = {"issuer": "https://ci.example", "audience": "x", "required_claims": {"sub": "x"}}
    files = {"a": {"jwks_file": str(bad)}, "b": {"ca_file": absent}, "c": {"token_file": absent}, "d": {}}
    tree["access"] = {"oidc": {name: {**usual, **each} for name, each in files.items()}, "ping": "challenge"}
    result = check(tmp_path, tree)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"entrepot: {bad} (access.oidc.a.jwks_file): its JWKS has no key for signatures,"
        " of type RSA (2048 bits or more), EC or OKP",
        f"entrepot: {absent} (access.oidc.b.ca_file): No such file or directory",
        f"entrepot: {absent} (access.oidc.c.token_file): No such file or directory",
    ]


@pytest.mark.errors("credentials.failed")
def test_what_is_needed_later_is_a_warning(tmp_path: Path, tree: dict[str, Any]) -> None:
    absent = str(tmp_path / "absent")
    tree["namespaces"]["x"]["upstream"] |= {"username": "ci", "password_file": absent}
    tree["warm"] = [{"list": absent, "every": "6h"}]
    result = check(tmp_path, tree)
    assert result.exit_code == 0
    assert "warning: namespaces.x.upstream: " in result.stdout
    assert f"warning: warm[0].list: {absent}: No such file or directory" in result.stdout
    assert "warning" not in check(tmp_path, tree, "--no-files").output


def test_a_port_in_use_may_be_the_servers(tmp_path: Path, tree: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tree["listen"] = f"127.0.0.1:{taken.getsockname()[1]}"
        result = check(tmp_path, tree)
    assert result.exit_code == 0
    assert f"warning: listen: something listens at {tree['listen']} already: " in result.stdout


def test_an_address_of_another_machine(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["listen"] = "192.0.2.1:5000"
    result = check(tmp_path, tree)
    assert result.exit_code == 1
    assert (
        result.stderr
        == "entrepot: cannot listen on 192.0.2.1:5000 (listen): Cannot assign requested address: "
        "choose an address of this machine (ip address shows them)\n"
    )


def test_a_certificate_and_its_key(tmp_path: Path, tree: dict[str, Any]) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    tree["tls"] = one
    assert check(tmp_path, tree).exit_code == 0
    tree["tls"] = {**one, "key": other["key"]}
    assert "is not the key of the first certificate" in check(tmp_path, tree).stderr


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_from_which_is_only_read(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryDirectory", fail)
    place = tmp_path / "disk"
    place.mkdir()
    cause = f"disk.path: {place} cannot be written: {os.strerror(number)}"
    result = check(tmp_path, tree)  # nothing is stored that could be served
    assert (result.exit_code, cause in result.stderr) == (1, True)
    (place / "cache").mkdir()
    result = check(tmp_path, tree)
    assert (result.exit_code, f"warning: {cause}" in result.stdout) == (0, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_rights(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    tree["disk"]["path"] = str(tmp_path / "locked" / "disk")
    assert "does not exist, and cannot be created" in check(tmp_path, tree).stderr


@pytest.mark.errors("credentials.failed")
def test_a_list_of_registries(tmp_path: Path, tree: dict[str, Any]) -> None:
    absent = tmp_path / "absent.pem"
    hosts = {"hosts": ["*.example.com"], "docker_config": str(tmp_path / "config.json")}
    tree["namespaces"]["*"] = {"upstream": hosts}
    result = check(tmp_path, tree)
    assert (result.exit_code, "namespaces: *, x" in result.stdout) == (0, True)
    assert "warning: namespaces.*.upstream: " in result.stdout
    hosts["ca_file"] = str(absent)
    result = check(tmp_path, tree)
    assert result.exit_code == 1
    assert f"namespaces.*.upstream.ca_file: {absent}: No such file or directory" in result.stderr
