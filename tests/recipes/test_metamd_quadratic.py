"""The loops of Figure 1 against the package."""

import numpy as np
import pytest
import torch
from recipe_script import load_script

import lightning_metaopt as lmo
from lightning_metaopt.episode import start
from lightning_metaopt.objectives import Objective
from lightning_metaopt.task import Task


@pytest.fixture(scope="module")
def recipe():
    return load_script("metamd/quadratic.py")


class PlaneTask(Task):
    def init(self, generator):
        return {"theta": self.data["start"]}, {}

    def loss(self, params, buffers, batch):
        theta = params["theta"]
        return (batch["h"] * theta.square() / 2 - batch["b"] * theta).sum(1)


class Divergence(Objective):
    def __call__(self, rule, start, end, losses):
        return rule.divergence(end.params, end.origin)


def test_the_meta_gradient_is_that_of_forward_mode_and_of_reverse_mode(recipe):
    tasks = recipe.sample((0.3, 14.0), 5, seed=0)
    h, b, begin = (torch.tensor(value) for value in tasks)
    rule = lmo.rules.DiagonalMirror({"theta": (2,)}, lr=1.0).double()
    logs = np.log([9.0, 31.0])
    with torch.no_grad():
        rule.log_metric["theta"].copy_(torch.tensor(logs))
    episode = start(rule, PlaneTask({"h": h, "b": b, "start": begin}))
    value, grad = recipe.meta_gradient(logs, tasks, steps=40)
    for how in (lmo.ForwardMode(steps=40), lmo.Unrolled(steps=40)):
        found = how(rule, episode, Divergence())
        assert float(found.loss) == pytest.approx(value, rel=1e-10)
        np.testing.assert_allclose(found.grads["log_metric.theta"].numpy(), grad, rtol=1e-9)


def test_the_optimizers_are_those_of_torch(recipe):
    h, b, begin = tasks = recipe.sample((0.3, 14.0), 3, seed=1)
    options = {
        "SGD": (np.array([[0.02]]), lambda p: torch.optim.SGD(p, lr=0.02)),
        "momentum": (np.array([[0.02, 0.9]]), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
        "Adam": (np.array([[0.3, 0.8, 0.99]]), lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.8, 0.99))),
    }
    for name, (make, _) in recipe.baselines().items():
        row, torch_make = options[name]
        counts = recipe.iterations(make(row), tasks, 1)[0]
        for problem in range(3):
            theta = torch.nn.Parameter(torch.tensor(begin[problem]))
            optimizer, count = torch_make([theta]), 0
            while True:
                theta.grad = torch.tensor(h[problem]) * theta.detach() - torch.tensor(b[problem])
                if theta.grad.norm() < recipe.ENOUGH:
                    break
                optimizer.step()
                count += 1
            assert count == counts[problem]


def test_the_metric_is_learned_and_half_of_its_step_needs_few_iterations(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "INNER", 150)
    monkeypatch.setattr(recipe, "META", 150)
    monkeypatch.setattr(recipe, "LIMIT", 3000)
    metric = recipe.meta_train((0.3, 14.0), seed=0)
    assert 5 < metric[1] / metric[0] < 60  # 1 at the start, 47 for the mean problem
    h, _, _ = tasks = recipe.sample((0.3, 14.0), 20, seed=3)
    counts = recipe.iterations(recipe.descent(metric[None] * 2), tasks, 1)
    plain = recipe.iterations(recipe.descent(np.full((1, 2), float(h.max()) * 0.55)), tasks, 1)
    assert counts.mean() < plain.mean() / 2


def test_bounds_and_limits(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "LIMIT", 50)
    tasks = recipe.sample((0.3, 14.0), 4, seed=2)
    counts = recipe.iterations(recipe.descent(np.array([[1.0, 1.0], [1e-3, 1e-3], [1e6, 1e6]])), tasks, 3)
    assert (counts[1:] == 50).all()  # diverges; stands still
    assert np.isfinite(recipe.iterations(recipe.descent(2 * np.array([[0.3, 14.0]])), tasks, 1)).all()
