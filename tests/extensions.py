"""Extensions as packages offer them: metadata in a directory of the path, and classes that misbehave."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from proxy.extensions.kinds import GROUPS

RELEASE = threading.Event()  # set, it lets those go on that block their thread
PATIENCE = 20.0  # seconds; only what is never released takes them

Offer = Callable[..., None]


class Package:
    """Packages that offer what tests name; each is metadata alone, and leads to modules that are there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def offer(
        self, kind: str, name: str, value: str, package: str = "others-package", version: str = "1.2"
    ) -> None:
        info = self._directory / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[{GROUPS[kind].name}]\n{name} = {value}\n")  # type: ignore[index]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    directory = tmp_path / "packages"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)  # type: ignore[no-untyped-call]
    return Package(directory)


@pytest.fixture(autouse=True)
def released() -> Any:
    RELEASE.clear()
    yield
    RELEASE.set()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


async def _hang() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def _stubborn() -> None:
    """Hangs, and takes no cancellation."""
    while not RELEASE.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            continue


async def _cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def _orphan() -> None:
    """Starts a task that raises SystemExit, and does not wait for it to end."""

    async def leave() -> None:
        sys.exit(5)

    task = asyncio.ensure_future(leave())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    raise RuntimeError("after its task has ended")


def _raises(error: BaseException) -> Callable[[], Any]:
    async def work() -> NoReturn:
        raise error

    return work


async def _block() -> None:
    RELEASE.wait(PATIENCE)


# What code of extensions may do, and what the server says of it.
MISBEHAVIOURS: dict[str, tuple[Callable[[], Any], str]] = {
    "raise": (_raises(RuntimeError("no reason\nsecond line")), "raised RuntimeError: no reason"),
    "raise without a message": (_raises(KeyError()), "raised KeyError"),
    "raise what cannot be printed": (_raises(Unprintable()), "raised Unprintable"),
    "stop iteration": (_raises(StopAsyncIteration()), "raised StopAsyncIteration"),
    "exit": (_raises(SystemExit(4)), "raised SystemExit: 4"),
    "interrupt": (_raises(KeyboardInterrupt()), "raised KeyboardInterrupt"),
    "run out of memory": (_raises(MemoryError()), "raised MemoryError"),
    "cancel itself": (_cancelled, "raised CancelledError"),
    "leave a task that exits": (_orphan, "raised RuntimeError: after its task has ended"),
    "hang": (_hang, "did not return within"),
    "take no cancellation": (_stubborn, "did not return within"),
    "block its thread": (_block, "did not return within"),
}


@dataclass
class Behaviour:
    """`how` is one of MISBEHAVIOURS, or `well`; the next `times` calls do so, later ones do well."""

    how: str = "well"
    times: int = 1_000_000


class Misbehaving:
    """The base of extensions that do what their settings say; `good` is what a call returns otherwise."""

    protocol = 1
    Settings = Behaviour
    made: list[Misbehaving]

    def __init__(self, settings: Behaviour) -> None:
        self.behaviour = settings
        self.calls: list[tuple[Any, ...]] = []
        self.called = threading.Event()
        type(self).made.append(self)

    def __init_subclass__(cls) -> None:
        cls.made = []

    async def act(self, good: Any, *arguments: Any) -> Any:
        self.calls.append(arguments)
        self.called.set()
        if self.behaviour.times > 0 and self.behaviour.how != "well":
            self.behaviour.times -= 1
            if self.behaviour.how == "return something else":
                return object()
            return await MISBEHAVIOURS[self.behaviour.how][0]()
        return good
