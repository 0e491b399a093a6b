"""Differentiating through a LearnedOptimizer with ``higher``, against the package's own inner loop."""

from typing import Any

import higher
import pytest
import torch
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.differentiable import register_higher
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rule import Rule

SHAPES = {"theta": (4,)}
RULES: dict[str, Any] = {
    "momentum": lambda: lmo.rules.HeavyBall(0.05),
    "adam": lambda: lmo.rules.Adam(0.05),
    "sized": lambda: lmo.rules.DCOMomentum(SHAPES, scale=5.0),
    "joint": lambda: lmo.rules.DCOGeneralDescent(SHAPES, matrix_scale=0.03),
}


class Point(nn.Module):
    """The unknown of a least-squares problem; the module computes the loss."""

    def __init__(self, task: Any, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())
        self.task = task

    def forward(self) -> Tensor:
        loss: Tensor = self.task.loss({"theta": self.theta.unsqueeze(0)}, {}, self.task.batch(0)).sum()
        return loss


def problem() -> tuple[Any, Tensor]:
    task = lmo.tasks.LeastSquares(dim=4, rows=6, mean=True, start_std=1.0, double=True).draw(seed=3, size=1)
    return task, task.init(torch.Generator())[0]["theta"][0]


def through_higher(rule: Rule, override: dict[str, Any], steps: int = 4) -> tuple[Tensor, Tensor]:
    register_higher()
    task, theta = problem()
    point = Point(task, theta)
    optimizer = lmo.LearnedOptimizer(point.named_parameters(), rule)
    with higher.innerloop_ctx(point, optimizer, override=override, copy_initial_weights=False) as (inner, differentiable):
        for _ in range(steps):
            differentiable.step(inner())
        return inner(), point.theta


@pytest.mark.parametrize("name", RULES)
def test_equals_unroll(name: str) -> None:
    rule = RULES[name]().double()
    phi = dict(rule.named_parameters())
    loss, theta = through_higher(rule, {"phi": [phi]})
    found = torch.autograd.grad(loss, [*phi.values(), theta])
    task, _ = problem()
    begin = start(rule, task)
    begin.params["theta"].requires_grad_()
    end, _ = unroll(rule, begin, 4, order="second")
    expected_loss = task.loss(end.params, {}, task.batch(0)).sum()
    expected = torch.autograd.grad(expected_loss, [*phi.values(), begin.params["theta"]])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-12)


def test_learning_rates_and_weight_decay() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rule = lmo.rules.GradientDescent(0.1).double()

    def loss(rate: Tensor) -> Tensor:
        return through_higher(rule, {"lr": [rate], "weight_decay": [0.2]}, steps=2)[0]

    assert torch.autograd.gradcheck(loss, lr)
    with torch.no_grad():
        by_hand = problem()
    task, theta = by_hand
    for _ in range(2):
        point = Point(task, theta)
        point().backward()
        assert point.theta.grad is not None
        theta = theta * (1 - 0.5 * 0.2) - 0.5 * rule.describe()["lr"] * point.theta.grad
    torch.testing.assert_close(loss(lr), Point(task, theta)())


def test_the_norm_guard_is_refused() -> None:
    register_higher()
    point = Point(*problem())
    optimizer = lmo.LearnedOptimizer(point.parameters(), lmo.rules.GradientDescent(), max_update_norm=1.0)
    with pytest.raises(ValueError, match="max_update_norm is a guard"):
        higher.get_diff_optim(optimizer, list(point.parameters()))
