"""The operations of an operator as requests that are sent elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from proxy.admin.operations import OPERATIONS, Operation, Operations

P = ParamSpec("P")
T = TypeVar("T")


def _sent(
    method: Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SentOperations, P], Coroutine[Any, Any, T]]:
    """A method of Operations as a method that sends it."""
    operation = OPERATIONS[method.__name__]

    async def send(sender: SentOperations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found: T = await sender.send(operation, operation.parameters(*args, **kwargs))
        return found

    return send


def _streamed(
    method: Callable[Concatenate[Operations, P], AsyncIterator[T]],
) -> Callable[Concatenate[SentOperations, P], AsyncIterator[T]]:
    """A method of Operations that gives one result after the other, as a method that sends it."""
    operation = OPERATIONS[method.__name__]

    def follow(sender: SentOperations, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return sender.follow(operation, operation.parameters(*args, **kwargs))

    return follow


class SentOperations:
    """The Operations, each of them by send(), or by follow() if it gives several results."""

    remote = True

    async def send(self, operation: Operation, parameters: msgspec.Struct) -> Any:
        """The result of one operation."""
        raise NotImplementedError

    def follow(self, operation: Operation, parameters: msgspec.Struct) -> AsyncIterator[Any]:
        """The results of one operation."""
        raise NotImplementedError

    repositories = _sent(Operations.repositories)
    images = _sent(Operations.images)
    find = _sent(Operations.find)
    show = _sent(Operations.show)
    history = _sent(Operations.history)
    diff = _sent(Operations.diff)
    stats = _sent(Operations.stats)
    fills = _sent(Operations.fills)
    watch = _streamed(Operations.watch)
    activity = _sent(Operations.activity)
    audit = _sent(Operations.audit)
    config = _sent(Operations.config)
    files = _sent(Operations.files)
    upstreams = _sent(Operations.upstreams)
    why = _sent(Operations.why)
    policy = _sent(Operations.policy)
    held = _sent(Operations.held)
    approve = _sent(Operations.approve)
    reject = _sent(Operations.reject)
    overrides = _sent(Operations.overrides)
    override = _sent(Operations.override)
    end_override = _sent(Operations.end_override)
    pulled = _sent(Operations.pulled)
    keys = _sent(Operations.keys)
    create_key = _sent(Operations.create_key)
    revoke_key = _sent(Operations.revoke_key)
    end_tokens = _sent(Operations.end_tokens)
    purge = _sent(Operations.purge)
    delete = _sent(Operations.delete)
    tag = _sent(Operations.tag)
    refresh = _sent(Operations.refresh)
    pins = _sent(Operations.pins)
    pin = _sent(Operations.pin)
    unpin = _sent(Operations.unpin)
    evict = _sent(Operations.evict)
    evictable = _sent(Operations.evictable)
    scrub = _sent(Operations.scrub)
    scrubbing = _sent(Operations.scrubbing)
    webhooks = _sent(Operations.webhooks)
    extensions = _sent(Operations.extensions)
    collect = _sent(Operations.collect)
    collected = _sent(Operations.collected)
    warm = _sent(Operations.warm)
    ready = _sent(Operations.ready)
    drill = _sent(Operations.drill)
    begin_drill = _sent(Operations.begin_drill)
    end_drill = _sent(Operations.end_drill)
    reload = _sent(Operations.reload)
