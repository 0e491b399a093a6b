"""Memory that is handed on."""

import copy
import pickle

import torch

from lightning_metaopt.rules.lstm_pools import Pools


def test_what_is_given_is_taken_again_by_the_same_shape_alone():
    buffers, like = Pools(), torch.zeros(3, 2, 5)
    one = buffers.of(like, 1, 2).take()
    assert one[0].shape == (3, 3, 5)
    assert [part.shape for part in one[1]] == [(3, 1, 5), (3, 2, 5)]
    buffers.of(like, 1, 2).give(one)
    others = [buffers.of(like, 3), buffers.of(like[..., :4], 1, 2), buffers.of(like.double(), 1, 2), buffers.of(like[:2], 1, 2)]
    assert all(other.take()[0] is not one[0] for other in others)
    assert others[2].take()[0].dtype is torch.float64
    assert buffers.of(like, 1, 2).take()[0] is one[0]
    assert buffers.of(like, 1, 2).take()[0] is not one[0]


def test_no_more_is_held_than_the_limit():
    pool = Pools(limit=100).of(torch.zeros(1, 5), 2)  # 40 bytes
    splits = [pool.take() for _ in range(3)]
    for split in splits:
        pool.give(split)
    assert len(pool.free) == 2


def test_the_pool_that_was_not_used_for_longest_goes():
    buffers, like = Pools(pools=2), torch.zeros(1, 5)
    first = buffers.of(like, 1)
    buffers.of(like, 2)
    assert buffers.of(like, 1) is first
    buffers.of(like, 3)
    assert buffers.of(like, 1) is first
    buffers.of(like, 4)
    buffers.of(like, 5)
    assert buffers.of(like, 1) is not first


def test_copies_hold_nothing():
    buffers, like = Pools(limit=1000, pools=3), torch.zeros(1, 5)
    buffers.of(like, 2).give(buffers.of(like, 2).take())
    for other in (copy.deepcopy(buffers), pickle.loads(pickle.dumps(buffers))):
        assert (other.limit, other.most) == (1000, 3)
        assert not other.of(like, 2).free
