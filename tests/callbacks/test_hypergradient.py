"""HypergradientDescent against the algorithms as they are printed (Baydin et al. 2018), one number after another."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from step_cases import PACKAGES, fit, flat, module, sgd
from torch import Tensor, nn

from lightning_metaopt.callbacks import HypergradientDescent

STEPS = 100


def slope(x: list[float], t: int) -> list[float]:
    """Of a quadratic whose minimum wanders about."""
    return [(1 + i) * (y - 0.3 * math.sin(2.0 * t + i)) for i, y in enumerate(x)]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def additive(alpha: float, beta: float, g: list[float], past: list[float]) -> float:
    h = -dot(g, past)
    return alpha - beta * h


def multiplicative(alpha: float, beta: float, g: list[float], past: list[float]) -> float:
    """Eq. 8; there is no past in the first step."""
    lengths = math.sqrt(dot(g, g)) * math.sqrt(dot(past, past))
    return alpha * (1 + beta * dot(g, past) / lengths) if lengths else alpha


def sgd_hd(x: list[float], alpha: float, beta: float, mu: float = 0.0, rate: Any = additive) -> tuple[list[float], float]:
    """Algorithm 4; with momentum ``mu`` (and no dampening) the direction is the velocity, as in Algorithm 5."""
    past, v = [0.0] * len(x), [0.0] * len(x)
    for t in range(1, STEPS + 1):
        g = slope(x, t)
        alpha = rate(alpha, beta, g, past)
        v = [mu * a + b for a, b in zip(v, g, strict=True)]
        x = [a - alpha * b for a, b in zip(x, v, strict=True)]
        past = v
    return x, alpha


def adam_hd(x: list[float], alpha: float, beta: float, rate: Any = additive) -> tuple[list[float], float]:
    """Algorithm 6, with the usual constants."""
    n = len(x)
    past, m, v = [0.0] * n, [0.0] * n, [0.0] * n
    for t in range(1, STEPS + 1):
        g = slope(x, t)
        alpha = rate(alpha, beta, g, past)
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
        past = [(a / (1 - 0.9**t)) / (math.sqrt(b / (1 - 0.999**t)) + 1e-8) for a, b in zip(m, v, strict=True)]
        x = [a - alpha * b for a, b in zip(x, past, strict=True)]
    return x, alpha


CASES: dict[str, tuple[Any, Any, float]] = {
    "SGD-HD": (torch.optim.SGD, sgd_hd, 1e-3),
    "with momentum": (partial(torch.optim.SGD, momentum=0.5), partial(sgd_hd, mu=0.5), 1e-3),
    "Adam-HD": (torch.optim.Adam, adam_hd, 1e-3),
    "SGD, multiplicative": (torch.optim.SGD, partial(sgd_hd, rate=multiplicative), 0.05),
    "with momentum, multiplicative": (
        partial(torch.optim.SGD, momentum=0.5),
        partial(sgd_hd, mu=0.5, rate=multiplicative),
        0.05,
    ),
    "Adam, multiplicative": (torch.optim.Adam, partial(adam_hd, rate=multiplicative), 0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_the_printed_algorithm(case: str) -> None:
    lr, (make, twin, rate) = 0.01, CASES[case]
    params = [nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([2.0, -1.0], [0.5])]
    optimizer = make(params, lr=lr)
    form = "multiplicative" if "multiplicative" in case else "additive"
    engine = HypergradientDescent.attach(optimizer, meta_lr=rate, form=form)
    for t in range(1, STEPS + 1):
        grads = torch.tensor(slope(torch.cat([p.detach() for p in params]).tolist(), t), dtype=torch.float64)
        params[0].grad, params[1].grad = grads[:2].clone(), grads[2:].clone()
        optimizer.step()
    x, alpha = twin([2.0, -1.0, 0.5], lr, rate)
    assert torch.cat([p.detach() for p in params]).tolist() == pytest.approx(x, rel=1e-8)
    assert lr * float(engine.factors()[params[0]]) == pytest.approx(alpha, rel=1e-8)
    assert abs(alpha / lr - 1) > 0.05


def test_a_rate_may_become_negative_unless_told_not_to() -> None:
    def alpha(**options: Any) -> float:
        param = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([param], 0.1)
        engine = HypergradientDescent.attach(optimizer, meta_lr=1.0, **options)
        for value in (1.0, -1.0):
            param.grad = torch.tensor([value])
            optimizer.step()
        return float(engine.factors()[param]) * 0.1

    assert alpha() == pytest.approx(-0.9)
    assert alpha(nonnegative=True) == 0
    with pytest.raises(ValueError, match="at least 0"):
        HypergradientDescent(meta_lr=-1.0)


def two_steps(grads: list[float], rates: tuple[float, float] = (0.1, 0.1), **options: Any) -> float:
    params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, rates, strict=True)]
    engine = HypergradientDescent.attach(torch.optim.SGD(groups), form="multiplicative", **options)
    for value in grads:
        params[0].grad, params[1].grad = torch.tensor([value]), torch.tensor([1.0])
        engine.optimizer.step()
    factors = [engine.factors().get(param, torch.ones(())) for param in params]
    assert torch.equal(factors[0], factors[1])
    return float(factors[0])


def test_multiplicative_form_of_several_groups() -> None:
    # The angle is that of the steps taken: lengths of gradients do not matter, ratios of learning rates do.
    assert two_steps([1.0, 1.0], meta_lr=0.5) == pytest.approx(1.5)
    assert two_steps([-1.0, 1.0], meta_lr=0.5) == pytest.approx(1.0)
    cosine = (0.3 * -3.0 + 0.1 * 1.0) / math.hypot(0.3, 0.1) / math.hypot(3.0, 1.0)
    assert two_steps([1.0, -3.0], (0.3, 0.1), meta_lr=0.5) == pytest.approx(1 + 0.5 * cosine)
    assert two_steps([1e18, 1e18], meta_lr=0.5) == pytest.approx(1.5)


def test_multiplicative_form_without_a_gradient_or_out_of_range() -> None:
    param = nn.Parameter(torch.zeros(2))
    engine = HypergradientDescent.attach(torch.optim.SGD([param], 0.1), meta_lr=0.5, form="multiplicative")
    for value in (0.0, 0.0, 1.0, 0.0):
        param.grad = torch.full((2,), value)
        engine.optimizer.step()
    assert float(engine.factors()[param]) == 1
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="below 1"):
            HypergradientDescent(meta_lr=rate, form="multiplicative")
    with pytest.raises(ValueError, match="form must be"):
        HypergradientDescent(form="geometric")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", PACKAGES)
def test_in_training(package: str) -> None:
    plain, same, learned = (module(sgd(1e-3), package=package) for _ in range(3))
    fit(plain, package=package)
    fit(same, HypergradientDescent(0.0), package=package)
    callback = HypergradientDescent(1e-4)
    trainer = fit(learned, callback, package=package, log_every_n_steps=3)
    assert torch.equal(flat(plain), flat(same))
    factor = callback.engines[0].factors()[learned.body[0].weight]
    assert abs(float(factor) - 1) > 0.1
    logged: Tensor = trainer.callback_metrics["HypergradientDescent/factor"]
    assert float(logged) == pytest.approx(float(factor))
