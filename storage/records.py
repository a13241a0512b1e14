"""The records of a store, whichever database holds them: small values by key.

Keys are strings (storage/keys.py) of at most 2,000 bytes, and values are bytes.  Keys are in the order of
their bytes in UTF-8, which is the order of their code points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")

BATCH = 500  # records written in one transaction, which may block all other writers
LAST = "\U0010ffff"  # sorts after every character that a key has


@runtime_checkable
class Batch(Protocol):
    """The records as a transaction sees and changes them."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        ...

    def count(self, prefix: str) -> int:
        """How many keys start with `prefix`; it takes 50 ms for a million of them."""
        ...

    def tags_at(self, repository: str, target: str) -> list[str]:
        """The keys of the repository's tags that point to `target`, in order.

        It takes as long as there are such tags, however many others there are.
        """
        ...


class Records(Protocol):
    """A database of records, which several processes may share.  Every method raises StorageFailed.

    A write that has returned is seen by every read that begins afterwards, in any process.

    remote: whether another server answers, so that a read has to run in a thread.  Otherwise it takes about
        10 µs, and may run on the event loop.  A write always has to run in a thread.
    """

    remote: bool

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        ...

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        """Run `work` in a transaction and return its result.

        Either all of its changes are stored or, if it raises, none.  `work` may run several times; so it must
        change nothing but its batch.  What its thread reads meanwhile from the records themselves belongs to
        the transaction.

        No other process writes in the meantime: so `work` may remove a file because no record names it.  A
        transaction that may be `shared` runs beside others that may: the result is as if one of them had run
        after the other, and none of them runs beside one that is not shared.
        """
        ...

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        """The records whose keys start with `prefix` and are greater than `prefix + after`, in order.

        A record that is put or deleted meanwhile may be among them or not.
        """
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with `prefix`, in order; also those of records that can no longer be read."""
        ...

    def holds(self, key: str) -> bool:
        """Whether there is such a record, even if it can no longer be read."""
        ...

    def first(self, prefix: str, after: str = "") -> str | None:
        """The first key of scan()."""
        ...

    def groups(self, prefix: str, after: str = "") -> Iterator[str]:
        """The distinct fields that follow `prefix` in keys, in order; those greater than `after`.

        Each needs one look-up in an index, however many keys have the same field.
        """
        ...

    def linking(self, digest: str) -> list[str]:
        """The keys of the links to a blob, in order.

        It takes as long as there are such links, however many others there are.
        """
        ...

    def oldest(self, after: tuple[str, bytes], limit: int) -> list[tuple[str, bytes]]:
        """The keys and values of the records of blobs, in the order of their values and then of their keys.

        At most `limit` of those that come after the key and value of `after`.  A record that can no longer be
        read may be among them.  It takes as long as there are results.
        """
        ...

    def version(self) -> object:
        """What differs from its value before if any process has changed a record since, or may have.

        None if that cannot be told at once: read the records then.  Versions of different threads do not
        compare.
        """
        ...

    def turn(self, name: str) -> AbstractContextManager[bool]:
        """Whether this process has the turn at `name` until it leaves the context: one server at a time has.

        For work that several may do at once, but need not: the turn may get lost meanwhile.
        """
        ...

    def troubles(self) -> list[str]:
        """A sentence for each cause for which a server of records cannot be used now."""
        ...

    def close(self) -> None:
        """Wait for the writes that run, and refuse later ones."""
        ...


class SharedRecords(Records, Protocol):
    """Records that another server has, of which many can be compared at once."""

    def marks(self, keys: Iterable[str]) -> Mapping[str, bytes]:
        """The SHA-256 of the values of those records that there are."""
        ...


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """The items in lists of at most `size`, each for a transaction of its own."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
