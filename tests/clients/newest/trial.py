"""One client's trial: upstreams that hold an image, a server before them, and the client's commands."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import bcrypt
import pytest

from tests.clients import images
from tests.clients.newest.sources import PROGRAMS, Failed, run
from tests.clients.newest.table import Client
from tests.clients.processes import Process, environment, free_port
from tests.clients.setup import write, write_mirrors
from tests.clients.site import OPEN, SERVER, DockerRegistry, Site

COLUMNS = ("cold", "warm, offline", "push", "login", "sign", "verify, offline")
LIMIT = 120.0  # seconds for the commands of one step
NAME, TAG = "library/app", "0.1.0"
LOGIN, PASSWORD = "alice", "wonderland"
ONLY_USERS = [{"who": ["authenticated"], "may": ["pull", "push", "delete"], "where": ["local/*"]}]


class ReferrersRegistry:
    """An upstream with a referrers API, which Debian's docker-registry does not have: a store of our own."""

    def __init__(self, directory: Path) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        config = directory / "referrers.yml"
        config.write_text(
            json.dumps(  # JSON is YAML
                {
                    "listen": address,
                    "admin": "off",
                    "disk": {"path": str(directory / "referrers")},
                    "access": OPEN,
                    "default_namespace": "local",
                    "namespaces": {"local": {"store": {}}},
                }
            )
        )
        self._process = Process([*SERVER, config], ready="listening")

    def requests(self) -> list[str]:
        return []  # nobody counts them

    def stop(self) -> None:
        self._process.stop()


class Trial:
    """A client, and a site of its own."""

    def __init__(self, client: Client, tools: Path, directory: Path, stack: ExitStack) -> None:
        """What it starts in `directory` is stopped by `stack`."""
        self._client = client
        self._tools = tools
        self._directory = directory
        self._homes = itertools.count()
        self._shared = directory / "shared"
        self._shared.mkdir()
        upstreams: dict[str, DockerRegistry | ReferrersRegistry] = {}
        for namespace, upstream in (
            ("docker.io", lambda: DockerRegistry(directory / "docker.io", directory)),
            ("ghcr.io", lambda: ReferrersRegistry(directory)),
        ):
            upstreams[namespace] = upstream()
            stack.callback(upstreams[namespace].stop)
        htpasswd = directory / "htpasswd"
        htpasswd.write_text(f"{LOGIN}:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
        access = {"htpasswd": str(htpasswd), "rules": ONLY_USERS}
        # Nothing is fresh: all that is asked for while upstreams are stopped is due.
        self._site = Site(upstreams, directory, admin=False, access=access, fresh_for="0s")
        stack.callback(self._site.stop)

    def cells(self) -> dict[str, str]:
        """What to show in each column."""
        client = self._client
        cells = dict.fromkeys(COLUMNS, "-")
        if failure := _outcome(self._fill):
            return {**cells, "cold": f"upstream: {failure}"}

        def note(column: str, *steps: Callable[[], None], applies: str = "yes") -> None:
            if applies:
                cells[column] = next(filter(None, map(_outcome, steps)), "ok")

        note("cold", self._cold, applies=client.pull)
        cold = _outcome(self._verify) if client.verify else ""
        note("push", self._private, applies=client.push)
        note("login", self._private, self._refused, applies=client.login or client.push or client.sign)
        note("sign", self._sign, applies=client.sign)
        self._site.go_offline()
        note("warm, offline", self._pull, applies=client.pull)
        note("verify, offline", self._verify, applies=client.verify)
        return {**cells, "verify, offline": cold or cells["verify, offline"]}

    # The steps; each raises Failed

    def _fill(self) -> None:
        """What upstreams and the store hold before."""
        self._run(self._client.setup, "")
        image = images.image("app")
        for upstream in self._site.upstreams.values():
            if self._client.makes:
                self._run(self._client.push, upstream.url.removeprefix("http://"))
            else:
                images.push(upstream.url, NAME, TAG, image)
            self._run(self._client.sign, upstream.url.removeprefix("http://"))
        if not self._client.push:
            basic = base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()
            images.push(self._site.url, f"local/{NAME}", TAG, image, f"Basic {basic}")

    def _cold(self) -> None:
        self._pull()
        if not self._site.requests()["docker.io"]:
            raise Failed("the pull did not reach the upstream by way of the cache")

    def _pull(self) -> None:
        self._run(self._client.pull, f"{self._site.address}/docker.io")

    def _verify(self) -> None:
        for namespace in self._site.upstreams:
            self._run(self._client.verify, f"{self._site.address}/{namespace}")

    def _private(self, password: str = PASSWORD) -> None:
        """Push, or whatever else needs a login."""
        client = self._client
        action = client.push or client.sign or client.pull
        self._run(f"{client.login}\n{action}", f"{self._site.address}/local", password)

    def _refused(self) -> None:
        try:
            self._private("wrong")
        except Failed:
            return
        raise Failed("a wrong password is accepted")

    def _sign(self) -> None:
        place = f"{self._site.address}/local"
        self._run(f"{self._client.login}\n{self._client.sign}\n{self._client.verify}", place)

    def _run(self, commands: str, place: str, password: str = PASSWORD) -> None:
        """By a client that holds nothing; `place` is host:port/namespace."""
        if not commands.strip():
            return
        home = self._directory / str(next(self._homes))
        home.mkdir()
        if self._client.mirror:
            how = write_mirrors if self._client.mirror == "podman" else write
            how(*((home, self._site) if how is write_mirrors else (home, self._client.mirror, self._site)))
        given = environment(
            home,
            IMAGE=f"{place}/{NAME}:{TAG}",
            SOURCE=f"{self._site.address}/docker.io/{NAME}:{TAG}",
            PRIVATE=f"{self._site.store}/{NAME}:{TAG}",
            MIRRORED=f"docker.io/{NAME}:{TAG}",
            REGISTRY=self._site.address,
            LOGIN=LOGIN,
            PASSWORD=password,
            SHARED=str(self._shared),
            PROGRAMS=str(PROGRAMS),
            TOOLS=str(self._tools),
        )
        given["PATH"] = f"{self._tools}/bin:{self._tools}/python/bin:{given['PATH']}"
        daemon = None
        try:
            if self._client.daemon:
                inside = f'cd "$HOME"\n{self._client.daemon}'  # its mounts end with it
                command = ["unshare", "--mount", "sh", "-euc", inside]
                daemon = Process(command, given, ready=self._client.ready)
            run(["sh", "-euc", commands], LIMIT, env=given, cwd=home)
        finally:
            if daemon:
                daemon.stop()


def _outcome(step: Callable[[], None]) -> str:
    """Why it failed; empty if it did not."""
    try:
        step()
    except Failed as error:
        return str(error)
    except pytest.fail.Exception as error:  # of tests.clients.processes
        return str(error).splitlines()[0]
    return ""
