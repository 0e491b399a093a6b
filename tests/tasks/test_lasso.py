"""LASSO and Rosenbrock against closed forms."""

import math

import pytest
import torch

from lightning_metaopt import tasks


def at(task, theta):
    return task.loss({"theta": theta}, {}, task.batch(0))


def test_the_loss_is_the_formula_and_vanishes_nowhere_below_its_optimum():
    task = tasks.Lasso(std=3.0, dim=3, penalty=0.2, double=True).draw(seed=0, size=2)
    theta = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]], dtype=torch.float64)
    for index in range(2):
        matrix, target = task.data["matrix"][index], task.data["target"][index]
        expected = sum((matrix[i] @ theta[index] - target[i]) ** 2 for i in range(3)) / 2 + 0.2 * theta[index].abs().sum()
        assert abs(at(task, theta)[index] - expected) < 1e-12


def test_orthogonal_designs_are_solved_by_soft_thresholding():
    task = tasks.Lasso(std=1.0, dim=4, penalty=0.3, double=True).draw(seed=0, size=5)
    task.data["matrix"] = torch.linalg.qr(task.data["matrix"]).Q
    image = torch.bmm(task.data["matrix"].mT, task.data["target"].unsqueeze(2)).squeeze(2)
    solution = image.sign() * (image.abs() - 0.3).clamp(min=0)
    assert (solution == 0).any()
    assert (solution != 0).any()
    least = at(task, solution)
    torch.testing.assert_close(least, 0.5 * task.data["target"].square().sum(1) - 0.5 * solution.square().sum(1))
    for seed in range(20):
        noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (at(task, solution + 0.01 * noise) > least).all()


def test_without_penalty_it_is_a_quadratic():
    task = tasks.Lasso(std=2.0, dim=3, penalty=0.0, double=True).draw(seed=0, size=4)
    solution = torch.linalg.solve(task.data["matrix"], task.data["target"])
    assert at(task, solution).max() < 1e-20
    theta = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(at(task, theta).sum(), theta)
    curved = torch.einsum("bij,bik,bk->bj", task.data["matrix"], task.data["matrix"], theta.detach() - solution)
    torch.testing.assert_close(found, curved)


def test_distributions():
    task = tasks.Lasso(std=50.0).draw(seed=0, size=2000)
    matrix, target, start = (task.data[name] for name in ("matrix", "target", "start"))
    assert matrix.shape == (2000, 10, 10)
    assert abs(matrix.std() / 50 - 1) < 0.01
    assert abs(matrix.mean()) < 0.5
    assert target.abs().max() <= 1
    assert abs(target.var() - 1 / 3) < 0.01
    assert abs(start.std() / 0.01 - 1) < 0.02

    mixture = tasks.Lasso().draw(seed=0, size=3000).data["matrix"]
    assert mixture.min() >= 0
    largest = mixture.flatten(1).max(1).values
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 1.0)):  # one hundred entries come close to their range
        assert abs(((largest > low) & (largest <= high)).float().mean() - 1 / 3) < 0.04


def test_random_scaling_is_log_uniform_for_each_problem():
    plain = tasks.Lasso(std=1.0, double=True).draw(seed=0, size=500).data["matrix"]
    high = math.log(200)
    scaled = tasks.Lasso(std=1.0, log_scale=(0.0, high), double=True).draw(seed=0, size=500).data["matrix"]
    ratio = scaled / plain
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    logs = ratio[:, 0, 0].log()
    assert 0 <= logs.min() < 0.1
    assert high - 0.1 < logs.max() <= high
    assert abs(logs.mean() - high / 2) < 0.3


def test_a_common_scale_is_one_for_each_draw():
    plain, scaled = (
        [tasks.Lasso(std=1.0, log_scale=scale, common_scale=True).draw(seed=seed, size=4).data["matrix"] for seed in range(50)]
        for scale in ((0.0, 0.0), (0.0, 3.0))
    )
    ratio = torch.stack(scaled) / torch.stack(plain)
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    assert ratio[:, 0, 0, 0].log().std() > 0.5


def test_rosenbrock_has_its_minimum_at_one_and_the_known_gradient():
    family = tasks.Rosenbrock(double=True)
    task = family.draw(seed=0, size=1000)
    theta = task.init(torch.Generator())[0]["theta"].clone().requires_grad_()
    assert abs(theta.std() - 1) < 0.05
    assert not at(task, torch.ones(1000, 2, dtype=torch.float64)).any()
    (found,) = torch.autograd.grad(at(task, theta).sum(), theta)
    x, y = theta.detach().unbind(1)
    torch.testing.assert_close(found, torch.stack([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)], 1))
    assert float(at(task, torch.tensor([[-1.2, 1.0]], dtype=torch.float64))) == pytest.approx(24.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.Lasso(dim=0), "dim"),
        (lambda: tasks.Lasso(std=-1.0), "std"),
        (lambda: tasks.Lasso(ranges=()), "ranges"),
        (lambda: tasks.Lasso(ranges=(0.0,)), "ranges"),
        (lambda: tasks.Lasso(penalty=-0.1), "penalty"),
        (lambda: tasks.Lasso(log_scale=(1.0, 0.0)), "log_scale"),
        (lambda: tasks.Rosenbrock(start_std=-1.0), "start_std"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
