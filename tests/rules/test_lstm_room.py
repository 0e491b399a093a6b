"""Memory that is handed on."""

import copy
import pickle

import torch

from lightning_metaopt.rules.lstm_room import Room


def test_what_is_given_is_taken_again_by_the_same_shape_alone():
    room, like = Room(), torch.zeros(3, 2, 5)
    one = room.shelf(like, 1, 2).take()
    assert one[0].shape == (3, 3, 5)
    assert [part.shape for part in one[1]] == [(3, 1, 5), (3, 2, 5)]
    room.shelf(like, 1, 2).give(one)
    others = [room.shelf(like, 3), room.shelf(like[..., :4], 1, 2), room.shelf(like.double(), 1, 2), room.shelf(like[:2], 1, 2)]
    assert all(other.take()[0] is not one[0] for other in others)
    assert others[2].take()[0].dtype is torch.float64
    assert room.shelf(like, 1, 2).take()[0] is one[0]
    assert room.shelf(like, 1, 2).take()[0] is not one[0]


def test_no_more_is_held_than_the_limit():
    shelf = Room(limit=100).shelf(torch.zeros(1, 5), 2)  # 40 bytes
    splits = [shelf.take() for _ in range(3)]
    for split in splits:
        shelf.give(split)
    assert len(shelf.free) == 2


def test_the_shelf_that_was_not_used_for_longest_goes():
    room, like = Room(shelves=2), torch.zeros(1, 5)
    first = room.shelf(like, 1)
    room.shelf(like, 2)
    assert room.shelf(like, 1) is first
    room.shelf(like, 3)
    assert room.shelf(like, 1) is first
    room.shelf(like, 4)
    room.shelf(like, 5)
    assert room.shelf(like, 1) is not first


def test_copies_hold_nothing():
    room, like = Room(limit=1000, shelves=3), torch.zeros(1, 5)
    room.shelf(like, 2).give(room.shelf(like, 2).take())
    for other in (copy.deepcopy(room), pickle.loads(pickle.dumps(room))):
        assert (other.limit, other.most) == (1000, 3)
        assert not other.shelf(like, 2).free
