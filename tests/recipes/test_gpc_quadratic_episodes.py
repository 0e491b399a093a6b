"""The plain loops of the convex recipes against Algorithm 1 by automatic differentiation and Algorithm 6 one seed at a time."""

import csv

import numpy as np
import pytest
import torch
from recipe_script import RECIPES, load_script


@pytest.fixture(scope="module")
def recipe():
    return load_script("gpc/quadratic_episodes.py")


def algorithm_1(recipe, kind, rate, starts, history=4):
    """Mean losses of episodes, (episodes,), for one row of starts (episodes, d), by double backward."""
    eigen = torch.tensor(recipe.spectrum(starts.shape[1], 100.0))
    shape = {"scalar": (history, 1), "diagonal": (history, len(eigen)), "full": (history, len(eigen), len(eigen))}[kind]
    m = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def moved(x, disturbances):
        total = sum(own @ d if kind == "full" else own * d for own, d in zip(m, disturbances, strict=True))
        return x - recipe.ETA * eigen * x - total

    paid = []
    for start in torch.tensor(starts):
        x, g, losses = [start], [], []
        for t in range(recipe.STEPS):
            losses.append(float((eigen * x[t] ** 2).sum()) / 2)
            g.append(eigen * x[t])
            known = [torch.zeros_like(start)] * history + g
            x.append(moved(x[t], known[: -history - 1 : -1]).detach())
            if t + 1 >= history + 1:
                point = x[t - 1]
                for end in (t, t + 1):  # the steps t - 1 and t
                    point = moved(point, [g[end - 1 - h] if end - 1 - h >= 0 else torch.zeros_like(start) for h in range(history)])
                (grad,) = torch.autograd.grad((eigen * point**2).sum() / 2, m)
                m = (m - rate * grad).detach().requires_grad_()
        paid.append(np.mean(losses))
    return paid


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_algorithm_1(recipe, kind):
    starts = np.random.default_rng(0).standard_normal((2, 3, 4))  # episodes, rows, d
    rates = np.array([0.05, 0.1, 0.0])
    found = recipe.control(kind, rates, starts)
    for row, rate in enumerate(rates):
        np.testing.assert_allclose(found[:, row], algorithm_1(recipe, kind, rate, starts[:, row]), rtol=1e-11)
    assert found[1, 0] < 0.7 * recipe.control(kind, np.zeros(1), starts[:, :1])[1, 0]


def test_first_order_methods_and_a_fixed_controller(recipe):
    eigen, starts = recipe.spectrum(3, 10.0), np.ones((1, 3))
    powers = (1 - recipe.ETA * eigen) ** (2 * np.arange(recipe.STEPS)[:, None])
    expected = (eigen * powers).sum() / 2 / recipe.STEPS
    assert recipe.first_order(recipe.ETA, 0.0, starts, eigen) == pytest.approx(expected)
    assert recipe.frozen(np.zeros((1, 2)), eigen, starts)[0] == pytest.approx(expected)
    # M^h = eta mu^h, h >= 0, is momentum, as far as the history goes; eta itself is the base step.
    long = 0.1 * 0.5 ** np.arange(recipe.STEPS)[None]
    long[0, 0] = 0.0
    assert recipe.frozen(long, eigen, starts)[0] == pytest.approx(recipe.first_order(0.1, 0.5, starts, eigen))


@pytest.mark.parametrize("baseline", [np.nan, 0.9])
def test_algorithm_6(recipe, baseline):
    dim, episodes, history, rate = 2, 3, 3, 0.1
    random = np.random.default_rng(0)
    eigen, m, k, waiting, means, paid = recipe.spectrum(dim, 10.0), np.zeros(history), 0, [], {}, []
    for _ in range(episodes):
        x, gradients, noises, losses = np.ones(dim), [], [], []
        for t in range(recipe.STEPS):
            u = random.standard_normal((1, history))[0]
            noises.append(u / np.linalg.norm(u))
            gradients.append(eigen * x)
            losses.append((eigen * x**2).sum() / 2)
            last = gradients[::-1][:history]
            x = x - recipe.ETA * eigen * x - sum(c * g for c, g in zip(m + 0.1 * noises[-1], last, strict=False))
            seen = (eigen * x**2).sum() / 2
            usual = 0.0 if np.isnan(baseline) else means.get(t, seen)
            means[t] = baseline * means.get(t, seen) + (1 - baseline) * seen
            waiting.append(history / 0.1 * (seen - usual) * (sum(noises[-3:]) if len(noises) >= 3 else np.zeros(history)))
            k += 1
            if len(waiting) == 3:  # a delay of two steps
                m = np.clip(m - rate * k**-0.75 * waiting.pop(0), -0.5, 0.5)
        paid.append(np.mean(losses))
    found, losses = recipe.bandit(dim, np.array([rate]), np.array([baseline]), [episodes])
    np.testing.assert_allclose(found[episodes][0], m, rtol=1e-10)
    np.testing.assert_allclose(losses[:, 0], paid, rtol=1e-10)
    assert abs(m).max() > 1e-3


def test_the_table_of_the_results(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    recipe.of_kinds(tmp_path)
    with (tmp_path / "kinds.csv").open() as file, (RECIPES / "gpc/results/episodes/kinds.csv").open() as stored:
        found, expected = list(csv.reader(file)), list(csv.reader(stored))
    assert [row[0] for row in found] == [row[0] for row in expected]
    for row, known in zip(found[1:], expected[1:], strict=True):
        assert [float(cell) for cell in row[1:] if cell] == pytest.approx([float(cell) for cell in known[1:] if cell], rel=1e-3)
    assert (tmp_path / "kinds.png").stat().st_size > 10_000
