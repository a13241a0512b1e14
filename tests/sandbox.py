"""A place where what a page shows of a terminal is typed in: a server, its upstreams, files, and a home."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from proxy.cli.main import main
from tests.archives import tar
from tests.clients.processes import environment, require
from tests.conftest import Serve, Site
from tests.events import Ear
from tests.layout import Layout, digest_of
from tests.receiver import Receiver
from tests.upstream import Hold, Image, Upstream

LAYER = b"a layer" * 10_000
STORE = {
    "immutable_tags": ["ci-lts"],
    "keep_tags": [{"tags": ["ci-*"], "last": 10, "pulled_within": "30d"}],
}
HOOKS: dict[str, dict[str, Any]] = {
    "deploy": {"format": "registry", "actions": ["push", "move"]},
    "audit": {"format": "cloudevents", "actions": ["push", "pull", "delete"]},
}
# At old.example, and at the registries that `copy` reads.
OLD = (
    "team/app:1",
    "team/app:1.0",
    "team/app:1.1",
    "team/base:1.0",
    "tools:1",
    "library/alpine:3.20",
    "a/one:1",
    "b/two:2",
)
FILES = {
    "compose.yml": (
        "services:\n  app:\n    image: ghcr.io/shop/app:2.0.1\n"
        "  data:\n    image: postgres:16.4\n  built:\n    build: .\n"
    ),
    "images.txt": "ghcr.io/shop/app:2.0.1\n",
    "rendered.yaml": "kind: Pod\nspec: {containers: [{image: 'postgres:16.4'}]}\n",
}
KINDS = {
    "bar": r"[█▒░·]{20}",
    "digest": r"sha256:[0-9a-f]{6,64}…?",
    "age": r"(?<![\w.])(?:\d+(?:\.\d+)? (?:s|min|h|d) ago|now)(?!\w)",
    "date": r"\d{4}-\d\d-\d\d",
    "size": r"(?<![\w.])\d+(?:\.\d+)? [KMGT]?i?B(?!\w)",
    "duration": r"(?<![\w.])\d+(?:\.\d+)? (?:ms|s|min|h|d)(?!\w)",
    "percentage": r"(?<![\w.])\d+(?:\.\d+)?%",
    "time": r"\d{8}T\d{6}\.\d+Z",
    "address": r"(?:127\.0\.0\.1|10\.0\.0\.7)(?!\w|\.\d)(?::\d+)?",
    "number": r"(?<![\w.:/-])\d[\d,]*(?:\.\d+)?(?![\w:/-]|\.\d)",
}
_KIND = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in KINDS.items()))


def kinds(line: str) -> str:
    """A line with the kind of each value that varies in its place, and single spaces."""
    named = _KIND.sub(lambda found: f"<{found.lastgroup}>", re.sub("─{4,}", "<rule>", line))
    return re.sub(r"\s+", " ", named).strip()


def settled(lines: list[str]) -> list[str]:
    """Lines of what is done at once are put in the order of their names."""
    done = [number for number, line in enumerate(lines) if re.search(r"\S: (copied|present)$", line)]
    ordered = sorted(lines[number] for number in done)
    places = dict(zip(done, ordered, strict=True))
    return [places.get(number, line) for number, line in enumerate(lines)]


def shows(shown: list[str], found: list[str]) -> bool:
    """Whether these lines are the ones shown, up to values that vary; … stands for anything."""
    pattern = ""
    shown, found = map(settled, (shown, found))
    for line in shown:
        words = re.escape(kinds(line))
        pattern += r"(?:.*\n)*" if line.strip() == "…" else words.replace("…", ".*") + r"\n"
    return bool(re.fullmatch(pattern, "".join(f"{kinds(line)}\n" for line in found)))


class Sandbox:
    """`site` and its files, of which what is typed in speaks by the names that the pages use."""

    def __init__(
        self, site: Site, upstream: Upstream, other: Upstream, receivers: Sequence[Receiver], directory: Path
    ) -> None:
        self.site = site
        self.upstream = upstream
        self.directory = directory
        (directory / "root").mkdir()
        self.status = 0
        self._holds: list[tuple[Hold, asyncio.Task[Any]]] = []
        registry, server = (url.removeprefix("http://") for url in (other.url, site.url))
        self.names = {
            "old.example": registry,
            "other.example": registry,
            "localhost:5000": server,
            "cache.example:5000": server,
            "127.0.0.1:5000": server,
            "/etc/entrepot.yml": str(directory / "entrepot.yml"),
            "/var/lib/registry": str(directory / "registry"),
            "/var/lib/entrepot": str(directory / "restored"),
            "/mnt/backup": str(directory / "backup"),
        }
        self.printed = {
            "built-in": str(directory / "entrepot.yml"),
            "/var/cache/entrepot": str(directory / "disk"),
            **{
                f"https://{name}.example": each.url.partition("/hook")[0]
                for name, each in zip(HOOKS, receivers, strict=False)
            },
            "/home/ann": str(directory),
        }
        self.registries = dict.fromkeys(("docker.io", "ghcr.io", "quay.io"), registry)  # of copy
        self.misses = False  # in a drill
        self._receivers = [*receivers]
        self._ear = Ear()

    async def prepare(self, lines: str) -> None:
        """Do what each line says: a command, or one of the words below."""
        for line in lines.split("\n"):
            match shlex.split(line):
                case ["entrepot", *_]:
                    said = await self.type(line)
                    assert self.status == 0, said
                case ["pull", name]:
                    await self.pull(name)
                case ["write", name, text]:
                    path = self.directory / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text)
                case ["move", repository, tag]:
                    image = self.upstream.image(repository, None, [b"newer"])
                    self.upstream.index(repository, tag, [image])
                case ["push", *tags]:
                    for tag in tags:
                        self.site.clock.advance(60)
                        await self.prepare(
                            f"entrepot copy old.example/team/app:1 localhost:5000/local/team/{tag}"
                        )
                case ["days", number]:
                    for _ in range(int(number) * 6 // 5):
                        self.site.clock.advance(72000)
                        await self.prepare("entrepot collect")
                case ["later", seconds]:
                    self.site.clock.advance(float(seconds))
                case ["now"]:
                    self.site.clock.now = time.time()
                case ["miss"]:
                    self.misses = True
                case ["keys"]:
                    self.keys()
                case ["told"]:
                    await self.told()
                case ["hold"]:
                    await self.hold()
                case ["stop"]:
                    await self.site.app.stop()
                case ["registry", *_]:
                    registry = Layout(self.directory / "registry")
                    registry.image("team/app", "1", "2")
                    registry.image("team/base", "1", layers=[b"a base"])
                    registry.image("team/old", "3", layers=[b"an old layer"])
                    if "damaged" in line:
                        registry.data(digest_of(b"an old layer")).unlink()
        await self.site.app.composition.recorder.flush()

    async def type(self, text: str) -> list[str]:
        """Do what a line of a terminal says, and tell what it prints."""
        if text == "echo $?":
            return [str(self.status)]
        source, _, text = text.rpartition(" | ")
        given = (self.directory / "rendered.yaml").read_text() if source else "y\n"  # what helm would print
        words = shlex.split(text, comments=True)
        names = {**self.names, **(self.registries if words[:2] == ["entrepot", "copy"] else {})}
        names = {name: place for name, place in names.items() if name in text and words[1] != "setup"}
        for name, place in names.items():
            words = [word.replace(name, place) for word in words]
        output = await (self.call(words, given) if words[0] == "entrepot" else self.run(words))
        for name, place in {**names, **self.printed}.items():
            output = output.replace(place, name)
        return [line for line in output.splitlines() if line.strip()]

    async def call(self, words: list[str], given: str) -> str:
        """Both outputs of the program, in this process; its client's root is a directory."""
        root = str(self.directory / "root")
        if {"--write", "--remove"} & {*words}:
            words += ["--root", root]
        # The program has a loop of its own.
        calling = asyncio.create_task(asyncio.to_thread(CliRunner().invoke, main, words[1:], input=given))
        if words[1] == "drill":
            await self.drill()
        result = await calling
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        self.status = result.exit_code
        return result.output.replace(root, "")

    async def run(self, words: list[str]) -> str:
        """Both outputs of another program."""
        require(words[0])
        storage = {
            "driver": "vfs",
            "graphroot": f"{self.directory}/images",
            "runroot": f"{self.directory}/run",
        }
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in storage.items()]
        (self.directory / "storage.conf").write_text("[storage]\n" + "".join(lines))
        policy = self.directory / ".config" / "containers" / "policy.json"
        policy.parent.mkdir(parents=True, exist_ok=True)
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        settings = {"CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf")}
        running = await asyncio.create_subprocess_exec(
            *words,
            cwd=self.directory,
            env=environment(self.directory, **settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await running.communicate()
        self.status = running.returncode or 0
        await asyncio.sleep(0)  # its pipes are closed in the next turn of the loop
        return output.decode()

    async def get(self, path: str) -> bytes:
        status, _, body = await self.site.get(path)
        assert status == 200, path
        return body

    async def pull(self, name: str) -> None:
        """Get an image as a client for linux/amd64 does."""
        path, _, tag = name.partition(":")
        body = json.loads(await self.get(f"/v2/{path}/manifests/{tag}"))
        if "manifests" in body:
            body = json.loads(await self.get(f"/v2/{path}/manifests/{body['manifests'][0]['digest']}"))
        for each in (body["config"], *body["layers"]):
            await self.get(f"/v2/{path}/blobs/{each['digest']}")
        going_on = self.site.app.composition.fills.in_flight()
        await asyncio.gather(*(each.task for each in going_on if each.task))

    async def told(self) -> None:
        """One receiver has accepted its events, and the other one begins to refuse."""
        taking, refusing = self._receivers
        await taking.took(1)
        await refusing.took(1)
        refusing.answer = 503
        await self.pull("docker.io/library/alpine:3.20")
        await self._ear.heard("webhook.failing")

    async def hold(self) -> None:
        """A client waits for a blob that is half here."""
        digest = self.upstream.blob("library/nginx", LAYER + b"held")
        hold = Hold(asyncio.Event(), after=len(LAYER) // 2)
        self.upstream.next("GET", digest, hold)
        pulling = asyncio.create_task(self.site.get(f"/v2/docker.io/library/nginx/blobs/{digest}"))
        await hold.reached.wait()
        self._holds.append((hold, pulling))
        self.site.clock.advance(2)

    async def drill(self) -> None:
        """In a drill a client asks for what is not here; then its time is up."""
        drill, begun = self.site.app.composition.drill, asyncio.Event()
        begin = drill.begin

        def noted(order: object) -> None:
            begin(order)  # type: ignore[arg-type]
            begun.set()

        drill.begin = noted  # type: ignore[method-assign, assignment]
        await begun.wait()
        if self.misses:
            assert (await self.site.get("/v2/docker.io/library/redis/manifests/7"))[0] == 404
        self.site.clock.advance(600)

    def keys(self) -> None:
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.directory / "bundle.key").write_bytes(private)
        (self.directory / "bundle.pub").write_bytes(public)

    async def close(self) -> None:
        for hold, pulling in self._holds:
            hold.gate.set()
            await pulling


def fill(upstream: Upstream, other: Upstream) -> None:
    """What the pages pull: from all upstreams `upstream`, and from old.example `other`."""
    for tag in ("3", "3.20"):
        amd = upstream.image("library/alpine", None, [LAYER, tag.encode()], "linux/amd64")
        arm = upstream.image("library/alpine", None, [LAYER[1:], tag.encode()], "linux/arm64")
        upstream.index("library/alpine", tag, [amd, arm])
    nginx = upstream.image("library/nginx", "1.27", [LAYER[2:]])
    upstream.artifact("library/nginx", nginx, "application/vnd.dev.cosign")
    upstream.image("old/tool", "1", [LAYER[10:]])
    platforms: list[Image] = [
        upstream.image("library/postgres", None, [LAYER[number:]], f"linux/{name}")
        for number, name in enumerate(("amd64", "arm64"), 3)
    ]
    upstream.artifact("library/postgres", platforms[0], "application/vnd.dev.cosign")
    upstream.index("library/postgres", "16.4", platforms)
    upstream.image("oras-project/oras", "v1.2.0", [tar({"bin/oras": LAYER})])
    upstream.image("shop/app", "2.0.1", [LAYER[5:]])
    for number, name in enumerate(OLD):
        repository, _, tag = name.partition(":")
        other.image(repository, tag, [LAYER[6 + number :]])


async def build(
    serve: Serve, upstream: Upstream, other: Upstream, receivers: Sequence[Receiver], directory: Path
) -> Sandbox:
    """A server with the caches docker.io and ghcr.io and the private registry local, and a configuration."""
    fill(upstream, other)
    more = {"ghcr.io": {"upstream": upstream.url}, "local": {"store": STORE}}
    hooks = [
        {"name": name, "url": each.url, **HOOKS[name]} for name, each in zip(HOOKS, receivers, strict=False)
    ]
    disk = {"path": str(directory / "disk"), "cache_limit": "500GiB", "keep_for": "30d"}
    audit = {"file": str(directory / "audit.log")}
    site = await serve(upstream, more=more, top={"disk": disk, "webhooks": hooks, "audit": audit})
    path = directory / "entrepot.yml"
    tree = json.loads(path.read_text())
    assert site.app.admin_url
    tree["listen"], tree["admin"] = (
        url.removeprefix("http://").rstrip("/") for url in (site.url, str(site.app.admin_url))
    )
    path.write_text(json.dumps(tree))
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return Sandbox(site, upstream, other, receivers, directory)
