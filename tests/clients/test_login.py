"""Real clients log in, push and pull: by a password, an API key, or the token of a job, also for a token."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import bcrypt
import pytest

from tests.clients.conftest import Filled
from tests.clients.processes import PATIENCE, Process, environment, require
from tests.clients.site import DockerRegistry, Site
from tests.clients.token_server import ISSUER, SERVICE, TokenServer
from tests.conftest import Clock
from tests.issuer import AUDIENCE, Issuer, public

USER, PASSWORD = "alice", "wonderland"
ONLY_USERS = [{"who": ["authenticated"], "may": ["pull", "push", "delete"], "where": ["local/*"]}]

Start = Callable[..., Site]


@pytest.fixture(scope="module")
def start(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A site whose store is for users alone: for all tests that ask for the same `access`."""
    running: list[DockerRegistry | Site] = []
    started: dict[str, Site] = {}

    def start(**access: Any) -> Site:
        if repr(access) not in started:
            started[repr(access)] = begin(tmp_path_factory.mktemp("site"), access)
        return started[repr(access)]

    def begin(tmp_path: Path, access: dict[str, Any]) -> Site:
        htpasswd = tmp_path / "htpasswd"
        htpasswd.write_text(f"{USER}:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
        upstreams = {}
        for namespace, root in filled.roots.items():
            upstreams[namespace] = DockerRegistry(root, tmp_path)
            running.append(upstreams[namespace])
        given = {"htpasswd": str(htpasswd), "rules": ONLY_USERS, **access}
        site = Site(
            upstreams, tmp_path, False, {key: each for key, each in given.items() if each is not None}
        )
        running.append(site)
        return site

    yield start
    for each in reversed(running):
        each.stop()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    server = TokenServer(tmp_path_factory.mktemp("tokens"), USER, PASSWORD)
    yield server
    server.stop()


def by_tokens(server: TokenServer) -> dict[str, Any]:
    service = {"realm": server.realm, "service": SERVICE, "issuer": ISSUER, "keys": [str(server.keys)]}
    return {"token": service, "htpasswd": None, "rules": []}


class Client:
    """A program that pulls and pushes, with a home of its own."""

    def __init__(self, home: Path, **more: str) -> None:
        self._home = home
        self._environment = environment(home, **more)
        self.said = ""

    def run(self, *words: str | Path) -> bool:
        """Whether it goes well."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
        self.said = done.stdout + done.stderr
        print(*words, done.returncode, self.said, sep="\n")
        return done.returncode == 0


class Skopeo(Client):
    def __init__(self, home: Path) -> None:
        require("skopeo", root=False)
        super().__init__(home, REGISTRY_AUTH_FILE=str(home / "auth.json"))

    def login(self, address: str, password: str) -> bool:
        return self.run("skopeo", "login", "--tls-verify=false", "-u", USER, "-p", password, address)

    def logout(self, address: str) -> bool:
        return self.run("skopeo", "logout", address)

    def pull(self, name: str) -> bool:
        place = f"dir:{self._home}/{abs(hash(name))}"
        words = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--all"]
        return self.run(*words, f"docker://{name}", place)

    def push(self, source: str, name: str) -> bool:
        words = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
        return self.run(*words, f"docker://{source}", f"docker://{name}")


class Podman(Client):
    def __init__(self, home: Path) -> None:
        require("podman")
        configuration = home / "containers.conf"
        configuration.write_text(
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nlock_type = "file"\n'
            f'tmp_dir = "{home / "tmp"}"\n'
        )
        auth = home / "auth.json"
        auth.write_text("{}")  # it wants one to be there
        super().__init__(home, CONTAINERS_CONF=str(configuration), REGISTRY_AUTH_FILE=str(auth))
        storage = (f"--root={home}/storage/root", f"--runroot={home}/storage/run", "--storage-driver=vfs")
        self._podman = ("podman", *storage)

    def login(self, address: str, password: str) -> bool:
        return self.run(*self._podman, "login", "--tls-verify=false", "-u", USER, "-p", password, address)

    def logout(self, address: str) -> bool:
        return self.run(*self._podman, "logout", address)

    def pull(self, name: str) -> bool:
        return self.run(*self._podman, "pull", "--tls-verify=false", "--quiet", "--arch=amd64", name)

    def push(self, source: str, name: str) -> bool:
        return self.run(*self._podman, "push", "--tls-verify=false", source, f"docker://{name}")


class Docker(Client):
    def __init__(self, home: Path) -> None:
        require("docker", "dockerd", "unshare")
        super().__init__(home)
        directory = home / "dockerd"
        directory.mkdir()
        socket = self.host = f"unix://{directory}/docker.sock"
        (directory / "daemon.json").write_text("{}")
        daemon = [
            *("unshare", "--mount"),  # its mounts end with it
            *("dockerd", f"--config-file={directory}/daemon.json", f"--host={socket}"),
            *(f"--data-root={directory}/data", f"--exec-root={directory}/run"),
            *(f"--pidfile={directory}/dockerd.pid", "--storage-driver=vfs"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
        ]
        self._process = Process(daemon, environment(home), ready="API listen on")
        self._docker = ("docker", "--host", socket)

    def login(self, address: str, password: str) -> bool:
        return self.run(*self._docker, "login", "-u", USER, "-p", password, address)

    def logout(self, address: str) -> bool:
        return self.run(*self._docker, "logout", address)

    def pull(self, name: str) -> bool:
        return self.run(*self._docker, "pull", "--quiet", "--platform=linux/amd64", name)

    def push(self, source: str, name: str) -> bool:
        return self.run(*self._docker, "tag", source, name) and self.run(*self._docker, "push", name)

    def stop(self) -> None:
        self._process.stop()


@pytest.fixture(params=["skopeo", "podman", "docker"])
def client(request: pytest.FixtureRequest, home: Path) -> Iterator[Client]:
    if request.param != "docker":
        yield {"skopeo": Skopeo, "podman": Podman}[request.param](home)
        return
    docker = Docker(home)
    yield docker
    docker.stop()


def pulls_pushes_and_pulls(address: str, client: Any, name: str, source: str, public: bool = True) -> None:
    """What is for everybody without a login, if it is `public`; then what is not, with one.

    `address` is where it logs in, `source` what is pushed as `name`.
    """
    assert client.pull(source) == public
    assert not client.push(source, name)
    assert not client.login(address, "wrong")
    assert client.login(address, PASSWORD)
    assert client.pull(source)  # with credentials, which are not looked at
    assert client.push(source, name)
    assert client.pull(name)
    client.logout(address)
    assert not client.pull(name)


@pytest.fixture
def app(request: pytest.FixtureRequest) -> str:
    """The repository that a test pushes to, and no other one does."""
    return f"team/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"


def names(site: Site, app: str) -> tuple[str, str]:
    """Of what is pushed, and of what is pulled from a cache, at one address."""
    return f"{site.address}/local/{app}:1", f"{site.address}/docker.io/library/layers:1"


def test_by_a_password(start: Start, client: Client, app: str) -> None:
    site = start(ping="challenge")
    # docker pulls nothing after a Basic challenge that it cannot meet, whether it has to or not.
    pulls_pushes_and_pulls(site.address, client, *names(site, app), public=not isinstance(client, Docker))


def test_by_a_token(start: Start, client: Client, tokens: TokenServer, app: str) -> None:
    site = start(ping="challenge", **by_tokens(tokens))
    pulls_pushes_and_pulls(site.address, client, *names(site, app))
    scope = f"scope={quote(f'repository:local/{app}:pu', safe='')}"
    assert any(scope in each for each in tokens.asked)


def test_by_tokens_of_this_server(start: Start, client: Client, app: str) -> None:
    """Least rights: one token for what is pushed; and two repositories, where a blob is mounted."""
    site = start(ping="challenge", token_endpoint={})
    name, source = names(site, app)
    pulls_pushes_and_pulls(site.address, client, name, source)
    assert client.login(site.address, PASSWORD)
    assert client.pull(name)
    assert client.push(name, f"{site.address}/local/{app}-copy:1")
    assert client.pull(f"{site.address}/local/{app}-copy:1")
    # Where the namespace is left out, scopes have the names that the client knows.
    address = site.address.replace("127.0.0.1", "localhost")
    assert client.login(address, PASSWORD)
    assert client.push(source, f"{address}/{app}-short:1")
    assert client.pull(f"{site.address}/local/{app}-short:1")
    assert any(
        '"kind":"token"' in line and f'"reference":"repository:local/{app}:' in line for line in site.log
    )


def test_by_an_api_key(start: Start, client: Client, app: str) -> None:
    site = start(ping="challenge", token_endpoint={}, api_keys=True)
    name, source = names(site, app)
    key = made_key(site, app, f"repository:local/{app}:pull,push")
    assert not client.login(site.address, f"{key}x")
    assert client.login(site.address, key)
    assert client.pull(source)
    assert client.push(source, name)
    assert client.pull(name)
    assert not client.push(source, f"{site.address}/local/{app}-other:1")  # beyond its scope
    keys(site, "revoke", key_name(app))
    assert not client.push(source, name)
    assert not client.login(site.address, key)


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Issuer, Path]:
    """An issuer that is never asked, and the file that has its key."""
    issuer, path = Issuer(Clock(time.time())), tmp_path_factory.mktemp("issuer") / "jwks.json"
    path.write_text(json.dumps({"keys": [public(key, kid=kid) for kid, key in issuer.signing.items()]}))
    return issuer, path


@pytest.mark.parametrize("ways", [{}, {"token_endpoint": {}}], ids=["password", "exchanged"])
def test_by_the_token_of_a_job(
    start: Start, client: Client, issuer: tuple[Issuer, Path], ways: dict[str, Any], app: str
) -> None:
    trusted, path = issuer
    required = {"repository_owner": "acme"}
    oidc = {"issuer": trusted.url, "audience": AUDIENCE, "required_claims": required, "jwks_file": str(path)}
    site = start(ping="challenge", oidc={"ci": oidc}, **ways)
    name, source = names(site, app)
    assert not client.login(site.address, trusted.issue(repository_owner="somebody"))
    assert client.login(site.address, trusted.issue(exp=time.time() + 3600))
    assert client.pull(source)
    assert client.push(source, name)
    assert client.pull(name)
    assert any('"user":"ci:repo:acme/app:ref:refs/heads/main"' in line for line in site.log)


def key_name(app: str) -> str:
    return app.replace("/", "-")


def made_key(site: Site, app: str, scope: str) -> str:
    """An API key, which is named after the repository that it is for."""
    return str(json.loads(keys(site, "create", key_name(app), "--scope", scope, "--json"))["key"])


def keys(site: Site, *words: str) -> str:
    """What a command about API keys prints: it works on the directory beside the server."""
    command = [sys.executable, "-m", "proxy", "keys", *words, "--config", str(site.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("client", ["skopeo", "podman"], indirect=True)
def test_by_a_password_though_the_ping_goes_well(start: Start, client: Client, app: str) -> None:
    site = start()
    pulls_pushes_and_pulls(site.address, client, *names(site, app))


@pytest.mark.parametrize("client", ["docker"], indirect=True)
def test_docker_does_not_say_who_it_is_if_the_ping_goes_well(start: Start, client: Any, app: str) -> None:
    site = start()
    name, source = names(site, app)
    assert client.login(site.address, "whatever")  # nobody has looked at it
    assert client.pull(source)
    assert not client.push(source, name)


@pytest.mark.parametrize("proof", ["password", "token"])
def test_a_store_with_a_host_of_its_own(
    start: Start, client: Client, tokens: TokenServer, proof: str, app: str
) -> None:
    site = start(**by_tokens(tokens)) if proof == "token" else start()
    address = site.address.replace("127.0.0.1", "localhost")
    _, source = names(site, app)
    pulls_pushes_and_pulls(address, client, f"{address}/{app}:1", source)
    assert all(f"local/{app}" not in unquote(each) for each in tokens.asked)


def test_a_store_with_a_listener_of_its_own(start: Start, client: Client, app: str) -> None:
    site = start()
    _, source = names(site, app)
    pulls_pushes_and_pulls(site.store, client, f"{site.store}/{app}:1", source)


@pytest.mark.parametrize("client", ["docker"], indirect=True)
def test_a_login_at_the_listener_of_a_store_is_not_shown_to_the_mirror_beside_it(
    start: Start, client: Any, app: str
) -> None:
    site = start()
    name, source = names(site, app)
    assert client.login(site.store, PASSWORD)
    assert client.pull(source)
    assert not client.push(source, name)  # by the mirror, which has not asked who it is
    assert client.push(source, f"{site.store}/{app}:1")


@pytest.mark.parametrize("client", ["docker"], indirect=True)
def test_docker_shows_where_to_push_instead(start: Start, client: Any, app: str) -> None:
    site = start()
    _, source = names(site, app)
    assert client.pull(source)
    for name, cause in (
        (f"{site.address}/{app}:1", f"{app} belongs to docker.io, a cache, which takes no pushes"),
        (f"{site.address}/quay.example/{app}:1", f"quay.example/{app} belongs to quay.example, a cache"),
        (f"{site.address}/gone.example/{app}:1", "'gone.example' is not a configured namespace"),
    ):
        assert not client.push(source, name)
        assert cause in client.said
        assert f"push to {site.store}/{app}" in client.said
