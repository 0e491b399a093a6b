"""Gradients at adapted meta-parameters against hand-written ones on scalars, and against finite differences."""

import pytest
import torch
from contracts import NETS, QUADRATICS
from oracles import finite_differences, values_of

import lightning_metaopt as lmo
from lightning_metaopt import metagrads, objectives, rules
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.task import Task

FINAL = objectives.FinalLoss()


class Parabola(Task):
    """f(x) = a x^2 / 2, from x = 1."""

    def init(self, generator):
        return {"x": torch.ones(self.size, dtype=torch.float64)}, {}

    def loss(self, params, buffers, batch):
        return 0.5 * batch["a"] * params["x"].square()


def parabola(*curvatures):
    rule = rules.GradientDescent(lr=0.1).double()
    return rule, start(rule, Parabola({"a": torch.tensor(curvatures, dtype=torch.float64)}))


def final(phi, curvatures, x, steps):
    """Mean loss after gradient steps with the rate exp(phi), and the iterates: everything written out."""
    for _ in range(steps):
        x = x - phi.exp() * curvatures * x
    return (0.5 * curvatures * x**2).mean(), x


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("windows", ["same", "next", "start"])
def test_it_is_the_hand_written_nested_gradient(windows, first_order):
    rule, episode = parabola(1.0, 3.0)
    episode = unroll(rule, episode, 3)[0]
    optimizer = rules.GradientDescent(0.7).double()
    lr = optimizer.log_lr.detach().exp()  # 0.7 as the logarithm in float32 holds it
    how = metagrads.Adapted(metagrads.Unrolled(2), optimizer, 3, windows, first_order)
    estimate = how(rule, episode, FINAL)

    curvatures = torch.tensor([1.0, 3.0], dtype=torch.float64)
    phi = rule.log_lr.detach().clone().requires_grad_()
    now = episode.params["x"]
    x = torch.ones_like(now) if windows == "start" else now
    current = phi
    for _ in range(3):
        loss, end = final(current, curvatures, x, 2)
        (grad,) = torch.autograd.grad(loss, current, create_graph=True)
        current = current - lr * grad
        x = x if windows == "same" else end.detach()
    loss, _ = final(current, curvatures, x if windows == "next" else now, 2)
    (expected,) = torch.autograd.grad(loss, current if first_order else phi)
    torch.testing.assert_close(estimate.grads["log_lr"], expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(estimate.loss, loss.detach(), rtol=1e-10, atol=1e-14)
    assert abs(estimate.info["adaptation"] - float((current - phi).detach().abs())) < 1e-10
    plain = unroll(rule, episode, 2)[0]
    assert torch.equal(estimate.episode.params["x"], plain.params["x"])


def test_the_adaptations_own_derivative_matters():
    rule, episode = parabola(1.0, 3.0)
    gradients = [
        metagrads.Adapted(metagrads.Unrolled(2), rules.GradientDescent(0.7), 3, "same", first)(rule, episode, FINAL).grads["log_lr"]
        for first in (False, True)
    ]
    assert abs(gradients[0] / gradients[1] - 1) > 0.05


def test_adam_adapts_differentiably_through_an_lstm():
    rule = rules.RNNprop(hidden=2, scale=0.3, seed=2).double()
    episode = start(rule, QUADRATICS.draw(seed=0, size=3))
    optimizer = rules.Adam(0.02).double()
    how = metagrads.Adapted(metagrads.Unrolled(2), optimizer, 2, "same")
    estimate = how(rule, episode, FINAL)

    def run(phi):
        state = optimizer.init({name: value.unsqueeze(0) for name, value in phi.items()})
        for _ in range(2):
            leaves = {name: value.clone().requires_grad_() for name, value in phi.items()}
            end, losses = unroll(rule, episode, 2, leaves, order="second")
            grads = torch.autograd.grad(FINAL(rule, episode, end, losses).mean(), list(leaves.values()))
            grads = {name: grad.unsqueeze(0) for name, grad in zip(phi, grads, strict=True)}
            with torch.no_grad():
                updates, state = optimizer(grads, state, phi)
            phi = {name: value + updates[name].squeeze(0) for name, value in phi.items()}
        end, losses = unroll(rule, episode, 2, phi)
        return FINAL(rule, episode, end, losses).mean().detach()

    expected = finite_differences(run, values_of(rule), step=1e-4)
    found, wanted = (torch.cat([tree[name].flatten() for name in expected]) for tree in (estimate.grads, expected))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert all(value.grad is None for value in [*rule.parameters(), *optimizer.parameters()])


def test_other_problems_are_drawn_anew_and_again_after_a_resume():
    rule = rules.GradientDescent(0.05).double()
    episode = start(rule, QUADRATICS.draw(seed=0, size=3))

    def make():
        return metagrads.Adapted(metagrads.Unrolled(2), rules.GradientDescent(0.5).double(), 2, "start", family=QUADRATICS, seed=5)

    how = make()
    first = how(rule, episode, FINAL)
    saved = how.state_dict()
    second = how(rule, episode, FINAL)
    assert not torch.equal(first.loss, second.loss)
    again = make()
    again.load_state_dict(saved)
    assert torch.equal(again(rule, episode, FINAL).loss, second.loss)

    # The first one by hand: adapted on the family's draw 5, measured on the episode.
    other, phi = start(rule, QUADRATICS.draw(5, 3)), values_of(rule)
    for _ in range(2):
        estimate = lmo.rule.under(
            rule, {"log_lr": phi["log_lr"].requires_grad_()}, lambda r, at=other: metagrads.Unrolled(2)(r, at, FINAL)
        )
        phi, other = {"log_lr": (phi["log_lr"] - 0.5 * estimate.grads["log_lr"]).detach()}, estimate.episode
    end, losses = unroll(rule, episode, 2, phi)
    torch.testing.assert_close(first.loss, FINAL(rule, episode, end, losses).mean().detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"windows": "last"}, "windows"),
        ({"family": QUADRATICS}, "windows='start'"),
        ({"every": 2, "windows": "start"}, "first_order=True"),
        ({"every": 2, "first_order": True}, "windows='start'"),
        ({"every": 0}, "every"),
        ({"advance": "adapted"}, "'next'"),
        ({"advance": "both", "windows": "same"}, "advance"),
        ({"together": 0}, "together"),
        ({"optimizer": rules.MetaSGD({"w": (1,)})}, "sized per parameter"),
        ({"inner": metagrads.Unrolled(4, window=2)}, "first_order=True"),
        ({"inner": metagrads.Unrolled(4, first_order=True)}, "first_order=True"),
        ({"inner": metagrads.ZerothOrder(2)}, "first_order=True"),
    ],
)
def test_what_cannot_be_right_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        metagrads.Adapted(**{"inner": metagrads.Unrolled(2), "optimizer": rules.GradientDescent(0.1)} | options)


def test_problems_with_buffers_are_not_started_again():
    rule = rules.GradientDescent(0.1).double()
    how = metagrads.Adapted(metagrads.Unrolled(1), rules.GradientDescent(0.1), windows="start")
    with pytest.raises(ValueError, match="family="):
        how(rule, start(rule, NETS.draw(seed=0, size=2)), FINAL)


def test_only_the_named_meta_parameters_adapt():
    rule = rules.HeavyBall(0.1, 0.5).double()
    episode = start(rule, Parabola({"a": torch.tensor([1.0, 3.0], dtype=torch.float64)}))
    how = metagrads.Adapted(metagrads.Unrolled(3), rules.GradientDescent(0.7).double(), 1, "same", True, only=["log_lr"])
    estimate = how(rule, episode, FINAL)
    plain = metagrads.Unrolled(3)(rule, episode, FINAL)
    adapted = {"log_lr": (rule.log_lr - 0.7 * plain.grads["log_lr"]).detach()}
    assert estimate.info["adaptation"] == pytest.approx(0.7 * float(plain.grads["log_lr"].abs()), rel=1e-6)
    end, losses = unroll(rule, episode, 3, adapted)
    torch.testing.assert_close(estimate.loss, FINAL(rule, episode, end, losses).mean().detach(), rtol=1e-6, atol=0)
    assert set(estimate.grads) == {"log_lr", "momentum_logit"}
    with pytest.raises(ValueError, match="log_rate"):
        metagrads.Adapted(metagrads.Unrolled(3), rules.GradientDescent(0.7), only=["log_rate"])(rule, episode, FINAL)


def test_an_adaptation_is_held_for_some_estimates_and_over_a_resume():
    rule, episode = parabola(1.0, 3.0)

    def make(every):
        optimizer = rules.GradientDescent(0.7).double()
        return metagrads.Adapted(metagrads.Unrolled(2), optimizer, 2, "start", True, every=every, advance="adapted")

    how = make(2)
    first = how(rule, episode, FINAL)
    saved = how.state_dict()
    changed = first.info["adaptation"]
    with torch.no_grad():
        rule.log_lr.add_(0.5)
    second = how(rule, first.episode, FINAL)
    assert second.info["adaptation"] == changed
    sign = 1 if float(first.grads["log_lr"]) < 0 else -1  # downhill
    end, losses = unroll(rule, first.episode, 2, {"log_lr": rule.log_lr.detach() + sign * changed})
    torch.testing.assert_close(second.loss, FINAL(rule, episode, end, losses).mean().detach())
    assert torch.equal(second.episode.params["x"], end.params["x"])
    there = lmo.rule.under(
        rule,
        {"log_lr": (rule.log_lr.detach() + sign * changed).requires_grad_()},
        lambda bound: metagrads.Unrolled(2)(bound, first.episode, FINAL),
    )
    torch.testing.assert_close(second.grads["log_lr"], there.grads["log_lr"])
    assert second.grads["log_lr"] != 0
    assert how(rule, second.episode, FINAL).info["adaptation"] != changed
    again = make(2)
    again.load_state_dict(saved)
    assert torch.equal(again(rule, first.episode, FINAL).loss, second.loss)
    assert again(rule, episode, FINAL).info["adaptation"] != changed  # a new episode is adapted to at once
