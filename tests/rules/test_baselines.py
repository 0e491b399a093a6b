import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.rules import Adam, GradientDescent, HeavyBall, RMSprop


def in_float64(rule, **values):
    """The hyper-parameters to float64 accuracy (constructors round them to float32)."""
    rule = rule.double()
    with torch.no_grad():
        for name, value in values.items():
            exact = torch.tensor(value, dtype=torch.float64)
            getattr(rule, name).copy_(exact.log() if name == "log_lr" else exact.logit())
    return rule


PAIRS = {
    "SGD": (lambda: in_float64(GradientDescent(), log_lr=0.07), lambda p: torch.optim.SGD(p, lr=0.07)),
    "momentum": (
        lambda: in_float64(HeavyBall(), log_lr=0.02, momentum_logit=0.9),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    ),
    "Nesterov": (
        lambda: in_float64(HeavyBall(nesterov=True), log_lr=0.02, momentum_logit=0.9),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    ),
    "RMSprop": (
        lambda: in_float64(RMSprop(eps=1e-6), log_lr=0.01, alpha_logit=0.95),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.95, eps=1e-6),
    ),
    "Adam": (
        lambda: in_float64(Adam(eps=1e-6), log_lr=0.01, beta1_logit=0.9, beta2_logit=0.999),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.999), eps=1e-6),
    ),
}


@pytest.mark.parametrize("form", ["pure", "in place"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_they_are_the_optimizers_of_torch(name, form):
    make, make_optimizer = PAIRS[name]
    rule = make()
    shapes = {"w": (3, 4), "b": (3,), "g": ()}
    reference = {key: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for key, shape in shapes.items()}
    params = {key: value.detach().clone().unsqueeze(0) for key, value in reference.items()}
    optimizer, state = make_optimizer(list(reference.values())), rule.init(params)
    for _ in range(100):
        for value in reference.values():
            value.grad = torch.randn_like(value) * torch.randint(2, value.shape)  # with zeros in it
        grads = {key: value.grad.clone().unsqueeze(0) for key, value in reference.items()}
        optimizer.step()
        with torch.no_grad():
            if form == "pure":
                updates, state = rule(grads, state, params)
                params = {key: leaf + updates[key] for key, leaf in params.items()}
            else:
                rule.forward_(grads, state, params)
    for key, value in reference.items():
        torch.testing.assert_close(params[key][0], value.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientDescent(lr=0.0), "lr must be positive, got 0"),
        (lambda: GradientDescent(lr=float("nan")), "lr must be positive"),
        (lambda: HeavyBall(momentum=1.0), "momentum must lie strictly between 0 and 1, got 1"),
        (lambda: HeavyBall(momentum=0.0), "momentum must lie strictly between"),
        (lambda: RMSprop(alpha=-0.1), "alpha must lie strictly between"),
        (lambda: Adam(beta2=1.5), "beta2 must lie strictly between"),
    ],
)
def test_values_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_they_say_what_they_have_learned_in_the_usual_units():
    assert HeavyBall(lr=0.02, momentum=0.8).describe() == pytest.approx({"lr": 0.02, "momentum": 0.8})
    assert RMSprop(lr=0.02, alpha=0.8).describe() == pytest.approx({"lr": 0.02, "alpha": 0.8})
    assert Adam(lr=0.02).describe() == pytest.approx({"lr": 0.02, "beta1": 0.9, "beta2": 0.999})
    assert GradientDescent().describe() == pytest.approx({"lr": 0.01})


def test_adam_counts_on_in_half_precision():
    # bfloat16 has no number between 256 and 258: a count kept in it would stand still, and the bias correction with it.
    rule, params = Adam(lr=0.01), {"w": torch.zeros(1, 2, dtype=torch.bfloat16)}
    state = rule.init(params)
    for _ in range(300):
        with torch.no_grad():
            updates, state = rule({"w": torch.ones(1, 2, dtype=torch.bfloat16)}, state, params)
    assert state["step"]["w"].tolist() == [300.0]
    assert updates["w"].dtype == torch.bfloat16


def test_coordinates_that_have_never_moved_have_finite_derivatives():
    for rule in (Adam(), RMSprop()):
        params = {"w": torch.zeros(1, 2, requires_grad=True)}
        grads = {"w": torch.stack([params["w"][:, 0] * 0, params["w"][:, 1] + 1], dim=1)}
        updates, _ = rule(grads, rule.init(params), params)
        found = torch.autograd.grad(updates["w"].sum(), [params["w"], *rule.parameters()], allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in found)


def test_they_fit_any_network():
    assert all(rule.shapes is None for rule in (lmo.rules.Adam(), lmo.rules.HeavyBall()))
