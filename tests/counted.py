"""What totals should be, found by a look at all records."""

from __future__ import annotations

from collections import defaultdict

from storage.keys import countable, total_key
from storage.store import Store
from storage.totals import Counts, RecordChange, Totals

COUNTING = ("counted", "total ", "stored ", "blobs ")  # the starts of keys that no client's request names


def counts(store: Store) -> dict[str, Counts]:
    """What all records add up to, by the key of their total."""
    found: dict[str, Counts] = defaultdict(Counts)
    for key, value in store.records.scan(""):
        if countable(key) and (change := RecordChange.of(key, None, value)) is not None:
            found[total_key(key)].apply(change)
    return found


def totals(store: Store) -> dict[str, Counts | None]:
    """What the totals say, by their keys; None for those that are not counted yet."""
    found = Totals(store.records)
    return {
        **{f"total {name}": each.counted for name, each in found.repositories()},
        **{f"stored {name}": each.counted for name, each in found.directories()},
    }


def plain(found: dict[str, Counts] | dict[str, Counts | None]) -> dict[str, object]:
    return {key: each and (each.numbers, each.bytes) for key, each in found.items()}


def assert_counted(store: Store) -> None:
    assert plain(totals(store)) == plain(counts(store))
