"""Least squares with and without constraints, against lstsq, cvxpy and scipy."""

import pytest
import torch

from lightning_metaopt.episode import start, unroll
from lightning_metaopt.rules import DCOGradient, NonNegative, Simplex
from lightning_metaopt.tasks import LeastSquares, NonNegativeLeastSquares, SimplexLeastSquares

DESIGNS = ["fresh", "fixed", "shifted"]
CONSTRAINED = {"simplex": SimplexLeastSquares, "nonnegative": NonNegativeLeastSquares}


def design_of(task, b):
    return task.shared["design"] if "design" in task.shared else task.data["design"][b]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_losses_and_optimum_are_those_of_each_problem(design, mean):
    task = LeastSquares(dim=4, rows=9, design=design, mean=mean, double=True).draw(seed=0, size=3)
    theta = torch.randn(3, 4, dtype=torch.float64)
    losses, optimum = task.loss({"theta": theta}, {}, task.batch(0)), task.optimum()
    for b in range(3):
        matrix, target = design_of(task, b), task.data["target"][b]
        best = torch.linalg.lstsq(matrix, target.unsqueeze(1)).solution.squeeze(1)
        for found, point in ((losses[b], theta[b]), (optimum[b], best)):
            expected = (matrix @ point - target).square().sum() / (9 if mean else 1)
            assert torch.allclose(found, expected, rtol=1e-12)


def test_optimum_with_fewer_rows_than_unknowns_is_zero():
    assert LeastSquares(dim=6, rows=4, double=True).draw(0, 2).optimum().abs().max() < 1e-25


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_shared_between_problems_and_draws(design):
    family = LeastSquares(dim=4, rows=9, design=design)
    one, again, other = family.draw(0, 3), family.draw(0, 3), family.draw(1, 3)
    assert torch.equal(one.data["target"], again.data["target"])
    assert not torch.equal(one.data["target"], other.data["target"])
    if design == "fresh":
        assert not torch.equal(one.data["design"][0], one.data["design"][1])
    else:
        assert torch.equal(one.shared["design"], other.shared["design"])
        elsewhere = LeastSquares(dim=4, rows=9, design=design, design_seed=1).draw(0, 3)
        assert not torch.equal(one.shared["design"], elsewhere.shared["design"])


def test_shifted_problems_have_one_least_value_and_shifted_solutions():
    task = LeastSquares(dim=4, rows=9, design="shifted", double=True).draw(seed=0, size=5)
    assert torch.allclose(task.optimum(), task.optimum()[:1].expand(5), rtol=1e-12)
    solutions = torch.linalg.lstsq(task.shared["design"].expand(5, 9, 4), task.data["target"].unsqueeze(2)).solution
    assert (solutions - solutions.mean(0)).std() > 0.5


def test_start_and_entries_have_the_stated_spread():
    start_point = LeastSquares(dim=50, rows=50, start_std=2.0).draw(0, 200).init(torch.Generator())[0]["theta"]
    assert start_point.std() == pytest.approx(2.0, rel=0.05)
    assert LeastSquares(dim=5, rows=5).draw(0, 2).init(torch.Generator())[0]["theta"].abs().max() == 0
    task = LeastSquares(dim=50, rows=50).draw(0, 50)
    assert task.data["design"].std() == pytest.approx(1.0, rel=0.02)
    assert task.data["target"].std() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_solutions_are_those_of_cvxpy(name):
    cp = pytest.importorskip("cvxpy")
    task = CONSTRAINED[name](dim=12, rows=20, double=True).draw(seed=0, size=4)
    solution, optimum = task.solution(), task.optimum()
    for b in range(4):
        theta = cp.Variable(12)
        distance = cp.sum_squares(task.data["design"][b].numpy() @ theta - task.data["target"][b].numpy())
        constraints = [theta >= 0] + ([cp.sum(theta) == 1] if name == "simplex" else [])
        problem = cp.Problem(cp.Minimize(distance / 40), constraints)
        problem.solve(solver=cp.CLARABEL)
        assert float(optimum[b]) == pytest.approx(problem.value, rel=1e-5)
        assert float(optimum[b]) <= problem.value + 1e-9
        assert torch.allclose(solution[b], torch.from_numpy(theta.value), atol=1e-4)


def test_nonnegative_solutions_are_those_of_scipy():
    nnls = pytest.importorskip("scipy.optimize").nnls
    task = NonNegativeLeastSquares(double=True).draw(seed=1, size=10)
    solution = task.solution()
    for b in range(10):
        expected, _ = nnls(task.data["design"][b].numpy(), task.data["target"][b].numpy())
        assert torch.allclose(solution[b], torch.from_numpy(expected), atol=1e-8)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_excess_is_the_difference_to_the_optimum(name):
    plain, excess = (CONSTRAINED[name](double=True, excess=e).draw(seed=2, size=5) for e in (False, True))
    params, _ = plain.init(torch.Generator())
    if name == "simplex":
        assert torch.allclose(params["theta"].sum(1), torch.ones(5).double())
    assert torch.equal(plain.val_loss(params, {}), plain.loss(params, {}, plain.batch(0)))
    assert torch.equal(plain.loss(params, {}, plain.batch(0)), excess.loss(params, {}, excess.batch(0)))
    assert torch.allclose(excess.val_loss(params, {}), plain.val_loss(params, {}) - plain.optimum(), rtol=1e-10)
    assert excess.val_loss({"theta": excess.solution()}, {}).abs().max() < 1e-15
    part = excess.select(slice(1, 3))
    params = {"theta": params["theta"][1:3]}
    assert torch.allclose(part.val_loss(params, {}), plain.select(slice(1, 3)).val_loss(params, {}) - part.optimum(), rtol=1e-10)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_constrained_rule_stays_in_the_set_and_finds_the_optimum(name):
    constraint = Simplex() if name == "simplex" else NonNegative()
    family = CONSTRAINED[name](dim=8, rows=40, spread=0.0, excess=True, double=True)
    task = family.draw(seed=0, size=5)
    rule = DCOGradient(family.shapes, scale=1.5, constraint=constraint).double()
    end, _ = unroll(rule, start(rule, task), 200)
    assert end.params["theta"].min() >= 0
    if name == "simplex":
        assert torch.allclose(end.params["theta"].sum(1), torch.ones(5).double(), atol=1e-12)
    assert task.val_loss(end.params, {}).abs().max() < 1e-12


@pytest.mark.parametrize("family", [LeastSquares, SimplexLeastSquares, NonNegativeLeastSquares])
def test_bad_options(family):
    with pytest.raises(ValueError, match="at least 1"):
        family(dim=0)
    if family is LeastSquares:
        with pytest.raises(ValueError, match="design must be"):
            family(design="random")
