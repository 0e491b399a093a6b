"""OptimisticMetaGrad against plain loops over coordinates, written from the formulas, and against automatic differentiation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from step_cases import STEPS, Probe, gradients
from torch import Tensor, nn

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.metastep import Hint


def run(grads: list[list[float]], lr: float = 0.1, make: Any = torch.optim.SGD, **options: Any) -> tuple[list[float], list[float]]:
    """Hand the gradients to an optimizer with the callback; the parameters and the step sizes at the end."""
    params = [nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(len(grads[0]) - 2, dtype=torch.float64))]
    optimizer = make(params, lr=lr)
    engine = OptimisticMetaGrad.attach(optimizer, **options)
    for row in grads:
        params[0].grad = torch.tensor(row[:2], dtype=torch.float64)
        params[1].grad = torch.tensor(row[2:], dtype=torch.float64)
        optimizer.step()
    factors = [engine.factors()[p].expand_as(p) for p in params]
    return torch.cat([p.detach() for p in params]).tolist(), (lr * torch.cat(factors)).tolist()


def assert_near(found: tuple[list[float], list[float]], expected: tuple[list[float], list[float]], rel: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-11)


# ----------------------------------------------------------------------------------------------------------- the paper's rule
def raw_twin(grads: list[list[float]], rate: float, form: str) -> tuple[list[float], list[float]]:
    xs, ws = [], []
    for i in range(len(grads[0])):
        x, w = 1.0, 0.1
        for t in range(len(grads)):
            new = grads[t][i]
            last = grads[t - 1][i] if t > 0 else 0.0
            before = grads[t - 2][i] if t > 1 else 0.0
            if t > 0:
                w += {
                    "standard": rate * new * last,
                    # the first step has had no hint that would have to be taken off
                    "7.2": rate * (new * (new + last) - (last * last if t > 1 else 0.0)),
                    "Corollary 1": rate * (2 * new * last - last * before),
                }[form]
                w = max(w, 0.0)
            x -= w * new
        xs.append(x)
        ws.append(w)
    return xs, ws


RAW: dict[str, dict[str, Any]] = {
    "standard": {"mode": "standard"},
    "7.2": {"mode": "optimistic"},
    "Corollary 1": {"hint": Hint(of="previous")},
}


@pytest.mark.parametrize("rate", [1e-4, 0.02], ids=["small", "clamped"])
@pytest.mark.parametrize("form", RAW)
def test_the_papers_rule(form: str, rate: float) -> None:
    grads = gradients()
    found = run(grads, update="raw", meta_lr=rate, **RAW[form])
    assert_near(found, raw_twin(grads, rate, form))
    assert max(abs(w - 0.1) for w in found[1]) > 10 * rate  # they have moved


@pytest.mark.parametrize("form", ["7.2", "Corollary 1"])
def test_the_definition_by_follow_the_regularised_leader(form: str) -> None:
    """w_{t+1} = w_1 - b (hint_{t+1} + the sum of all meta-gradients so far), as long as no clamp intervenes."""
    grads, rate = gradients(), 1e-5
    ws = []
    for i in range(5):
        metas = [-grads[t][i] * grads[t - 1][i] for t in range(1, STEPS)]
        hint = -(grads[-1][i] ** 2) if form == "7.2" else metas[-1]
        ws.append(0.1 - rate * (hint + sum(metas)))
    assert run(grads, update="raw", meta_lr=rate, **RAW[form])[1] == pytest.approx(ws, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------ the robust form
def robust_twin(
    grads: list[list[float]], kappa: float, tau: float, scope: str, lr: float = 0.1, fade: float = 1e99
) -> tuple[list[float], list[float]]:
    n = len(grads[0])
    parts = {"element": [[i] for i in range(n)], "tensor": [[0, 1], list(range(2, n))], "optimizer": [list(range(n))]}[scope]
    x, v = [1.0] * n, [0.0] * len(parts)
    m, s = [0.0] * len(parts), [0.0] * len(parts)
    for t, a in enumerate(grads):
        for k, part in enumerate(parts):
            if t > 0:
                d = sum(a[i] * grads[t - 1][i] + kappa / (1 + t / fade) ** 2 * a[i] * a[i] for i in part)
                m[k] = 0.9 * m[k] + 0.1 * d
                s[k] = 0.999 * s[k] + 0.001 * d * d
                v[k] += 0.2 / (1 + t / fade) ** 2 * (m[k] / (1 - 0.9**t)) / (math.sqrt(s[k] / (1 - 0.999**t)) + 1e-20)
        delta = [0.0] * n
        for k, part in enumerate(parts):
            for i in part:
                delta[i] = lr * math.exp(v[k]) * a[i]
        c = min(1.0, tau * math.sqrt(sum(y * y for y in x)) / math.sqrt(sum(y * y for y in delta)))
        x = [y - c * step for y, step in zip(x, delta, strict=True)]
        v = [y + 0.5 * math.log(c) for y in v]
    return x, [lr * math.exp(v[k]) for i in range(n) for k, part in enumerate(parts) if i in part]


@pytest.mark.parametrize("scope", ["element", "tensor", "optimizer"])
@pytest.mark.parametrize("mode", ["standard", "optimistic"])
def test_the_robust_form(mode: Any, scope: Any) -> None:
    grads, kappa = gradients(), 0.5 * (mode == "optimistic")
    options = {"mode": mode, "scope": scope, "trust": 0.1, "limit": 1e30}
    for fade in (None, 20.0, 80.0):
        default = {} if fade == 80.0 else {"fade": fade}
        assert_near(run(grads, **options, **default), robust_twin(grads, kappa, 0.1, scope, fade=fade or 1e99), rel=1e-7)
    free = run(grads, mode=mode, scope=scope, fade=None, trust=None, limit=1e9, lr=1e-3)
    assert_near(free, robust_twin(grads, kappa, math.inf, scope, 1e-3), rel=1e-7)  # far away, small steps are rounded
    assert abs(math.log(free[1][0] / 1e-3)) > 0.5


def corrected_twin(grads: list[list[float]], directions: list[list[float]], lr: float) -> list[float]:
    """Step sizes of the robust form with the hint taken off again."""
    sizes = []
    for i in range(len(grads[0])):
        v = m = s = hint = 0.0
        for t in range(1, len(grads)):
            g, last = grads[t][i], directions[t - 1][i]
            new = 0.5 * g * directions[t][i]
            d, hint = g * last + new - hint, new
            m, s = 0.9 * m + 0.1 * d, 0.999 * s + 0.001 * d * d
            v += 0.2 * (m / (1 - 0.9**t)) / (math.sqrt(s / (1 - 0.999**t)) + 1e-20)
        sizes.append(lr * math.exp(v))
    return sizes


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_with_momentum_the_hint_is_taken_off_again(mu: float) -> None:
    grads = gradients()
    directions = [grads[0]]
    for row in grads[1:]:
        directions.append([mu * v + g for v, g in zip(directions[-1], row, strict=True)])
    expected = corrected_twin(grads, directions, 1e-3)
    options: dict[str, Any] = {"lr": 1e-3, "trust": None, "limit": 1e9, "fade": None}
    momentum = partial(torch.optim.SGD, momentum=mu)
    always = run(grads, make=momentum, hint=Hint(scale=0.5, corrected=True), **options)[1]
    assert always == pytest.approx(expected, rel=1e-8)
    usual = run(grads, make=momentum, **options)[1]
    assert (usual == pytest.approx(expected, rel=1e-8)) is (mu > 0)


def test_which_optimizers_have_momentum() -> None:
    def has(make: Any) -> bool:
        param = nn.Parameter(torch.ones(1))
        probe = Probe(make([param]))
        probe.attach()
        param.grad = torch.ones(1)
        probe.optimizer.step()
        return probe.seen[0][0].momentum

    optim = torch.optim
    without = [optim.SGD, optim.RMSprop, lambda p: optim.Adam(p, betas=(0.0, 0.9))]
    others = [partial(optim.SGD, momentum=0.9), optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax]
    assert [has(make) for make in without] == [False] * 3
    assert [has(make) for make in others] == [True] * 5
    assert has(optim.Adadelta)  # its param group does not tell


def test_limits() -> None:
    up = [[1.0, 1.0, 1.0]] * 60
    assert max(run(up, trust=None, limit=2.0)[1]) == pytest.approx(0.2)
    down = [[(-1.0) ** t] * 3 for t in range(60)]
    assert min(run(down, mode="standard", trust=None, limit=2.0)[1]) == pytest.approx(0.05)
    params = [nn.Parameter(torch.zeros(4))]  # weights that are all 0 can leave it, and not too fast
    for optimizer, trust in (
        (torch.optim.SGD(params, 100.0), 0.15),
        (torch.optim.SGD(params, 100.0, momentum=0.9), 0.1),
        (torch.optim.AdamW(params, 100.0), 0.3),
        (torch.optim.RMSprop(params, 100.0), 0.3),
        (torch.optim.Adagrad(params, 100.0), 0.3),
    ):
        params[0].data.zero_()
        engine = OptimisticMetaGrad.attach(optimizer)
        params[0].grad = torch.ones(4)
        optimizer.step()
        assert params[0].norm().item() == pytest.approx(trust * 1e-3 * 2, rel=1e-4)
        assert engine.clipped == 1


# --------------------------------------------------------------------------------------------------- automatic differentiation
BASES: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0.3),
}


@pytest.mark.parametrize("scope", ["element", "tensor", "optimizer"])
@pytest.mark.parametrize("base", BASES)
def test_the_meta_gradient_is_that_of_the_loss(base: str, scope: Any) -> None:
    """The change of lr * w is beta times the negative gradient of the next loss to lr * w, whatever the base optimizer."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((2, 3), (4,))]

    def loss(values: Any) -> Tensor:
        return 0.01 * sum(
            ((v.sin() * torch.arange(1.0, 1 + v.numel()).double().view_as(v)).sum() ** 2 for v in values), torch.zeros(())
        )

    lr, rate = 0.02, 1e-3
    optimizer = BASES[base](params, lr=lr)
    engine = OptimisticMetaGrad.attach(optimizer, mode="standard", update="raw", meta_lr=rate, scope=scope)
    before: list[Tensor] = []
    sizes: list[Tensor] = []
    for _ in range(4):
        starts = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
        now = [lr * engine.factors().get(p, torch.ones((), dtype=torch.float64)) for p in params]
        if sizes:  # of the step before: x_t = x_{t-1} - (lr w) P, with x_t = starts
            leaves = [
                size.clone().expand(p.shape if scope == "element" else ()).clone() for size, p in zip(sizes, params, strict=True)
            ]
            leaves = leaves if scope != "optimizer" else leaves[:1] * 2
            for leaf in leaves:
                leaf.requires_grad_()
            directions = [(old - new) / size for old, new, size in zip(before, starts, sizes, strict=True)]
            points = [old - leaf * d for old, leaf, d in zip(before, leaves, directions, strict=True)]
            inputs = leaves[:1] if scope == "optimizer" else leaves
            slopes = torch.autograd.grad(loss(points), inputs)
            for slope, new_size, leaf in zip(slopes, now, inputs, strict=False):
                torch.testing.assert_close(new_size.expand_as(leaf), (leaf - rate * slope).clamp(min=0).detach())
        before, sizes = starts, [size.detach().clone() for size in now]
    assert float(sizes[0].sub(lr).abs().max()) > 1e-9


def test_one_factor_for_groups_with_several_rates() -> None:
    """Proportional to the true gradient of the loss to the common factor."""
    params = [nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 2.0)]
    optimizer = torch.optim.SGD([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.3}])
    engine = OptimisticMetaGrad.attach(optimizer, mode="standard", update="raw", meta_lr=1e-5, scope="optimizer")
    for _ in range(2):
        optimizer.zero_grad()
        sum(p.square().sum() * 3 for p in params).backward()
        optimizer.step()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = sum(3 * (x - factor * lr * 6 * x) ** 2 for x, lr in ((1.0, 0.1), (2.0, 0.3)))
    (slope,) = torch.autograd.grad(loss, factor)
    assert float(engine.factors()[params[0]]) == pytest.approx(1 - 1e-5 / 0.1**2 * float(slope))
