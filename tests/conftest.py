"""What all tests share: a site of upstream and server, and the check that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import aiohttp
import hypothesis
import pytest
import structlog
from structlog.testing import LogCapture

from proxy.access import records as access_records
from proxy.cache import fills, parts, rest, tags
from proxy.config import loader
from proxy.config.schema import Config
from proxy.server.housekeeping import Housekeeper
from proxy.server.process import ServerProcess
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import Tracer
from proxy.upstream import client, transport
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials, Inline
from proxy.upstream.requests import UpstreamSettings
from storage import patient
from tests import preloaded
from tests.authority import Authority
from tests.order import spread
from tests.pools import is_kept_open
from tests.postgres import PostgresServer
from tests.running import keep_failures, keep_memory
from tests.running import pytest_timeout_cancel_timer as pytest_timeout_cancel_timer
from tests.running import pytest_timeout_set_timer as pytest_timeout_set_timer
from tests.seaweed import Seaweed, seaweed_server
from tests.upstream import Basic, Upstream
from tests.upstream_client import PLAIN, Ask

if TYPE_CHECKING:
    from tests.issuer import Issuer

# A deadline would be a timed test.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=50)  # in place of 100
hypothesis.settings.load_profile("untimed")

# Everybody may do all: for tests of what is done.
OPEN: dict[str, Any] = {"rules": [{"who": ["anonymous"], "may": ["pull", "push", "delete"]}]}


QUICK = "not clients"  # the marks of a run that leaves out what takes long
MARKED = ("clients", "browser")  # directories whose conftest.py marks all tests `clients`
ALL_MARKED = re.compile(rb"^pytestmark = \[?\s*pytest\.mark\.clients\b", re.M)  # in a module of tests
DESCRIPTORS = "/proc/self/fd"
MEMORY = Path("/dev/shm")  # Linux: a file system in memory
ROOM = 8 << 30  # bytes; a run takes some GiB, most of them for the storages of podman and dockerd


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Put the directories of tests into memory if there is room: thousands of them wait for a disk."""
    if MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, _available()) >= ROOM:
        for name in ("PYTEST_DEBUG_TEMPROOT", "TMPDIR"):  # of tests, and of what has to be short: sockets
            os.environ.setdefault(name, str(MEMORY))
        tempfile.tempdir = None  # it may be known already
    keep_failures(config)
    keep_memory(config)
    preloaded.install()
    if config.getoption("markexpr") == QUICK:
        hypothesis.settings.load_profile("quick")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let the garbage collector ignore what is collected here: it stays to the end, a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)  # the objects of a server, most of which go with their test
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let it ignore what a module of tests leaves for good: modules, reports, what is cached."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A test with a database has a real server."""
    if "postgres_server" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.clients)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name long bytes by their parameter: what is compressed differs between processes, by the time in it."""
    return argname if isinstance(val, bytes) and len(val) > 20 else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing whose tests are all left out."""
    if config.getoption("markexpr") != QUICK:
        return None
    if collection_path.is_dir():
        left_out = collection_path.parent == Path(__file__).parent and collection_path.name in MARKED
    else:
        left_out = ALL_MARKED.search(collection_path.read_bytes()) is not None
    return left_out or None


def _available() -> int:
    """The memory that can be had, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = spread(items, getattr(config, "workerinput", {}).get("workercount", 1))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For --numprocesses=auto: as many as cores, and one more, since tests wait; real clients wait longer."""
    more = 1 if config.getoption("markexpr") == QUICK else 2
    return (os.cpu_count() or 1) + more


Serve = Callable[..., Awaitable["Site"]]


class Clock:
    """Time that passes only when a test says so; seconds since the epoch."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Site:
    """A server under test with a client's session to it."""

    def __init__(
        self, app: ServerProcess, session: aiohttp.ClientSession, directory: Path, clock: Clock
    ) -> None:
        self.app = app
        self.session = session
        self.directory = directory
        self.clock = clock

    @property
    def url(self) -> str:
        return str(self.app.url.origin())

    def request(self, method: str, path: str, **options: Any) -> Any:
        """As aiohttp's; `path` starts with a slash, no redirect is followed."""
        return self.session.request(method, self.url + path, allow_redirects=False, **options)

    async def get(self, path: str, **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and body of a GET; names in `headers` have _ for -."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.request("GET", path, headers=given) as response:
            return response.status, response.headers, await response.read()

    @property
    def partial(self) -> list[str]:
        return [path.name for path in (self.directory / "cache" / "partial").iterdir()]

    async def metrics(self) -> str:
        assert self.app.admin_url is not None
        async with self.session.get(self.app.admin_url / "metrics") as response:
            return await response.text()


@pytest.fixture
def clock() -> Clock:
    return Clock()


BACKOFF = transport.BACKOFF  # as it is where nobody is in a hurry


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """Whether a machine is quick or slow decides no test: one about it says for how long to wait.

    And an upstream is asked again without a rest: a test about the rest says how long it is.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tags, "PATIENCE", None)
        patched.setattr(parts, "MEASURED", math.inf)
        patched.setattr(rest, "STALL", 30.0)
        patched.setattr(patient, "PATIENCE", None)
        patched.setattr(access_records, "PATIENCE", None)
        patched.setattr(transport, "BACKOFF", 0.0)
        patched.setattr(fills, "BACKOFF", 0.0)
        yield


@pytest.fixture(autouse=True)
def no_housekeeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The housekeeper of a server in this process does nothing, unless a test is marked `housekeeping`.

    At each start it looks through the store, which takes longer than most tests.
    """
    if request.node.get_closest_marker("housekeeping") is None:
        monkeypatch.setattr(Housekeeper, "run", _idle)


async def _idle(housekeeper: Housekeeper) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as registry:
        yield registry


@pytest.fixture
async def issuer(clock: Clock) -> AsyncIterator[Issuer]:
    from tests.issuer import Issuer  # which imports this module

    issuer = Issuer(clock)
    await issuer.start()
    yield issuer
    await issuer.stop()


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`tls` of a configuration."""
    return Authority(tmp_path_factory.mktemp("identity")).issue("server")


@pytest.fixture
async def serve(tmp_path: Path, clock: Clock) -> AsyncIterator[Serve]:
    """Start a server: `await serve(upstream, key=value…)`, the keys being those of namespace docker.io.

    `top` are keys of the configuration's top level, `options` of the upstream, `more` further namespaces.
    Where there are stores, everybody may push to them unless `top` has an `access`.  The admin listener has
    no pages, which are a fifth of a start: tests of them set `admin_ui`.
    """
    sites: list[Site] = []

    async def start(
        upstream: Upstream | str,
        *,
        directory: Path | None = None,
        top: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        **keys: Any,
    ) -> Site:
        url = upstream if isinstance(upstream, str) else upstream.url
        directory = directory or tmp_path / "disk"
        app = ServerProcess(
            configuration(
                tmp_path,
                {
                    "listen": "127.0.0.1:0",
                    "admin": "127.0.0.1:0",
                    "admin_ui": "off",
                    "drain": "1s",
                    "disk": {"path": str(directory)},
                    "namespaces": {
                        "docker.io": {
                            "upstream": {
                                "url": url,
                                "connect_timeout": "2s",
                                "header_timeout": "2s",
                                "progress_timeout": "2s",
                                **(options or {}),
                            },
                            "revalidate_timeout": "1h",
                            **keys,
                        },
                        **(more or {}),
                    },
                    **({"access": OPEN} if any("store" in each for each in (more or {}).values()) else {}),
                    **(top or {}),
                },
            ),
            clock,
            tracer=tracer,
        )
        await app.start()
        # Bodies are compared to the byte: the client must not decode or hide anything.
        # And who it is that answers, is a matter of test_tls.py.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=False),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=30),
        )
        site = Site(app, session, directory, clock)
        sites.append(site)
        return site

    yield start
    for site in sites:
        await site.session.close()
        await site.app.stop()


def configuration(directory: Path, tree: dict[str, Any]) -> Config:
    path = directory / "entrepot.yml"
    path.write_text(json.dumps(tree, sort_keys=True))  # which is YAML too, and faster to write and to read
    with patch.object(loader, "read_file", lambda path: json.loads(path.read_text())):
        return loader.load(path, {})


@pytest.fixture(autouse=True)
def events(request: pytest.FixtureRequest) -> Iterator[LogCapture]:
    """All events of a test.  An `error` event fails it, unless it is marked `errors("noun.verb")`."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.format_exc_info, capture],
        wrapper_class=structlog.BoundLogger,
        cache_logger_on_first_use=False,
    )
    yield capture
    structlog.configure(**before)
    marker = request.node.get_closest_marker("errors")
    allowed = marker.args if marker else ()
    errors = [each for each in capture.entries if each["log_level"] in ("error", "critical")]
    unexpected = [each for each in errors if each["event"] not in allowed]
    assert not unexpected, f"error events that the test did not ask for: {unexpected}"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A server of buckets for all tests, in which each has a prefix of its own."""
    with seaweed_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server for all tests of this process.  A test that kills it starts it again."""
    server = PostgresServer()
    server.start()
    yield server
    server.stop()
    server.remove()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No task and no descriptor outlives a test, and no partial file but those it says it leaves.

    A test that means to leave partial files removes them, having looked at them.  A test that needs no loop
    and no directory gets none: thousands need neither, and both take longer than many of them.
    """
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("no_task_left")
    directory = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    before = _descriptors()
    yield
    # In a third of the time that Path.glob() takes.
    inside = os.walk(directory) if directory else ()
    left = [f"{at}/{each}" for at, *_ in inside if at.endswith("/partial") for each in os.listdir(at)]  # noqa: PTH208
    assert not left, f"partial files left: {left}"
    more = _opened(_descriptors() - before)
    assert not more, f"descriptors left: {more}"


@pytest.fixture
def no_task_left(_function_scoped_runner: asyncio.Runner) -> Iterator[None]:
    # By the fixture of pytest-asyncio: one more that is asynchronous takes 0.3 ms.
    yield
    loop = _function_scoped_runner.get_loop()
    if asyncio.all_tasks(loop):
        _function_scoped_runner.run(asyncio.sleep(0))  # one that a test left to the loop to end
    tasks = asyncio.all_tasks(loop)
    # For this, asyncio starts one more thread.
    if (threads := getattr(loop, "_default_executor", None)) is not None:
        threads.shutdown()
        vars(loop)["_default_executor"] = None
    assert not tasks, f"tasks left: {tasks}"


def _descriptors() -> set[str]:
    names = {*os.listdir(DESCRIPTORS)}  # noqa: PTH208 - twice for each test: Path takes three times as long
    free = os.dup(0)  # the lowest, which listdir() had itself
    os.close(free)
    return names - {str(free)}


def _opened(names: set[str]) -> set[str]:
    """What of these descriptors a test has left open."""
    found = set()
    for name in names:
        try:
            target = os.readlink(f"{DESCRIPTORS}/{name}")  # noqa: PTH115
        except FileNotFoundError:
            continue
        # SQLite's are the executor threads', and close with them.
        if target.startswith(("socket:", "/")) and "/records" not in target:
            found.add(f"{name} -> {target}")
    return {each for each in found if not is_kept_open(each)}


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """A client of `url`."""
    async with AsyncExitStack() as stack:

        def to(
            url: str, connect: Connect = PLAIN, user: Basic | None = None, realms: Sequence[str] = ()
        ) -> client.UpstreamRegistry:
            credentials = Inline(user.user, user.password) if user else Credentials()
            made = client.UpstreamRegistry(
                "up", UpstreamSettings(url, connect, tuple(realms)), [credentials], Metrics()
            )
            stack.push_async_callback(made.close)
            return made

        yield to
