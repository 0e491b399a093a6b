"""The full controller against its linear system, and its projection against a solver."""

from __future__ import annotations

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll

D = torch.float64


def test_the_projection_is_the_nearest_controller_within_the_bounds() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    rule = lmo.rules.DisturbanceFeedback({"w": (1,)}, 3, kappa=1.2, gamma=0.5, shrink=0.1).double()
    assert rule.bounds == pytest.approx([0.9 * 1.2**3 * 0.5, 0.9 * 1.2**3 * 0.25, 0.9 * 1.2**3 * 0.125])
    far = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    with torch.no_grad():
        rule.controller.copy_(far)
    rule.project_()
    for lag, bound in enumerate(rule.bounds):
        matrix = cvxpy.Variable((3, 3))
        distance = cvxpy.sum_squares(matrix - far[lag].numpy())
        cvxpy.Problem(cvxpy.Minimize(distance), [cvxpy.sigma_max(matrix) <= bound]).solve(solver="CLARABEL")
        torch.testing.assert_close(rule.controller.detach()[lag], torch.tensor(matrix.value, dtype=D), rtol=0, atol=1e-5)
    inside = rule.controller.detach().clone() * 0.9
    with torch.no_grad():
        rule.controller.copy_(inside)
    rule.project_()
    assert torch.equal(rule.controller.detach(), inside)


def test_with_no_controller_gradients_act_one_step_late() -> None:
    family = lmo.tasks.LeastSquares(dim=2, rows=5, mean=True, double=True, start_std=1.0)
    rule = lmo.rules.DisturbanceFeedback(family.shapes, 2, lr=0.1, decay=0.05).double()
    begin = start(rule, family.draw(seed=0, size=1))
    design, target, x = begin.task.data["design"][0], begin.task.data["target"][0], begin.params["theta"][0]
    late = torch.zeros(2, dtype=D)
    for _ in range(20):
        x, late = 0.95 * x - 0.1 * late, 2 * design.T @ (design @ x - target) / 5
    torch.testing.assert_close(unroll(rule, begin, 20)[0].params["theta"][0].detach(), x, rtol=1e-10, atol=1e-12)


def test_refusals() -> None:
    for options, message in [
        ({"history": 0}, "history"),
        ({"lr": -1.0}, "lr must"),
        ({"kappa": 0.5}, "kappa"),
        ({"gamma": 1.0}, "gamma"),
    ]:
        with pytest.raises(ValueError, match=message):
            lmo.rules.DisturbanceFeedback({"w": (2,)}, **options)
