"""The blocks of the pages that are for a shell: each is run, and all are valid.

What a page shows of a terminal, with prompts, is typed in by tests/test_page_output.py.  A script has none,
and a comment before it in the page names the test that runs it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from tests.clients.processes import require
from tests.test_console import blocks, commands, parse
from tests.test_docs import PAGES, ROOT
from tests.test_page_output import ELSEWHERE

_SCRIPT = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^>]+) -->\n(?P=indent))?```(?:sh|bash|shell)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_HERE = re.compile(r"<<-?\s*'?(\w+)'?.*?\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"tests/[\w/]+\.py|\btest_\w+\.py")
_FLAG = re.compile(r"--[a-z][a-z-]+")
# Programs of the pages whose help names all options, and the words of its command that choose one.
PROGRAMS = {
    "buildah": 1,
    "curl": 0,
    "docker": 1,
    "git": 1,
    "install": 0,
    "journalctl": 0,
    "pip": 1,
    "podman": 1,
    "skopeo": 1,
    "systemctl": 0,
    "useradd": 0,
}
HELP = {"curl": ("--help", "all"), "git": ("-h",)}


def scripts(text: str) -> Iterator[tuple[str, str]]:
    """The mark of each script of a page, empty if it has none, and its text."""
    for found in _SCRIPT.finditer(text):
        lines = (line.removeprefix(found["indent"]) for line in found["text"].splitlines())
        yield found["mark"] or "", "\n".join(lines) + "\n"


def fault(page: str, mark: str) -> str:
    """What is wrong with the mark of a script; empty if nothing is."""
    if not mark.startswith("run by "):
        return "before the block, write <!-- run by tests/… -->"
    tests = [ROOT / each for each in _TEST.findall(mark)]
    if not tests or not all(each.is_file() and Path(page).name in each.read_text() for each in tests):
        return f"no such test has to do with {page}: {mark}"
    return ""


SCRIPTS = [
    pytest.param(str(page.relative_to(ROOT)), mark, text, id=f"{page.relative_to(ROOT)}: {text[:50]!r}")
    for page in PAGES
    for mark, text in scripts(page.read_text())
]
SHELL = [
    *SCRIPTS,
    *(
        pytest.param(str(page.relative_to(ROOT)), "", typed, id=f"{page.relative_to(ROOT)}: {typed[:50]!r}")
        for page in PAGES
        for lines in blocks(page.read_text())
        if (typed := "".join(f"{line[2:]}\n" for line in lines if re.match(r"[$#] \w", line)))
    ),
]


@pytest.mark.parametrize(("page", "mark", "text"), SCRIPTS)
def test_a_script_is_run(page: str, mark: str, text: str) -> None:
    assert fault(page, mark) == "", text


@pytest.mark.parametrize(("page", "mark", "text"), SHELL)
def test_a_shell_understands_it(page: str, mark: str, text: str) -> None:
    done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "mark", "text"), SCRIPTS)
def test_its_calls_of_entrepot_are_commands(page: str, mark: str, text: str) -> None:
    for words in entrepot(text):
        parse(words)


def entrepot(text: str) -> Iterator[list[str]]:
    """The arguments of each call of entrepot in a script, but for its version."""
    lines = (f"$ {line}" for line in _HERE.sub("", text).splitlines() if "entrepot " in line)
    yield from (words for words in commands([*lines]) if words != ["--version"])


def calls(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The command and the long options of each program of PROGRAMS that a script calls."""
    for line in _HERE.sub("\n", text.replace("\\\n", " ")).splitlines():
        for part in re.split(r"\|\||&&|[|;&]| do ", line):
            try:
                words = [
                    each for each in shlex.split(part, comments=True) if "=" not in each.partition("--")[0]
                ]
            except ValueError:  # a part of a quoted text
                continue
            while words and (words[0] == "sudo" or re.match(r"\w+=", words[0])):
                words = words[1:]
            name = Path(words[0]).name if words else ""
            if name in ("docker", "podman") and "entrepot" in words:
                words = words[: words.index("entrepot")]  # what follows is a call in the container
            if name in PROGRAMS:
                command = (name, *words[1 : 1 + PROGRAMS[name]])
                yield from (
                    (command, flag) for word in words for flag in _FLAG.findall(word.partition("=")[0])
                )


@cache
def helped(command: tuple[str, ...]) -> str | None:
    """What a program says of its options; None if it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    if command == ("docker", "compose") and "compose" not in (helped(("docker",)) or ""):
        return None  # a part of its own, which Debian has not
    done = subprocess.run([*command, *HELP.get(command[0], ("--help",))], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.clients
def test_options_of_other_programs_exist() -> None:
    """Of those that are installed."""
    known, absent = 0, set()
    for parameter in SHELL:
        page, _, text = parameter.values
        for command, flag in calls(str(text)):
            said = helped(command)
            known += said is not None
            if said is not None and flag not in said:
                absent.add(f"{page}: {' '.join(command)} {flag}")
    assert absent == set()
    assert known > 15 or shutil.which("skopeo") is None


@pytest.mark.clients
def test_a_credential_provider_answers_a_kubelet(tmp_path: Path) -> None:
    """That of docs/access.md, asked by a CredentialProviderRequest as in the API of kubelets."""
    require("jq")
    [text] = [text for _, text in scripts((ROOT / "docs/access.md").read_text()) if "jq -c" in text]
    program = tmp_path / "entrepot-token"
    program.write_text(text)
    program.chmod(0o755)
    version = "credentialprovider.kubelet.k8s.io/v1"
    asked = {
        "kind": "CredentialProviderRequest",
        "apiVersion": version,
        "image": "registry.example:5001/team/app:1",
        "serviceAccountToken": 'eyJ"\\.e30.x',
    }
    answer = subprocess.run([program], input=json.dumps(asked), capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == {
        "kind": "CredentialProviderResponse",
        "apiVersion": version,
        "cacheKeyType": "Registry",
        "cacheDuration": "5m",
        "auth": {"registry.example:5001": {"username": "oidc", "password": asked["serviceAccountToken"]}},
    }


def test_tests_that_reasons_name_exist() -> None:
    named = {
        name for table in ELSEWHERE.values() for reason in table.values() for name in _TEST.findall(reason)
    }
    assert len(named) > 5
    assert {each for each in named if not (ROOT / "tests" / each.removeprefix("tests/")).is_file()} == set()


PAGE = """
1. First:

   <!-- run by tests/test_layers.py -->
   ```sh
   entrepot ls && cat >a <<END
   entrepot nonsense
   END
   ```

```sh
curl --fail --nonsense https://a.example   # --comment
sudo podman pull --tls-verify=false \\
  a:1 && echo --other
```
"""


def test_scripts_are_found_with_their_marks() -> None:
    (mark, text), (none, other) = scripts(PAGE)
    assert (mark, none) == ("run by tests/test_layers.py", "")
    assert text == "entrepot ls && cat >a <<END\nentrepot nonsense\nEND\n"
    assert [*entrepot(text)] == [["ls"]]
    assert {*calls(other)} == {
        (("curl",), "--fail"),
        (("curl",), "--nonsense"),
        (("podman", "pull"), "--tls-verify"),
    }


@pytest.mark.parametrize(
    ("mark", "right"),
    [
        ("", False),
        ("run by tests/test_none.py", False),
        ("run by tests/test_layers.py", False),  # which has nothing to do with the page
        ("run by tests/clients/test_air_gap.py", True),
        ("run by hand", False),
    ],
)
def test_a_mark_names_a_test_of_the_page(mark: str, right: bool) -> None:
    assert (fault("docs/air-gap.md", mark) == "") == right


def test_a_call_that_is_none_is_found() -> None:
    with pytest.raises(click.UsageError):
        parse(next(entrepot("entrepot ls --nonsense")))
