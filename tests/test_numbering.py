"""Graphs of numbers, against dictionaries and sets that say the same."""

from __future__ import annotations

from array import array
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import DigestInvalid
from storage.maintenance.numbering import DigestNumbers, Edges, Prefixes, both, members, without
from storage.oci import Digest

contents = st.binary(max_size=1)
algorithms = st.sampled_from(["sha256", "sha512"])


@given(st.lists(st.builds(Digest.of, contents, algorithms)))
def test_each_digest_has_one_number(digests: list[Digest]) -> None:
    numbers = DigestNumbers()
    known: dict[str, int] = {}
    for each in digests:
        assert numbers.number(each) == known.setdefault(each, len(known))
        assert len(numbers) == len(known)
    assert [numbers.digest(number) for number in range(len(known))] == list(known)


@pytest.mark.parametrize("text", ["", "sha256:", f"sha256:{'0' * 63} ", "sha512:" + "0" * 64, "md5:00"])
def test_what_is_no_digest_has_no_number(text: str) -> None:
    with pytest.raises(DigestInvalid):
        DigestNumbers().number(text)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_edges_lead_where_they_were_added(pairs: list[tuple[int, int]]) -> None:
    edges, known = Edges(), defaultdict[int, list[int]](list)
    for source, target in pairs:
        edges.add(source, target)
        known[source].append(target)
    for source in range(40):
        assert sorted(edges.of(source)) == sorted(known[source])


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_prefixes_are_a_set(some: list[int], more: list[int]) -> None:
    found = Prefixes()
    assert not any(each in found for each in (*some, *more))
    found.update(some)
    assert all(each in found for each in some)
    found.update(array("Q", more))
    for each in (*more, *some, *(each ^ 1 for each in some), *(each ^ 2**63 for each in more)):
        assert (each in found) == (each in {*some, *more})


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_sets_of_nodes(nodes: list[tuple[bool, bool]]) -> None:
    some, others = (bytearray(each[side] for each in nodes) for side in (0, 1))
    assert set(members(both(some, others))) == set(members(some)) & set(members(others))
    assert set(members(without(some, others))) == set(members(some)) - set(members(others))
    assert len(both(some, others)) == len(without(some, others)) == len(nodes)
