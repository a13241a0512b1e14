"""Which replica owns a key."""

from __future__ import annotations

from collections import Counter

from proxy.upstream.rendezvous import ranked, score
from storage.oci import Digest

KEYS = [str(Digest.of(b"%d" % number)) for number in range(3000)]
FIVE = [f"http://10.0.0.{number}:5000" for number in range(1, 6)]


def test_all_agree_whatever_the_order_of_their_lists() -> None:
    for key in KEYS[:100]:
        assert ranked(key, FIVE) == ranked(key, reversed(FIVE))


def test_each_owns_about_as_much() -> None:
    owned = Counter(ranked(key, FIVE)[0] for key in KEYS)
    assert set(owned) == set(FIVE)
    assert all(0.8 * 600 < each < 1.2 * 600 for each in owned.values())


def test_a_new_replica_takes_only_its_own_share() -> None:
    new = "http://10.0.0.6:5000"
    moved = [(ranked(key, FIVE)[0], after) for key in KEYS if (after := ranked(key, [*FIVE, new])[0])]
    taken = [after for before, after in moved if before != after]
    assert set(taken) == {new}
    assert 0.8 * 500 < len(taken) < 1.2 * 500


def test_what_a_replica_owned_is_shared_out_among_all_others() -> None:
    gone = FIVE[2]
    left = [each for each in FIVE if each != gone]
    heirs = Counter(ranked(key, left)[0] for key in KEYS if ranked(key, FIVE)[0] == gone)
    assert set(heirs) == set(left)
    assert all(ranked(key, left)[0] == ranked(key, FIVE)[1] for key in KEYS if ranked(key, FIVE)[0] == gone)


def test_two_replicas_are_in_one_order_in_every_list() -> None:
    for key in KEYS[:100]:
        one, other = FIVE[0], FIVE[4]
        first = score(key, one) > score(key, other)
        for among in ([one, other], [other, FIVE[2], one], FIVE):
            order = ranked(key, among)
            assert (order.index(one) < order.index(other)) == first


def test_the_score_is_the_same_in_every_version() -> None:
    """Replicas of two versions run beside each other while one replaces the other."""
    assert ranked("sha256:00", FIVE) == [FIVE[each] for each in (0, 3, 1, 2, 4)]
