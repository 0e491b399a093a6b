"""Stacked replicas against the same rules trained one by one."""

import copy

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt import rules, tasks
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.objectives import LogMeanLoss, PerReplica, SumLoss


def kinds():
    yield (
        "RNNprop",
        [rules.RNNprop(layers=2, hidden=4, scale=0.1, learn_scale=True, seed=seed) for seed in range(3)],
        tasks.Lasso(double=True),
    )
    yield "L2O", [rules.L2O(hidden=3, scale=0.1, seed=seed) for seed in range(2)], tasks.Rosenbrock(double=True)
    yield "Adam", [rules.Adam(lr) for lr in (0.01, 0.03, 0.1)], tasks.Lasso(double=True)
    yield "MetaSGD", [rules.MetaSGD({"theta": (10,)}, lr=lr) for lr in (0.01, 0.1)], tasks.Lasso(double=True)


def trained(rule, family, objective, metagrad, meta_steps, size):
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    losses, episode = [], None
    for number in range(meta_steps):
        if episode is None or episode.step >= 3 * metagrad.steps:
            episode = start(rule, family.draw(number, size))
        estimate = metagrad(rule, episode, objective)
        for name, value in rule.named_parameters():
            value.grad = estimate.grads[name]
        optimizer.step()
        rule.project_()
        episode = estimate.episode
        losses.append(float(estimate.loss))
    return rule, losses


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize(("name", "replicas", "family"), kinds(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_is_trained_as_if_alone(name, replicas, family, first_order):
    replicas, count = [copy.deepcopy(rule).double() for rule in replicas], len(replicas)
    metagrad = lmo.Unrolled(4, first_order=first_order)
    alone = [trained(copy.deepcopy(rule), family, SumLoss(), metagrad, 24, 2) for rule in replicas]
    stacked = rules.Stacked(replicas)
    stacked, losses = trained(stacked, tasks.Repeated(family, count), PerReplica("sum", count), metagrad, 24, 2 * count)
    torch.testing.assert_close(losses, [sum(values) for values in zip(*(own for _, own in alone), strict=True)], rtol=1e-9, atol=0)
    for one, (own, _), before in zip(stacked.replicas(), alone, replicas, strict=True):
        assert type(one) is type(own)
        for (label, value), expected in zip(one.named_parameters(), own.parameters(), strict=True):
            assert value.requires_grad
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-11, msg=label)
        assert any(not torch.equal(*pair) for pair in zip(one.parameters(), before.parameters(), strict=True))


def test_the_logarithm_of_a_mean_is_that_of_each_replicas_own():
    replicas = [rules.RNNprop(hidden=3, scale=0.1, seed=seed).double() for seed in range(2)]
    metagrad = lmo.Unrolled(4, first_order=True)
    alone = [trained(copy.deepcopy(rule), tasks.Lasso(double=True), LogMeanLoss(), metagrad, 6, 3)[0] for rule in replicas]
    family = tasks.Repeated(tasks.Lasso(double=True), 2)
    stacked, _ = trained(rules.Stacked(replicas), family, PerReplica("log-mean", 2), metagrad, 6, 6)
    for one, expected in zip(stacked.replicas(), alone, strict=True):
        torch.testing.assert_close(dict(one.named_parameters()), dict(expected.named_parameters()), rtol=1e-8, atol=1e-11)


def test_problems_of_their_own_are_dealt_out_in_parts():
    replicas = [rules.GradientDescent(lr).double() for lr in (0.01, 0.1)]
    task = tasks.Lasso(std=1.0, double=True).draw(3, 6)
    end, _ = unroll(rules.Stacked(replicas), start(replicas[0], task), 5)
    for index in range(6):
        alone, _ = unroll(replicas[index // 3], start(replicas[0], task.select(slice(index, index + 1))), 5)
        torch.testing.assert_close(end.params["theta"][index], alone.params["theta"][0], rtol=1e-12, atol=1e-14)


def test_a_trainer_and_a_file_have_them(tmp_path):
    stacked = rules.Stacked([rules.RNNprop(hidden=3, seed=seed) for seed in range(3)])
    before = stacked.replicas()
    learner = lmo.MetaLearner(
        stacked, tasks.Repeated(tasks.Lasso(), 3), lmo.Unrolled(5), PerReplica("sum", 3), tasks=6, val_tasks=6, steps_per_epoch=4
    )
    rule = lmo.MetaLoop(max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu").fit(learner)
    assert isinstance(rule, rules.Stacked)
    for one, old in zip(rule.replicas(), before, strict=True):
        assert not torch.equal(one.out_weight, old.out_weight)
    lmo.save_rule(rule, tmp_path / "three.safetensors")
    again = lmo.load_rule(tmp_path / "three.safetensors")
    for one, two in zip(rule.replicas(), again.replicas(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
    optimizer = lmo.LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], rule.replicas()[1])
    assert isinstance(optimizer.rule, rules.RNNprop)


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(ValueError, match="nothing to stack"):
        rules.Stacked([])
    with pytest.raises(ValueError, match="one class and configuration"):
        rules.Stacked([rules.RNNprop(), rules.RNNprop(hidden=4)])
    with pytest.raises(ValueError, match="7 problems"):
        unroll(rules.Stacked([rules.Adam(), rules.Adam()]), start(rules.Adam(), tasks.Lasso().draw(0, 7)), 1)
    with pytest.raises(ValueError, match="multiple of 2"):
        tasks.Repeated(tasks.Lasso(), 2).draw(0, 3)
    with pytest.raises(ValueError, match="at least 1"):
        tasks.Repeated(tasks.Lasso(), 0)
