"""Blocks of the pages that show a terminal are typed in, and what is printed is what they show.

Those of `check`, `setup` and `user`, which need no server, are in test_console.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

from proxy.cli import console, maintenance, offline, removal
from tests.conftest import Clock, Serve
from tests.receiver import Receiver
from tests.sandbox import HOOKS, Sandbox, build, shows
from tests.test_console import blocks, is_alone
from tests.test_docs import PAGES, ROOT
from tests.upstream import Takes, Upstream

pytestmark = pytest.mark.housekeeping

ALPINE = "pull docker.io/library/alpine:3.20"
BOTH = f"{ALPINE}\npull docker.io/library/nginx:1.27"
MOVED = "move library/alpine 3.20\nentrepot refresh alpine:3.20"
V1 = "entrepot copy old.example/team/app:1 localhost:5000/local/app:v1"
COPIED = "entrepot copy old.example/team/app:1.0 localhost:5000/local/team/app:1.0"
PUSHED = "push app:1 app:1.2"
BUILDS = "push " + " ".join(f"app:ci-{number}" for number in range(7, 19))
DAY, LONGEST = 86_400, 1800  # seconds, of a day and of what happens at once
AGED = f"past 31\n{BUILDS}\npull local/team/app:ci-7\npush base:1\ndays 30\nnow"
# What is done before the first command of a block is typed in, by its page and the start of that command.
BEFORE = {
    "README.md": {
        "skopeo copy --src-tls-verify=false docker://127.0.0.1:5000/d": "",
        "entrepot tag local/team/app:1 local/team/app:stable": (
            f"past 40\n{PUSHED}\n{BUILDS}\nlater 3000000"
        ),
        "entrepot import --from-registry-dir /var/lib/registry": "registry",
        "entrepot ls --tags": ("pull docker.io/library/alpine:3\npull ghcr.io/old/tool:1"),
    },
    "docs/clients.md": {
        "skopeo list-tags --tls-verify=false docker://cache.example:5": "",
    },
    "docs/warming.md": {
        "entrepot warm --from compose.yml --platform linux/amd64": "",
        "entrepot ready compose.yml": (
            "entrepot warm ghcr.io/shop/app:2.0.1\nentrepot warm postgres:16.4 --platform linux/amd64"
        ),
        "helm template shop ./chart | entrepot ready - --platform lin": "entrepot warm postgres:16.4",
        "entrepot drill 10m": "miss",
    },
    "docs/collection.md": {
        "curl -X DELETE http://cache.example:5000/v2/local/app/manife": V1,
        "entrepot collect --dry-run": AGED,
    },
    "docs/migration.md": {
        "entrepot import --config /etc/entrepot.yml --from-registry-d": "registry",
        "entrepot import --config /etc/entrepot.yml --from-registry-d (2)": "registry damaged",
        "entrepot copy docker.io/library/alpine:3.20 localhost:5000/l": "",
    },
    "docs/commands.md": {
        "entrepot ls": BOTH,
        "entrepot ls --tags": BOTH,
        "entrepot show alpine:3.20": (f"{ALPINE}\n{MOVED}\n{ALPINE}\n{ALPINE}\nentrepot pin alpine:3*"),
        "entrepot history alpine:3.20": f"past 1\n{ALPINE}\nlater 86400\n{MOVED}\n{ALPINE}\nnow",
        "entrepot diff alpine:3.20": f"past 1\n{ALPINE}\nlater 86400\n{MOVED}\n{ALPINE}\nnow",
        "entrepot audit 'local/team/app:1.0'": "past 1\npush app:1.0\nnow",
        "entrepot evict --list 2": BOTH,
        "entrepot stats": (
            "past 1\n"
            f"{ALPINE}\n"
            f"{PUSHED}\n"
            "later 86400\n"
            "pull docker.io/library/nginx:1.27\n"
            "pull ghcr.io/shop/app:2.0.1"
        ),
        "entrepot fills": "hold",
        "entrepot fills (2)": "stop",
        "entrepot why alpine:3.20": ALPINE,
        "entrepot refresh alpine:3.20": ALPINE,
        "entrepot refresh alpine:3.20 (2)": (f"{ALPINE}\nmove library/alpine 3.20"),
        "entrepot warm postgres:17 ghcr.io/shop/app:2.0.1": "pull ghcr.io/shop/app:2.0.1",
        "entrepot export week-2.tar 'docker.io/*' --used-within 30d -": (
            f"{BOTH}\nentrepot export week-1.tar alpine:3.20 --platform linux/amd64\nentrepot warm nginx:1.27"
        ),
        "entrepot import week-2.tar --verify-key bundle.pub": (
            "keys\n"
            "entrepot warm alpine:3.20 nginx:1.27\n"
            "entrepot export week-2.tar alpine:3.20 nginx:1.27 --no-referrers --sign-key bundle.key\n"
            "entrepot purge nginx:1.27\n"
            f"{MOVED}"
        ),
        "entrepot pin 'alpine:3*' --keep-fresh 1h --platform linux/am": ALPINE,
        "entrepot unpin 'docker.io/library/alpine:3*'": "entrepot pin alpine:3*",
        "entrepot lock compose.yml": "entrepot warm --from compose.yml",
        "entrepot evict --to 20MiB --dry-run": BOTH,
        "entrepot evict --to 20MiB": BOTH,
        "entrepot purge '*alpine*' --yes": (f"{ALPINE}\n{MOVED}\nentrepot pin alpine:3.20"),
        "entrepot purge alpine:3.20": ALPINE,
        "entrepot purge alpine:3.20 (2)": "",
        "entrepot delete 'local/*:ci-*' --older-than 30d --keep 2 --y": (
            "past 40\npush app:ci-1 app:ci-2 app:ci-3 app:ci-4 base:ci-lts\nlater 3000000"
        ),
        "entrepot tag local/team/app:1.2 local/team/app:stable": (
            f"{PUSHED}\nentrepot copy old.example/team/base:1.0 localhost:5000/local/team/app:stable"
        ),
        "entrepot collect": AGED,
        "entrepot backup /mnt/backup": "push app:1",
        "entrepot restore /mnt/backup --set disk.path=/var/lib/entrep": (
            "push app:1\nentrepot backup /mnt/backup\nstop"
        ),
        "entrepot completion fish --install": "",
        "entrepot copy 'old.example/team/*:1.*' localhost:5000/local/": COPIED,
        "entrepot import --config /etc/entrepot.yml --from-registry-d": "registry",
        "entrepot doctor": "stop",
        "entrepot webhooks": "past 1\npush app:1\ntold\nnow\nstop",
        "entrepot scrub --wait": BOTH,
        "entrepot setup containerd --url http://cache.example:5000 --": "",
        "entrepot setup docker --url http://cache.example:5000 --remo": (
            "write root/etc/docker/daemon.json '{\"debug\": true}'\n"
            "entrepot setup docker --url http://cache.example:5000 --write"
        ),
    },
}

# What is compared of a block whose other lines tell of the internet, and of how large the machine is.
LINES = {
    "entrepot doctor": ("CHECK", "───", "configuration", "disk", "locks", "links", "server", "listen"),
}
# Columns of the terminal, where a table is shown as fitted to it.
WIDTHS = {"entrepot warm postgres:17 ghcr.io/shop/app:2.0.1": 132}
START = "tests/clients/test_readme.py starts this server"
CLONE = "builds or tests a clone of this repository"
TUTORIALS = "tests/clients/test_tutorials.py does all that this page says"
AIR_GAP = "tests/clients/test_air_gap.py does all that this page says"
DOCKER = "tests/clients/test_readme.py logs in and pushes, by docker"
KEYS = "each key is another one: tests/test_api_keys.py"
ISSUERS = "needs an issuer of the internet, or a cluster"
CLUSTER = "needs a cluster; tests/test_chart.py checks the values and manifests"
OWN = "needs a client that the tests do not install"
# Blocks that are not typed in here, and why.
ELSEWHERE = {
    "docs/fleet.md": {
        ".venv/bin/pip install '.[fleet]'": "CONTRIBUTING.md installs it with the tests",
        "sudo -u postgres createuser --pwprompt entrepot": "see tests/test_fleet.py",
        "entrepot migrate --to shared --dry-run": "see tests/test_cli_moves.py",
        "entrepot ls --tags": "needs three replicas: see tests/test_fleet_view.py",
    },
    "docs/tracing.md": {
        ".venv/bin/pip install '.[tracing]'": "CONTRIBUTING.md installs it with the tests",
    },
    "docs/policy.md": {
        ".venv/bin/pip install '.[policy]'": "CONTRIBUTING.md installs it with the tests",
    },
    "README.md": {
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bi": START,
        "entrepot serve --store local": "tests/clients/test_readme.py does this, by docker and podman",
        "docker login cache.example:5001": DOCKER,
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]'": CLONE,
        '.venv/bin/pytest -m "not clients"': CLONE,
    },
    "CONTRIBUTING.md": {
        "python3 -m venv .venv": CLONE,
        ".venv/bin/ruff check . && .venv/bin/ruff format --check . &&": CLONE,
        ".venv/bin/pip install -e '.[docs]'": "tests/test_site.py builds the site",
    },
    "docs/clients.md": {
        "cat certs.d/ghcr.io/hosts.toml": "shows a file that the reader writes",
        "ollama pull http://cache.example:5000/ollama/llama3.2:1b --i": OWN,
        "MODEL_RUNNER_REGISTRY_MIRRORS=http://cache.example:5000 dock": OWN,
        "kit pull cache.example:5000/ghcr.io/jozu-ai/llama3:8b --plai": OWN,
        "apptainer pull --no-https app.sif docker://cache.example:500": OWN,
        "python -m tests.clients.newest --directory built": "builds clients for half an hour",
    },
    "docs/migration.md": {"skopeo login harbor.example": "needs a Harbor; tests/test_copy.py copies"},
    "docs/tutorials/mirror.md": dict.fromkeys(
        (
            "entrepot check mirror.yml",
            "skopeo copy --src-tls-verify=false docker://127.0.0.1:5000/d",
            "entrepot ls --config mirror.yml",
            "skopeo copy --src-tls-verify=false docker://127.0.0.1:5000/d (2)",
            "entrepot setup podman --url http://127.0.0.1:5000 --config m",
            "skopeo copy docker://docker.io/library/alpine:3.20 oci:usual",
            "entrepot drill 1m --config mirror.yml",
        ),
        TUTORIALS,
    ),
    "docs/tutorials/private-registry.md": dict.fromkeys(
        (
            "echo 'correct horse battery' | entrepot user add ci --passwo",
            "entrepot check registry.yml",
            "skopeo copy --dest-tls-verify=false --dest-creds 'ci:correct",
            "skopeo copy --src-tls-verify=false docker://127.0.0.1:5000/t",
            "! skopeo delete --tls-verify=false --creds 'ci:correct horse",
            "entrepot tag local/team/app:1.0.0 local/team/app:stable --co",
            "entrepot delete 'local/team/app:build-*' --dry-run --config",
        ),
        TUTORIALS,
    ),
    "docs/air-gap.md": {
        "entrepot warm --list images.txt --platform linux/amd64 --con": AIR_GAP,
        "openssl genpkey -algorithm ed25519 -out bundle.key": AIR_GAP,
        "entrepot export week-1.tar --list images.txt --platform linu": AIR_GAP,
        "skopeo inspect --raw oci-archive:week-1.tar:docker.io/librar": AIR_GAP,
        "entrepot import week-1.tar --verify-key bundle.pub --config": AIR_GAP,
        "entrepot setup podman --url http://127.0.0.1:5000 --config i": AIR_GAP,
        "tar xf week-1.tar entrepot.json": AIR_GAP,
        "entrepot import week-2.tar --verify-key bundle.pub --config": AIR_GAP,
    },
    "docs/access.md": {
        "entrepot user add alice --file /etc/entrepot/htpasswd": DOCKER,
        "entrepot keys create ci --scope 'repository:team/*:pull,push": KEYS,
        "entrepot lock compose.yml >images.lock": KEYS,
        'echo "$TOKEN" | docker login registry.example:5001 -u oidc -': ISSUERS,
        "curl -o github.jwks https://token.actions.githubusercontent.": ISSUERS,
        "kubectl get --raw /.well-known/openid-configuration": ISSUERS,
    },
    "docs/install/kubernetes.md": {
        "helm install entrepot deploy/helm/entrepot --namespace entre": CLUSTER,
        "kubectl -n entrepot logs daemonset/entrepot-nodes": CLUSTER,
        "kubectl create namespace entrepot": CLUSTER,
        "helm package deploy/helm/entrepot": "tests/test_chart.py pushes and pulls it",
    },
    "docs/commands.md": {
        "entrepot health": "needs a full disk: see tests/test_health.py",
        "entrepot extensions": "needs packages: see tests/test_extension_examples.py",
        "entrepot setup containerd --url http://10.0.0.7:5000 --while": "see tests/test_setup_hold.py",
        "entrepot serve --listen 0.0.0.0:5000 --disk /data --store lo": START,
        "entrepot keys create ci --scope 'repository:local/team/*:pul": KEYS,
        "entrepot policy explain ghcr.io/team/app@sha256:d6a3ce4be589": "needs a policy: test_cli_policy.py",
        "entrepot doctor --client http://cache.example:5000 --namespa": "needs containerd with a mistake",
    },
}


Block = tuple[
    str, str
]  # its page, and the start of its first command, which has a number if it is not the first


def found() -> dict[Block, list[str]]:
    """The lines of all blocks but those of test_console.py."""
    every: dict[Block, list[str]] = {}
    for page in PAGES:
        for lines in blocks(page.read_text()):
            if is_alone(lines):
                continue
            start = lines[0][2:].partition("   #")[0][:60].strip()
            block, number = (str(page.relative_to(ROOT)), start), 2
            while block in every:
                block, number = (block[0], f"{start} ({number})"), number + 1
            every[block] = lines
    return every


FOUND = found()
TYPED = [
    pytest.param(
        (page, start),
        id=f"{page}: {start}",
        marks=() if re.match("entrepot|helm", start) else pytest.mark.clients,
    )
    for page, starts in BEFORE.items()
    for start in starts
]


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    async with Upstream(takes=Takes(checks=True)) as registry:
        yield registry


@pytest.fixture
async def receivers(request: pytest.FixtureRequest) -> AsyncIterator[list[Receiver]]:
    """One for each webhook, where the block is about them."""
    page, start = request.node.callspec.params["block"]
    async with AsyncExitStack() as stack:
        made = [Receiver() for _ in HOOKS if "told" in BEFORE[page][start]]
        for each in made:
            await each.start()
            stack.push_async_callback(each.stop)
        yield made


@pytest.fixture
async def sandbox(
    request: pytest.FixtureRequest,
    serve: Serve,
    upstream: Upstream,
    other: Upstream,
    receivers: list[Receiver],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Sandbox]:
    page, start = request.node.callspec.params["block"]
    before = BEFORE[page][start]
    days = re.search(r"^past (\d+)$", before, re.MULTILINE)
    clock.now = time.time() - (int(days[1]) * DAY if days else 0)
    clock.now -= max(0.0, clock.now % DAY - DAY + LONGEST)  # midnight does not divide what happens at once
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ENTREPOT_CONFIG", str(tmp_path / "entrepot.yml"))
    for module in (maintenance, offline):
        monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(removal, "is_interactive", lambda: True)
    made = await build(serve, upstream, other, receivers, tmp_path)
    await made.prepare(before)
    yield made
    await made.close()


@pytest.fixture
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are drawn as on a terminal as wide as the block; of its bars nothing is left at the end."""
    wide = 260  # columns: the names of temporary directories are long
    width = WIDTHS.get(request.node.callspec.params["block"][1], wide)

    def drawn(file: IO[str]) -> Console:
        return Console(file=file, width=width, highlight=False, markup=False, emoji=False)

    monkeypatch.setattr(console, "terminal", drawn)
    monkeypatch.setattr(console.ProgressDisplay, "show", lambda *_: None)


@pytest.mark.clients
@pytest.mark.parametrize("block", TYPED)
async def test_output_is_what_the_page_shows(block: Block, terminal: None, sandbox: Sandbox) -> None:
    lines = FOUND[block]
    numbers = [number for number, line in enumerate(lines) if re.match(r"[$#] \w", line)]
    for number, end in pairwise([*numbers, len(lines)]):
        printed = await sandbox.type(lines[number][2:])
        shown = [line for line in lines[number + 1 : end] if line.strip()]
        if shown:
            parts = LINES.get(block[1], "")
            shown, printed = ([line for line in each if line.startswith(parts)] for each in (shown, printed))
            assert shows(shown, printed), "\n".join(["shown:", *shown, "printed:", *printed])
        else:
            assert sandbox.status == 0, printed


def test_each_block_is_typed_in_or_has_a_reason_why_not() -> None:
    typed, left = (
        {(page, start) for page in table for start in table[page]} for table in (BEFORE, ELSEWHERE)
    )
    assert typed | left == {*FOUND}
    assert not typed & left
    assert WIDTHS.keys() | LINES.keys() <= {start for _, start in typed}


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("NAME  SIZE", "NAME       SIZE", True),
        ("NAME  SIZE", "SIZE  NAME", False),
        ("a  3.4 MiB", "a  12 B", True),
        ("a  3.4 MiB", "a  12 s", False),
        ("a  3.4 MiB", "a  12", False),
        ("used 3 times", "used 12 times", True),
        ("used 3 times", "used 1 time", False),
        ("sha256:1c548b6cf554", f"sha256:{'0' * 64}", True),
        ("sha256:1c548b…, which", f"sha256:{'0' * 64}, which", True),
        ("sha256:1c548b6cf554", "1c548b6cf554", False),
        ("13 s ago", "now", True),
        ("13 s ago", "never", False),
        ("for 9 min", "for 30 d", True),
        ("alpine:3.20", "alpine:3.21", False),
        ("ci-7", "ci-8", False),
        ("a\n─────\nb", "a\n──────────\nb", True),
        ("a\n─────\nb", "a\nb", False),
        ("a is …", "a is b, c", True),
        ("a is …", "a was b", False),
        ("a\n…\nd", "a\nb\nc\nd", True),
        ("a\n…", "b\na", False),
        ("b: copied\na: present\nc", "a: present\nb: copied\nc", True),
        ("b: copied\na: present\nc", "a: copied\nb: copied\nc", False),
    ],
)
def test_values_that_vary_are_compared_by_kind(shown: str, printed: str, same: bool) -> None:
    assert shows(shown.split("\n"), printed.split("\n")) == same
