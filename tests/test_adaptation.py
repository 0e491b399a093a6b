"""Self-adaptation against meta-steps by hand, and what it keeps."""

import math

import pytest
import torch
from oracles import values_of

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.task_loader import draw

FAMILY = lmo.tasks.Lasso(std=2.0, dim=3, double=True)
WINDOW = lmo.Unrolled(4, first_order=True)


def rule_of(scale=0.05):
    return lmo.rules.RNNprop(hidden=3, scale=scale, learn_scale=True, seed=1).double()


def by_hand(rule, steps, restart_every, lr, only, tasks, seed):
    """Parameters after Adam's meta-steps on the sum of losses, with inner gradients as constants."""
    task, params, buffers = draw(FAMILY, seed, "adaptation", 0, tasks)
    names = [name for name, _ in rule.named_parameters()]
    phi = values_of(rule)
    optimizer = torch.optim.Adam([phi[name].requires_grad_() for name in only or names], lr=lr)
    losses = []
    for step in range(steps):
        if step % restart_every == 0:
            episode = Episode(task, params, buffers, rule.init(params), origin=params)
        end, before = unroll(rule, episode, 4, phi, order="first")
        value = (before.sum(0) + task.loss(end.params, {}, task.batch(0))).mean()
        grads = torch.autograd.grad(value, [phi[name] for name in only or names])
        for name, grad in zip(only or names, grads, strict=True):
            phi[name].grad = grad
        optimizer.step()
        episode = end.detach()
        losses.append(float(value.detach()))
    return {name: value.detach() for name, value in phi.items()}, losses


@pytest.mark.parametrize(("restart_every", "only"), [(2, None), (5, ["log_scale", "out_bias"])])
def test_it_makes_adams_meta_steps_on_the_first_windows(restart_every, only):
    rule = rule_of()
    before = values_of(rule)
    options = {"metagrad": WINDOW, "lr": 0.05, "restart_every": restart_every, "only": only, "tasks": 6, "seed": 3}
    found = lmo.adapt(rule, FAMILY, 5, held_out=0, **options)
    expected, losses = by_hand(rule, 5, restart_every, 0.05, only, 6, 3)
    for name, value in found.rule.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(before[name], dict(rule.named_parameters())[name]), "the rule itself changed"
        if only and name not in only:
            assert torch.equal(value, before[name])
        assert value.grad is None
    assert found.losses == pytest.approx(losses)
    assert found.kept
    assert math.isnan(found.before)


def test_what_made_it_worse_is_not_kept():
    rule = lmo.rules.GradientDescent(lr=0.02).double()
    harm = lmo.adapt(rule, FAMILY, 3, lr=3.0, metagrad=WINDOW, held_out_steps=40)
    assert not harm.kept
    assert harm.after > harm.before
    assert harm.step == 0
    assert torch.equal(harm.rule.log_lr, rule.log_lr)
    assert harm.rule is not rule
    gain = lmo.adapt(lmo.rules.GradientDescent(lr=1e-4).double(), FAMILY, 3, lr=0.3, metagrad=WINDOW, held_out_steps=40)
    assert gain.kept
    assert gain.after < gain.before
    assert gain.step == 3
    # The same meta-steps, but the best of those on the way counts.
    best = lmo.adapt(rule, FAMILY, 30, lr=0.3, restart_every=1, metagrad=WINDOW, held_out_steps=40, every=1)
    assert best.kept
    assert 0 < best.step < 30
    assert best.after > best.before or best.step < 30


def test_figures_are_of_held_out_problems():
    rule = lmo.rules.GradientDescent(lr=0.01).double()
    found = lmo.adapt(rule, FAMILY, 1, metagrad=WINDOW, tasks=2, held_out=5, held_out_steps=7, figure=min, seed=4)
    task, params, buffers = draw(FAMILY, 4, "adaptation, held out", 0, 5)
    end, losses = unroll(rule, Episode(task, params, buffers, rule.init(params)), 7)
    curve = [*losses.mean(1).tolist(), float(task.loss(end.params, {}, task.batch(0)).mean())]
    assert found.before == pytest.approx(min(curve))


def test_a_meta_gradient_that_is_not_finite_ends_it_and_the_rule_is_kept():
    rule = lmo.rules.GradientDescent(lr=1e3).double()
    found = lmo.adapt(rule, lmo.tasks.Lasso(std=1e30, dim=3, double=True), 4, metagrad=lmo.Unrolled(8))
    assert not found.kept
    assert math.isnan(found.after)
    assert found.before == math.inf
    assert len(found.losses) == 1


def test_a_learner_adapts_with_its_own_meta_gradient_or_that_within():
    inner = lmo.Unrolled(4, first_order=True)
    how = lmo.Adapted(inner, lmo.rules.GradientDescent(1e-3), first_order=True)
    for metagrad in (inner, how):
        learner = lmo.MetaLearner(rule_of(), FAMILY, metagrad, "sum", tasks=2)
        found = learner.adapt(FAMILY, steps=2, lr=0.05, tasks=6, seed=3, held_out=0)
        expected, _ = by_hand(learner.rule, 2, 2, 0.05, None, 6, 3)
        assert all(torch.allclose(value, expected[name]) for name, value in found.rule.named_parameters())
    assert learner.adapt(FAMILY, lr=0.05, objective="log", held_out=0).losses != found.losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"restart_every": 0}, "at least 1"),
        ({"tasks": 0}, "at least 1"),
        ({"held_out": -1}, "held_out"),
        ({"every": 0}, "every"),
        ({"lr": 0.0}, "lr positive"),
        ({"lr": math.nan}, "lr positive"),
        ({"only": ["log_rate"]}, "no meta-parameter log_rate"),
        ({"objective": "average"}, "choose one of"),
    ],
)
def test_what_cannot_be_right_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lmo.adapt(rule_of(), FAMILY, **options)
