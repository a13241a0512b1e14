"""Extensions: how they are found and made, and that nothing they do reaches the server."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.config.errors import StartError
from proxy.config.extensions import ExtensionConfig, HiddenSettings
from proxy.extensions import loader
from proxy.extensions.extension import FAILING, LOGGED, ExtensionFailed, Extensions, ExtensionState, worst
from proxy.extensions.isolation import ExtensionLate, Isolation
from proxy.extensions.kinds import GROUPS
from proxy.extensions.protocols import (
    ConditionResult,
    HostLogin,
    OfferedBlob,
    OfferedManifest,
    OfferedObject,
    RequestRefusal,
)
from proxy.telemetry.metrics import Metrics
from tests.conftest import Clock
from tests.extensions import (
    MISBEHAVIOURS,
    PATIENCE,
    RELEASE,
    Behaviour,
    Misbehaving,
    Package,
    package,  # noqa: F401
    released,  # noqa: F401
)

HERE = "tests.test_extensions"
OF = "one of others-package 1.2: "


class Logins(Misbehaving):
    async def get(self, host: str, repository: str) -> Any:
        return await self.act(HostLogin("user", "secret"), host, repository)


def configured(
    use: str = "one", timeout: float = 20.0, kind: Any = "credential_provider", **settings: Any
) -> ExtensionConfig:
    return ExtensionConfig(kind=kind, use=use, timeout=timeout, settings=HiddenSettings(settings))


def make(config: ExtensionConfig, metrics: Metrics | None = None, clock: Clock | None = None) -> Extensions:
    made = Extensions({"mine": config}, metrics, clock or Clock())
    made.make("mine")
    return made


# Finding and making


@dataclass
class Keys:
    address: str
    many: int = 1
    names: tuple[str, ...] = ()
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.many > 9:
            raise ValueError("many must be below 10")


class Keyed(Logins):
    Settings = Keys  # type: ignore[assignment]

    def __init__(self, settings: Keys) -> None:
        if settings.address == "taken":
            raise ValueError("address is taken")
        if settings.address == "odd":
            raise RuntimeError("cannot be made")
        if settings.address == "exit":
            raise SystemExit(2)
        super().__init__(Behaviour())
        self.keys = settings


class Plain:
    protocol = 1

    async def get(self, host: str, repository: str) -> None:
        return None


class Struct(msgspec.Struct, rename="kebab"):
    two_words: int = 0


class Kebab(Keyed):
    Settings = Struct  # type: ignore[assignment]

    def __init__(self, settings: Struct) -> None:
        super().__init__(Keys(str(settings.two_words)))


class Unversioned:
    async def get(self, host: str, repository: str) -> None: ...


class FromTheFuture(Plain):
    protocol = 2


class Lacking:
    protocol = 1


class Synchronous:
    protocol = 1

    def get(self, host: str, repository: str) -> None: ...


class OddSettings(Plain):
    Settings = 5


CONSTANT = 5


async def test_one_is_made_of_its_settings(package: Package) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Keyed")
    extensions = make(configured(address="here", many="3", names=["a"], file="/a"))
    assert Keyed.made[-1].keys == Keys("here", 3, ("a",), Path("/a"))  # type: ignore[attr-defined]
    found = extensions.get("mine")
    assert str(found.installed) == "one of others-package 1.2"
    assert await found.call("get", "host", "", gives=HostLogin) == HostLogin("user", "secret")
    await extensions.close()


async def test_settings_may_be_a_struct(package: Package) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Kebab")
    extensions = make(configured(**{"two-words": 4}))
    assert Kebab.made[-1].keys.address == "4"  # type: ignore[attr-defined]
    await extensions.close()
    with pytest.raises(StartError, match=r"settings\.two_words: .*: unknown key; did you mean two-words"):
        make(configured(two_words=4))


@pytest.mark.parametrize(
    ("value", "settings", "says"),
    [
        ("nowhere:Class", {}, f"mine: {OF}raised ModuleNotFoundError"),
        (f"{HERE}:Nothing", {}, "raised AttributeError"),
        ("exits_at_import:Class", {}, "raised SystemExit: 7"),
        (f"{HERE}:CONSTANT", {}, "does not say which version of the protocol it keeps"),
        (f"{HERE}:Unversioned", {}, "does not say which version of the protocol"),
        (f"{HERE}:FromTheFuture", {}, "keeps version 2 of the protocol, and this server knows 1"),
        (f"{HERE}:Lacking", {}, "Lacking has no method get, which each credential_provider has"),
        (f"{HERE}:Synchronous", {}, "Synchronous.get is not an async method"),
        (f"{HERE}:OddSettings", {}, "Settings is neither a dataclass nor a msgspec.Struct"),
        (f"{HERE}:Plain", {"a": 1}, f".settings.a: {OF}unknown key: it has"),
        (f"{HERE}:Keyed", {}, f".settings.address: {OF}is required"),
        (f"{HERE}:Keyed", {"adress": "x"}, f".settings.adress: {OF}unknown key; did"),
        (f"{HERE}:Keyed", {"address": "x", "many": "y"}, f".settings.many: {OF}Expected `int`"),
        (f"{HERE}:Keyed", {"address": "x", "names": [1]}, f".settings.names[0]: {OF}Expected"),
        (f"{HERE}:Keyed", {"address": "x", "many": 10}, f"settings: {OF}many must be"),
        (f"{HERE}:Keyed", {"address": "taken"}, f"settings: {OF}address is taken"),
        (f"{HERE}:Keyed", {"address": "odd"}, f"mine: {OF}raised RuntimeError"),
        (f"{HERE}:Keyed", {"address": "exit"}, f"mine: {OF}raised SystemExit: 2"),
    ],
)  # fmt: skip
def test_a_broken_one_is_named(
    package: Package,  # noqa: F811
    tmp_path: Path,
    value: str,
    settings: dict[str, Any],
    says: str,
) -> None:
    (tmp_path / "packages" / "exits_at_import.py").write_text("raise SystemExit(7)")
    package.offer("credential_provider", "one", value)
    with pytest.raises(StartError) as refused:
        make(configured(**settings))
    assert says in str(refused.value)
    assert str(refused.value).startswith("extensions.mine")
    assert not [each for each in threading.enumerate() if each.name == "extension mine"]


class Slow(Plain):
    def __init__(self) -> None:
        RELEASE.wait(PATIENCE)


def test_one_that_hangs_when_it_is_made_is_named(
    package: Package,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "START", 0.05)
    package.offer("credential_provider", "one", f"{HERE}:Slow")
    with pytest.raises(
        StartError, match=r"extensions\.mine: one of others-package 1\.2: did not return within"
    ):
        make(configured())
    RELEASE.set()
    for each in threading.enumerate():
        if each.name == "extension mine":
            each.join()


def test_one_that_is_not_installed(package: Package) -> None:  # noqa: F811
    with pytest.raises(
        StartError, match=r"extensions\.mine: no installed package offers one in entrepot\.cred"
    ):
        make(configured())
    package.offer("credential_provider", "ones", f"{HERE}:Plain")
    package.offer("event_sink", "one", f"{HERE}:Plain", "another", "3")
    with pytest.raises(
        StartError, match=r"offers one in entrepot\.credential_providers; did you mean ones.*install it"
    ):
        make(configured())


def test_two_packages_of_one_name(package: Package) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Plain")
    package.offer("credential_provider", "one", f"{HERE}:Plain", "another", "3")
    with pytest.raises(StartError, match=r"another and others-package both offer one in .*: uninstall one"):
        make(configured())


def test_what_is_installed(package: Package) -> None:  # noqa: F811
    before = len(loader.installed())
    for kind in GROUPS:
        package.offer(kind, "one", f"{HERE}:Plain", f"a-{kind.replace('_', '-')}")
    found = [each for each in loader.installed() if each.package.startswith("a-")]
    assert [each.kind for each in found] == list(GROUPS)
    assert len(loader.installed()) == before + len(GROUPS)
    assert {str(each) for each in found} == {f"one of a-{kind.replace('_', '-')} 1.2" for kind in GROUPS}


# Calls


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", [*MISBEHAVIOURS, "return something else"])
async def test_nothing_that_it_does_is_more_than_a_failure(
    package: Package,  # noqa: F811
    events: LogCapture,
    how: str,
) -> None:
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    metrics, clock = Metrics(), Clock()
    late = MISBEHAVIOURS.get(how, (None, ""))[1].startswith("did not return")
    extensions = make(configured(how=how, times=1, timeout=0.05 if late else 20.0), metrics, clock)
    found = extensions.get("mine")
    words = MISBEHAVIOURS[how][1] if how in MISBEHAVIOURS else "returned object, not HostLogin"
    with pytest.raises(ExtensionFailed, match=f"^extension mine {words}") as failed:
        await found.call("get", "host", "", gives=HostLogin)
    assert failed.value.public == "the extension mine of this server failed"
    assert failed.value.retry_after
    state = found.state()
    assert (state.calls, state.failures, state.failing_since) == (1, 1, clock())
    assert words in str(state.error)
    result = "late" if late else "failed" if how in MISBEHAVIOURS else "wrong"
    assert f'result="{result}"}} 1.0' in metrics.exposition()[0].decode()
    (event,) = [each for each in events.entries if each["event"] == "extension.failed"]
    assert event["package"] == "one of others-package 1.2"
    RELEASE.set()
    assert await settled(found) == HostLogin("user", "secret")
    assert found.state().failing_since is None
    assert [each["event"] for each in events.entries][-1] == "extension.recovered"
    await extensions.close()


async def settled(found: Any) -> Any:
    """The result of a call, once the thread is free: what blocked it has been released."""
    while True:
        try:
            return await found.call("get", "host", "", gives=HostLogin)
        except ExtensionFailed as error:
            assert "holds its thread" in str(error) or "did not return" in str(error)
            await asyncio.sleep(0)


async def test_while_its_thread_is_blocked_calls_fail_at_once() -> None:
    isolation, blocked, calls = Isolation("x"), threading.Event(), 0

    async def block() -> None:
        blocked.set()
        RELEASE.wait(PATIENCE)

    async def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    blocking = asyncio.ensure_future(isolation.call(block, PATIENCE))
    assert await asyncio.to_thread(blocked.wait, PATIENCE)
    with pytest.raises(ExtensionLate, match=r"did not return within 0\.01 s"):
        await isolation.call(count, 0.01)
    for _ in range(100):
        with pytest.raises(ExtensionLate, match=r"holds its thread since [0-9]+ s, in an earlier call"):
            await isolation.call(count, PATIENCE)
    RELEASE.set()
    await blocking
    while True:  # until the thread has seen that it is free
        with suppress(ExtensionLate):
            assert await isolation.call(count, PATIENCE) == 1  # the one that was late was never begun
            break
    await asyncio.to_thread(isolation.close().join)


@pytest.mark.errors("extension.failed")
async def test_other_calls_of_it_and_the_loop_of_the_server_go_on(package: Package) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    extensions = make(configured(how="hang", times=1))
    found = extensions.get("mine")
    hanging = asyncio.ensure_future(found.call("get", "first", "", gives=HostLogin))
    assert await asyncio.to_thread(Logins.made[-1].called.wait, PATIENCE)
    assert await found.call("get", "second", "", gives=HostLogin)
    assert not hanging.done()
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    assert hanging.cancelled()
    await extensions.close()


@pytest.mark.errors("extension.failed")
async def test_failures_are_logged_now_and_then(package: Package, events: LogCapture) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    clock = Clock()
    extensions = make(configured(how="raise"), clock=clock)
    found = extensions.get("mine")

    async def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(ExtensionFailed):
                await found.call("get", "host", "", gives=HostLogin)

    await fail(5)
    clock.advance(LOGGED)
    await fail(2)
    logged = [each["times"] for each in events.entries if each["event"] == "extension.failed"]
    assert logged == [1, 5]
    begun = found.state().failing_since
    assert begun == clock() - LOGGED
    clock.advance(FAILING - 1)
    assert found.state().failing_since == begun
    clock.advance(1)
    assert found.state() == ExtensionState(name="mine", calls=7, failures=7)
    await extensions.close()


@pytest.mark.errors("extension.failed")
def test_calls_of_threads_that_may_block(package: Package) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    extensions = make(configured(how="exit", times=1))
    found, mine = extensions.get("mine"), Logins.made[-1]

    async def get() -> Any:
        return await mine.get("host", "")  # type: ignore[attr-defined]

    with pytest.raises(ExtensionFailed, match="raised SystemExit"):
        found.call_blocking(get, HostLogin)
    assert found.call_blocking(get, HostLogin) == HostLogin("user", "secret")
    asyncio.run(extensions.close())


class Closing(Plain):
    closed: ClassVar[list[str]] = []

    async def close(self) -> None:
        self.closed.append(threading.current_thread().name)


class BadlyClosing(Plain):
    async def close(self) -> None:
        raise SystemExit(1)


async def test_it_is_closed_in_its_thread(package: Package, events: LogCapture) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:Closing")
    package.offer("credential_provider", "two", f"{HERE}:BadlyClosing", "another")
    extensions = Extensions({"mine": configured(), "other": configured("two")})
    assert len(extensions.load("credential_provider")) == 2
    assert extensions.load("event_sink") == []
    await extensions.close()
    assert Closing.closed == ["extension mine"]
    (event,) = [each for each in events.entries if each["event"] == "extension.not_closed"]
    assert event["error"] == "raised SystemExit: 1"
    assert not [each for each in threading.enumerate() if each.name.startswith("extension ")]


class ClosingTogether(Plain):
    """Closes once two of its kind do."""

    both: ClassVar[threading.Barrier]

    async def close(self) -> None:
        await asyncio.to_thread(self.both.wait, PATIENCE)


async def test_all_are_closed_at_once(package: Package, events: LogCapture) -> None:  # noqa: F811
    package.offer("credential_provider", "one", f"{HERE}:ClosingTogether")
    ClosingTogether.both = threading.Barrier(2)
    extensions = Extensions({"mine": configured(), "other": configured()})
    extensions.load("credential_provider")
    await extensions.close()
    assert [each for each in events.entries if each["event"] == "extension.not_closed"] == []


async def test_a_call_after_the_end() -> None:
    isolation = Isolation("x")
    isolation.close().join()

    async def work() -> int:
        return 1

    with pytest.raises(Exception, match="it is closed"):
        await isolation.call(work, 1.0)


def test_the_worst_of_several_processes() -> None:
    ok = ExtensionState(name="a", calls=3)
    bad = ExtensionState(name="a", calls=2, failures=1, failing_since=9.0, error="b")
    worse = ExtensionState(name="a", calls=2, failures=2, failing_since=5.0, error="c")
    for states in ([ok, bad, worse], [worse, ok, bad], [bad, worse, ok]):
        assert worst(states) == {
            "a": ExtensionState(name="a", calls=7, failures=3, failing_since=5.0, error="c")
        }
    assert worst([ok, ExtensionState(name="b")]).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: HostLogin(5, "p"),  # type: ignore[arg-type]
        lambda: HostLogin("u", None),  # type: ignore[arg-type]
        lambda: HostLogin("u", "p", "soon"),  # type: ignore[arg-type]
        lambda: HostLogin("u", "p", -1.0),
        lambda: HostLogin("u", "p", math.nan),
        lambda: ConditionResult("yes", "is"),  # type: ignore[arg-type]
        lambda: ConditionResult(True, "is", math.nan),
        lambda: RequestRefusal("no", -1),
        lambda: RequestRefusal("no", math.inf),
        lambda: OfferedManifest("text", b""),
        lambda: OfferedManifest("a/b\r\nc: d", b""),
        lambda: OfferedManifest("a/b", "{}"),  # type: ignore[arg-type]
        lambda: OfferedBlob(-1, None),  # type: ignore[arg-type]
        lambda: OfferedObject(1, [b""]),  # type: ignore[arg-type]
    ],
)
def test_what_an_extension_cannot_return(make: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        make()


def test_what_is_valid_without_an_end() -> None:
    assert HostLogin("u", "p", math.inf).valid_for == ConditionResult(True, "is").valid_for


def test_a_login_shows_no_password() -> None:
    assert "secret" not in repr(HostLogin("user", "secret"))
