"""Windows differentiated without a graph against autograd: checkpoints of the whole window take the graph."""

import pytest
import torch
from contracts import NETS

import lightning_metaopt as lmo
from lightning_metaopt import objectives, rules, tasks
from lightning_metaopt.episode import start, unroll

OBJECTIVES = [objectives.SumLoss(), objectives.LogLoss(), objectives.FinalLoss(), objectives.ValidationLoss()]


def rule_of(kind):
    if kind == "RNNprop":
        return rules.RNNprop(layers=2, hidden=3, scale=0.1, learn_scale=True).double()
    return rules.L2O(hidden=3, scale=0.1).double()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", ["RNNprop", "L2O"])
@pytest.mark.parametrize("family", [NETS, tasks.Lasso(double=True)], ids=["networks", "lasso"])
def test_the_gradient_is_that_of_the_graph(kind, family, objective):
    rule = rule_of(kind)
    episode = unroll(rule, start(rule, family.draw(0, 4)), 3)[0]  # states are no zeros
    found = lmo.Unrolled(6, first_order=True)(rule, episode, objective)
    graph = lmo.Unrolled(6, first_order=True, checkpoint=6)(rule, episode, objective)
    torch.testing.assert_close(found.loss, graph.loss)
    for name, grad in graph.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-10, atol=1e-13, msg=name)
        assert grad.abs().max() > 0
    for slot, tree in graph.episode.state.items():
        for name, leaf in tree.items():
            torch.testing.assert_close(found.episode.state[slot][name], leaf)
    assert not any(leaf.requires_grad for leaf in found.episode.params.values())


def test_windows_and_chunks_go_on():
    rule, task = rule_of("RNNprop"), tasks.Lasso(double=True).draw(0, 6)
    ways = [{"window": 4, "chunk": 2}, {"window": 4, "chunk": None, "checkpoint": 4}]
    one, two = (lmo.Unrolled(8, first_order=True, **way)(rule, start(rule, task), objectives.SumLoss()) for way in ways)
    for name, grad in one.grads.items():
        torch.testing.assert_close(grad, two.grads[name], rtol=1e-10, atol=1e-13)


def test_an_objective_that_is_a_constant_has_no_gradient():
    class Constant(objectives.Objective):
        def __call__(self, rule, start, end, losses):
            return torch.ones(end.size)

    rule = rule_of("RNNprop")
    found = lmo.Unrolled(2, first_order=True)(rule, start(rule, tasks.Lasso(double=True).draw(0, 2)), Constant())
    assert all(not grad.any() for grad in found.grads.values())


def test_an_objective_may_depend_on_phi_itself():
    class Penalised(objectives.Objective):
        def __call__(self, rule, start, end, losses):
            return losses.sum(0) + sum(value.square().sum() for value in rule.parameters())

    rule = rule_of("L2O")
    episode = start(rule, tasks.Lasso(double=True).draw(0, 2))
    found, graph = (lmo.Unrolled(3, first_order=True, checkpoint=c)(rule, episode, Penalised()) for c in (None, 3))
    for name, grad in found.grads.items():
        torch.testing.assert_close(grad, graph.grads[name], rtol=1e-10, atol=1e-13)
