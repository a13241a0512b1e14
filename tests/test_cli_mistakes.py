"""Mistakes with commands: one plain sentence that names what is at fault, and the documented exit status."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxy.cli.main import main
from tests.conftest import Serve
from tests.test_failures import FOREIGN
from tests.upstream import Upstream

CONFIG = """
listen: 127.0.0.1:0
admin: off
disk: {path: disk}
namespaces: {docker.io: {upstream: http://127.0.0.1:9}, local: {store: {}}}
"""
ABSENT = r"absent: (cannot be read: )?No such file or directory"
DIRECTORY = r"directory: (cannot be read: )?Is a directory"

# Words, `@` being --config with a configuration; the exit status; what is said.
MISTAKES = {
    "check absent": (2, ABSENT),
    "check directory": (2, DIRECTORY),
    "check broken": (2, r"broken:2:1: not YAML here: "),
    "check binary": (2, r"binary: not UTF-8 at byte 0"),
    "check text": (2, r"text: expected a mapping of keys to values, got a string"),
    "serve absent": (2, ABSENT),
    "serve --listen nonsense": (2, r"--listen: .*expected host:port"),
    "serve --disk text --listen 127.0.0.1:0": (1, r"cannot store in text \(disk\.path\)"),
    "serve --listen 192.0.2.1:5000 --disk disk": (
        1,
        r"192\.0\.2\.1:5000 \(listen\): .*: choose an",
    ),
    "ls @": (1, r"there is no cache in disk \(disk\.path\): start a server \(entrepot serve\)"),
    "ls @ --server 127.0.0.1:1": (1, r"no server at http://127\.0\.0\.1:1: nothing listens there"),
    "ls @ --server ftp://x": (2, r"--server ftp://x: expected an address such as"),
    "ls @ --sort colour": (2, r"'--sort': 'colour' is not one of 'name'"),
    "warm @": (2, r"no image is named: give REF, --list or --from"),
    "warm @ --list absent": (2, ABSENT),
    "drill @ soon": (2, r"'DURATION': expected a duration: a number and its unit"),
    "import @ absent": (1, ABSENT),
    "import @ text": (1, r"text is neither a directory nor a tar archive"),
    "import @ directory": (1, r"directory is not an archive of images"),
    "export @ absent/images.tar local/a": (1, r"."),
    "setup nothing": (2, r"'CLIENT': 'nothing' is no client that setup knows; entrepot setup --help lists"),
    "setup docker --url https://a.example --ca-file absent": (2, f"--ca-file {ABSENT}"),
    "setup docker --url https://a.example --ca-file text": (2, r"--ca-file text: holds no PEM certificate"),
    "setup docker --write --root absent": (2, r"'--root': Directory 'absent' does not exist"),
    "user ls --file absent": (1, ABSENT),
    "user ls --file directory": (1, DIRECTORY),
    "user rm ann --file empty": (1, r"ann does not exist"),
    "user add a:b --file empty": (2, r"'NAME': a name must have no colon"),
    "doctor --server ftp://x": (2, r"--server ftp://x: expected an address such as"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one of each file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    for name, content in {
        "entrepot.yml": CONFIG.encode(),
        "broken": b"listen: [\n",
        "binary": b"\xff\xfe",
        "text": b"words\n",
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def said(words: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def check_sentence(told: str, expected: str) -> None:
    """One line, perhaps after that of the usage, and nothing that only a programmer reads."""
    *usage, line = [each for each in told.splitlines() if each]
    assert not usage or usage[0].startswith("Usage: ")
    assert re.match("entrepot: |Error: ", line), told
    assert re.search(expected, line), told
    assert not FOREIGN.search(told.removeprefix("Error: ").replace("\nError: ", "\n")), told


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(here: Path, words: str) -> None:
    status, expected = MISTAKES[words]
    result = said([*words.replace("@", f"--config={here / 'entrepot.yml'}").split()])
    assert result[0] == status, result
    check_sentence(result[1], expected)


TOLD = {
    "ls": r"the admin API needs the token: admin_token; give that of http://\S+ by --token or ENTREPOT_ADMIN",
    "ls --token wrong": r"the admin API does not accept this token: it is not admin_token; give that of",
    "show alpine --token t": r"docker\.io/library/alpine:latest is not stored",
    "show nope.example/x --token t": r"'nope\.example' is not a configured namespace: add it under",
    "ready absent --token t": ABSENT,
    "ready directory --token t": DIRECTORY,
    "purge local/x --token t": r"local is a private registry, .*: entrepot delete local/x",
    "delete docker.io/x:1 --token t": r"docker\.io is a cache, .*: entrepot purge docker\.io/library/x:1",
    "delete local/x:1 --token t": r"nothing was deleted: nothing that is stored, .* matches local/x:1",
    "refresh local/x --token t": r"local is not a cache: it has no upstream",
    "unpin nothing --token t": r"nothing is not pinned",
    "tag local/a:1 local/b:2 --token t": r"local/a has no tag 1",
}


async def test_mistakes_with_a_server(serve: Serve, upstream: Upstream, here: Path) -> None:
    site = await serve(
        upstream, top={"admin_token": "t"}, more={"local": {"store": {}}}, directory=here / "d"
    )
    for words, expected in TOLD.items():
        given = [*words.split(), "--server", str(site.app.admin_url)]
        status, told = await asyncio.to_thread(said, given)
        assert status == (2 if "not a configured namespace" in told or "be read" in told else 1), words
        check_sentence(told, expected)
    given = ["ls", "--token", "t", "--server", site.url]
    status, told = await asyncio.to_thread(said, given)
    assert status == 1
    check_sentence(told, r"answers 404: is that the admin address of entrepot\?")
