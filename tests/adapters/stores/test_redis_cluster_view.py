"""``gateway.adapters.stores.redis_cluster_view``: what nodes of a cluster say, and which one is believed."""

from __future__ import annotations

from gateway.adapters.stores.redis_cluster_view import NOTHING_SEEN, ClusterView, newest, view_from
from gateway.adapters.stores.redis_keys import slot_of
from gateway.adapters.stores.redis_location import RedisAddress

ASKED = RedisAddress("here", 1)
A, B = RedisAddress("a", 1), RedisAddress("b", 2)
INFO = b"cluster_state:ok\r\ncluster_current_epoch:7\r\n"


def test_a_view_says_who_is_master_of_what() -> None:
    """Whatever the order; replicas and further facts are passed over."""
    view = view_from(
        ASKED, INFO, [[8000, 16383, [b"b", 2, b"id", {}], [b"c", 3, b"id"]], [0, 7999, [b"a", 1, b"id"]]]
    )

    assert view == ClusterView(7, True, ((0, 7999, A), (8000, 16383, B)))
    assert view.master(b"{s}") == (A if slot_of(b"s") < 8000 else B)
    assert (view.table[7999], view.table[8000]) == (A, B)
    assert view.addresses == {A, B}


def test_a_node_without_a_name_is_the_one_that_was_asked() -> None:
    """Redis leaves the name out where it knows none; one whose name is being found out is not used."""
    view = view_from(ASKED, INFO, [[0, 1, [None, 5]], [2, 2, [b"", 6]], [3, 3, [b"?", 7]]])

    assert view.ranges == ((0, 1, RedisAddress("here", 5)), (2, 2, RedisAddress("here", 6)))
    assert view.table[3] is None


def test_the_highest_epoch_is_believed() -> None:
    """Of equal ones that of a node for which the cluster works."""
    old, sick, well = (
        ClusterView(1, True, ((0, 1, A),)),
        ClusterView(2, False, ((0, 1, A),)),
        ClusterView(2, True, ((0, 1, B),)),
    )

    assert newest([NOTHING_SEEN, sick, well, old]) is well


def test_what_a_master_gained_is_what_it_has_and_had_not() -> None:
    """By the slot of a key."""
    slot = slot_of(b"key")
    before = ClusterView(1, True, ((slot, slot, A),))
    after = ClusterView(2, True, ((slot, slot, B),))

    assert after.gained(B, before)(b"key")
    assert not after.gained(A, before)(b"key")
    assert not before.gained(A, before)(b"key")
