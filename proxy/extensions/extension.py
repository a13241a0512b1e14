"""Extensions as the parts of the server call them, and all that a process has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
import structlog

from proxy.config.extensions import ExtensionConfig, ExtensionKind
from proxy.extensions.isolation import ExtensionFault, ExtensionLate
from proxy.extensions.loader import MadeExtension, make
from proxy.telemetry.metrics import Metrics
from storage.concurrency import run_in_thread
from storage.errors import RegistryError, Unavailable

log = structlog.get_logger()
T = TypeVar("T")

LOGGED = 60.0  # seconds between two events about one extension
FAILING = 300.0  # seconds after its last failure in which an extension counts as failing
AGAIN = 1.0  # seconds after which a client may try again
CLOSED = 2.0  # seconds that an extension has to end


class ExtensionFailed(Unavailable):
    """An extension failed where it was needed."""


class ExtensionState(msgspec.Struct, frozen=True, kw_only=True):
    """How an extension does in a process.  `error` is its last failure, None if it works."""

    name: str
    calls: int = 0
    failures: int = 0
    failing_since: float | None = None
    error: str | None = None


class Extension:
    """One extension of the configuration.  It fails by ExtensionFailed alone."""

    def __init__(
        self,
        name: str,
        config: ExtensionConfig,
        made: MadeExtension,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.name, self.kind = name, config.kind
        self.installed = made.installed
        self._made, self._isolation = made.made, made.isolation
        self._timeout = config.timeout
        self._counts = metrics.extension_calls
        self._clock = clock
        self._calls = self._failures = self._unlogged = 0
        self._failing_since: float | None = None
        self._failed_at = 0.0
        self._error = ""
        self._logged_at = -LOGGED
        self._told = False  # a failure was logged that is not over

    async def call(
        self,
        method: str,
        *arguments: Any,
        gives: type[T] | tuple[type[T], ...],
        excused: Callable[[], RegistryError | None] = lambda: None,
        more: float = 0.0,
    ) -> T:
        """The result of a method, which must be an instance of `gives`.

        If it fails for an error of the server itself, which is then `excused`, that is raised.  It may take
        `more` seconds than others.
        """
        return await self.attend(self.bound(method, *arguments), gives, excused, more)

    def bound(self, method: str, *arguments: Any) -> Callable[[], Awaitable[Any]]:
        """A function that calls a method, for its thread."""
        return lambda: getattr(self._made, method)(*arguments)

    async def attend(
        self,
        work: Callable[[], Awaitable[Any]],
        gives: type[T] | tuple[type[T], ...],
        excused: Callable[[], RegistryError | None] = lambda: None,
        more: float = 0.0,
    ) -> T:
        """As call(), of a function that calls the extension in its thread."""
        try:
            result = await self._isolation.call(work, self._timeout + more)
        except ExtensionFault as error:
            if (cause := excused()) is not None:
                raise cause from None
            raise self._failed(error) from None
        return self._checked(result, gives)

    def release(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Have it release something; whether it does is not waited for."""
        self._isolation.begin(work)

    def call_blocking(self, work: Callable[[], Awaitable[Any]], gives: type[T] | tuple[type[T], ...]) -> T:
        """As attend(), for a thread that may block."""
        try:
            result = self._isolation.run(work, self._timeout)
        except ExtensionFault as error:
            raise self._failed(error) from None
        return self._checked(result, gives)

    def wrong(self, what: str) -> ExtensionFailed:
        """Count a result that is not what it should be; returns the error to raise."""
        self._calls -= 1
        return self._failed(ExtensionFault(what), "wrong")

    def _checked(self, result: Any, gives: type[T] | tuple[type[T], ...]) -> T:
        if not isinstance(result, gives):
            wanted = gives if isinstance(gives, tuple) else (gives,)
            names = " or ".join("None" if each is type(None) else each.__name__ for each in wanted)
            raise self._failed(ExtensionFault(f"returned {type(result).__name__}, not {names}"), "wrong")
        self._calls += 1
        self._counts.labels(self.name, "done").inc()
        if self._failing_since is not None:
            self._worked()
        return result

    def _worked(self) -> None:
        since, self._failing_since = self._failing_since, None
        if self._told:
            self._told = False
            seconds = round(self._clock() - (since or 0.0), 3)
            log.info("extension.recovered", extension=self.name, kind=self.kind, seconds=seconds)

    def _failed(self, error: ExtensionFault, result: str = "") -> ExtensionFailed:
        now = self._clock()
        self._calls += 1
        self._failures += 1
        self._unlogged += 1
        self._counts.labels(
            self.name, result or ("late" if isinstance(error, ExtensionLate) else "failed")
        ).inc()
        if self._failing_since is None:
            self._failing_since = now
        self._failed_at, self._error = now, str(error)
        if not 0 <= now - self._logged_at < LOGGED:
            log.error(
                "extension.failed", extension=self.name, kind=self.kind, package=str(self.installed),
                error=self._error, times=self._unlogged,
            )  # fmt: skip
            self._logged_at, self._unlogged, self._told = now, 0, True
        public = f"the extension {self.name} of this server failed"
        return ExtensionFailed(f"extension {self.name} {error}", retry_after=AGAIN, public=public)

    def state(self) -> ExtensionState:
        failing = self._failing_since is not None and 0 <= self._clock() - self._failed_at < FAILING
        return ExtensionState(
            name=self.name,
            calls=self._calls,
            failures=self._failures,
            failing_since=self._failing_since if failing else None,
            error=self._error if failing else None,
        )

    async def close(self) -> None:
        """Let it close itself, and end its thread; without waiting for one that hangs."""
        close = getattr(self._made, "close", None)
        if close is not None:
            try:
                await self._isolation.call(close, CLOSED)
            except ExtensionFault as error:
                log.warning("extension.not_closed", extension=self.name, error=str(error))
        thread = self._isolation.close()
        await run_in_thread(thread.join, CLOSED)

    def abandon(self) -> None:
        """End its thread, if the start fails."""
        self._isolation.close()


class Extensions:
    """The extensions of a process, each made when load() names its kind."""

    def __init__(
        self,
        configured: Mapping[str, ExtensionConfig],
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._configured = configured
        self._metrics = metrics
        self._clock = clock
        self._loaded: dict[str, Extension] = {}

    def load(self, *kinds: ExtensionKind) -> list[Extension]:
        """Make all of these kinds, in the order of the configuration.  Raises StartError."""
        return [self.make(name) for name, config in self._configured.items() if config.kind in kinds]

    def make(self, name: str) -> Extension:
        """Make one, unless it is made already.  Raises StartError."""
        if name not in self._loaded:
            config = self._configured[name]
            made, self._metrics = make(name, config), self._metrics or Metrics()
            self._loaded[name] = Extension(name, config, made, self._metrics, self._clock)
        return self._loaded[name]

    def get(self, name: str) -> Extension:
        """One that was made.  Raises LookupError."""
        return self._loaded[name]

    def states(self) -> list[ExtensionState]:
        return [each.state() for each in self._loaded.values()]

    async def close(self) -> None:
        """Close all at once: the server waits for those that hang together, not one after the other."""
        await asyncio.gather(*(each.close() for each in self._loaded.values()))
        self._loaded.clear()

    def abandon(self) -> None:
        for each in self._loaded.values():
            each.abandon()


def worst(states: Iterable[ExtensionState]) -> dict[str, ExtensionState]:
    """Of each extension, how it does in all processes together: failing where it fails in one."""
    found: dict[str, ExtensionState] = {}
    for each in states:
        known = found.get(each.name)
        if known is not None:
            failing = [one for one in (known, each) if one.failing_since is not None]
            first = min(failing, key=lambda one: one.failing_since or 0.0, default=each)
            each = msgspec.structs.replace(
                first, calls=known.calls + each.calls, failures=known.failures + each.failures
            )
        found[each.name] = each
    return found
