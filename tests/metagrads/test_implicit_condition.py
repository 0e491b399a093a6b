"""Where the condition of an implicit meta-gradient is taken, and what is said of it."""

import pytest
import torch
from contracts import NETS
from implicit_cases import moved, setting

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.metagrads import Dense, Displacement, Implicit, Neumann, Regularised
from lightning_metaopt.objectives import FinalLoss, MirrorBound, Objective


def test_the_episode_goes_on_from_where_the_loop_ended():
    rule = lmo.rules.KroneckerMirror(NETS.shapes, lr=0.1, norm=1.0, seed=1).double()
    episode = start(rule, NETS.draw(0, 2))
    end = unroll(rule, episode, 4)[0]
    for stationarity in (Displacement(), Regularised(0.5)):
        found = Implicit(4, stationarity)(rule, episode, FinalLoss()).episode
        assert found.step == 4
        assert found.task is episode.task
        assert found.buffers["seen"].tolist() == [[4.0], [4.0]], "what the meta-gradient evaluates besides does not count"
        assert not any(leaf.requires_grad for leaf in found.params.values())
        if isinstance(stationarity, Displacement):
            assert all(torch.equal(leaf, end.params[name]) for name, leaf in found.params.items())


def test_the_condition_is_taken_on_the_next_batch():
    rule = lmo.rules.KroneckerMirror(NETS.shapes, lr=0.1, norm=1.0, seed=1).double()
    end = unroll(rule, start(rule, NETS.draw(0, 2)), 1)[0].detach()
    difference = {name: leaf - end.origin[name] for name, leaf in end.params.items()}
    expected = end.task.loss(end.params, {"seen": torch.zeros(2, 1)}, end.task.batch(1)) + 0.5 * rule.divergence(difference)
    torch.testing.assert_close(Regularised(0.5)(rule, end), expected)
    other = end.task.loss(end.params, {"seen": torch.zeros(2, 1)}, end.task.batch(0))
    assert not torch.allclose(other + 0.5 * rule.divergence(difference), expected)
    assert end.buffers["seen"].tolist() == [[1.0], [1.0]]


def test_how_far_condition_and_solver_are_from_holding_is_said():
    rule, episode = setting()
    found = Implicit(5, Displacement(), Neumann(terms=2, alpha=0.2))(rule, episode, MirrorBound()).info
    delta, matrix = moved(rule, episode, 5).detach(), rule.matrix().detach()
    gradient = delta @ matrix  # of the divergence; and what the system is solved for
    left = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - 0.2 * matrix, 3)
    assert found["stationarity"] == pytest.approx(float(gradient.norm(dim=1).max()))
    assert found["residual"] == pytest.approx(float(((gradient @ left).norm(dim=1) / gradient.norm(dim=1)).max()))


class Constant(Objective):
    def __call__(self, rule, start, end, losses):
        return torch.ones(3, dtype=torch.float64)


def test_an_objective_that_depends_on_nothing_has_no_gradient():
    rule, episode = setting()
    for terms in ("both", "direct", "indirect"):
        estimate = Implicit(2, Displacement(), Dense(), terms)(rule, episode, Constant())
        assert not estimate.grads["entries"].any()
        assert float(estimate.loss) == 1.0
