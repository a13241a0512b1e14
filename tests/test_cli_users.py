"""`entrepot user`: the commands as a person types them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import bcrypt
import pytest
import yaml
from click.testing import CliRunner, Result

from proxy.access import user_file
from proxy.access.htpasswd import parse
from proxy.cli.main import main
from tests.test_htpasswd import line


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_file, "COST", 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "htpasswd"


def run(*words: str, typed: str = "") -> Result:
    return CliRunner(env={"HOME": "/nowhere"}).invoke(main, ["user", *words], input=typed)


def test_from_the_first_user_to_the_last(path: Path) -> None:
    file = ("--file", str(path))
    assert run("add", "alice", "--password-stdin", *file, typed="secret\n").output == (
        f"added alice to {path}\n"
    )
    run("add", "bob", "--password-stdin", *file, typed="b\r\n")
    assert run("ls", *file).output == "alice\nbob\n"
    assert json.loads(run("ls", "--json", *file).output) == ["alice", "bob"]
    said = run("passwd", "alice", "--password-stdin", *file, typed="other")
    assert said.output == f"changed the password of alice in {path}\n"
    hashes = parse(path.read_bytes()).hashes
    assert bcrypt.checkpw(b"other", hashes["alice"])
    assert bcrypt.checkpw(b"b", hashes["bob"])
    assert run("rm", "alice", *file).output == f"removed alice from {path}\n"
    assert run("ls", *file).output == "bob\n"
    run("rm", "bob", *file)
    assert run("ls", *file).output == ""


def test_the_file_is_that_of_the_configuration(tmp_path: Path, path: Path) -> None:
    config = tmp_path / "entrepot.yml"
    config.write_text(yaml.safe_dump({"access": {"htpasswd": str(path)}}))
    assert run("add", "alice", "--password-stdin", "--config", str(config), typed="x\n").exit_code == 0
    assert run("ls", "--config", str(config)).output == "alice\n"
    other = tmp_path / "other"
    assert (
        run(
            "add", "bob", "--password-stdin", "--config", str(config), "--file", str(other), typed="x"
        ).exit_code
        == 0
    )
    assert [*parse(other.read_bytes()).hashes] == ["bob"]


@pytest.mark.parametrize(
    ("words", "status", "cause"),
    [
        (["ls"], 2, "the built-in configuration has no access.htpasswd: add it, or give --file"),
        (["ls", "--config", "empty.yml"], 2, "empty.yml has no access.htpasswd"),
        (["ls", "--config", "missing.yml"], 2, "entrepot: missing.yml: cannot be read: No such file"),
        (["ls", "--file", "missing"], 1, "entrepot: missing: No such file or directory"),
        (["rm", "alice", "--file", "missing"], 1, "entrepot: missing: No such file or directory"),
        (["add", "a:b", "--file", "x"], 2, "a name must have no colon"),
        (["add", "carol", "--file", "x"], 2, "standard input is no terminal: give --password-stdin"),
        (["add", "carol", "--file", "x", "--password-stdin"], 1, "the password must have 1 to 72 bytes"),
        (["add", "carol", "--file", "no/x", "--password-stdin"], 1, "the password must have"),
        (["rm", "carol", "--file", "users"], 1, "entrepot: carol does not exist"),
    ],
)
def test_what_cannot_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.yml").touch()
    Path("users").write_text(line("alice", "a"))
    said = run(*words)
    assert said.exit_code == status
    assert cause in said.output


def test_lines_that_the_server_refuses_are_told(path: Path) -> None:
    path.write_text(line("alice", "a") + "bob:{SHA}x\n")
    said = run("ls", "--file", str(path))
    assert said.exit_code == 0
    assert said.stdout == "alice\n"
    assert said.stderr == f"entrepot: {path}: line 2 holds no bcrypt hash: use htpasswd -B\n"


@pytest.mark.clients
def test_a_terminal_is_asked_twice_and_shows_nothing(path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "user", "add", "alice", "--file", str(path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    answers = {b"Password: ": b"secret\n", b"confirmation: ": b"secret\n"}
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                said += os.read(ours, 1000)
            except OSError:
                break  # it has ended
            for prompt in [each for each in answers if said.endswith(each)]:
                os.write(ours, answers.pop(prompt))
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"secret" not in said
    assert bcrypt.checkpw(b"secret", parse(path.read_bytes()).hashes["alice"])
