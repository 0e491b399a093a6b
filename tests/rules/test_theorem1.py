"""Theorem 1 of DCO: meta-training DCO General Descent by gradient descent on shifted least squares.

The meta-loss is quadratic in B, with Hessian ``2 S (x) X'X`` (``S`` the mean of ``G G'``). In the eigenvectors of the two
factors every entry of ``B - B*`` contracts by its own ``1 - 2 eta lambda_i sigma_j`` in a meta-step. So the whole course of the
excess loss on a target task is known in closed form; measured against it is the package's meta-gradient.
"""

import math

import pytest
import torch

from lightning_metaopt.episode import start, unroll
from lightning_metaopt.metagrads import Unrolled
from lightning_metaopt.objectives import ValidationLoss
from lightning_metaopt.rules import DCOGeneralDescent
from lightning_metaopt.tasks import LeastSquares


class Setting:
    def __init__(self, p, tasks, rows, seed=0):
        self.family = LeastSquares(dim=p, rows=rows, design="shifted", double=True, start_std=1.0)
        self.task, self.target = self.family.draw(seed, tasks), self.family.draw(seed + 1000, 100)
        self.rule = DCOGeneralDescent(self.family.shapes, matrix_scale=0.0).double()
        design = self.task.shared["design"]
        self.hessian = design.mT @ design
        self.best = torch.linalg.inv(self.hessian) / 2
        gradients = self.gradients(self.task)
        self.moment = gradients.mT @ gradients / tasks
        self.lam, self.u = torch.linalg.eigh(self.hessian)
        self.sig, self.v = torch.linalg.eigh(self.moment)
        self.smoothness = 2 * float(self.lam[-1] * self.sig[-1])  # L
        self.convexity = 2 * float(self.lam[0] * self.sig[0])  # mu

    def solutions(self, task):
        design = task.shared["design"].expand(task.size, -1, -1)
        return torch.linalg.lstsq(design, task.data["target"].unsqueeze(2)).solution.squeeze(2)

    def gradients(self, task):
        return 2 * (task.data["start"] - self.solutions(task)) @ self.hessian  # 2 X'X Z_i

    def excess(self, task):
        """Measured: loss minus least loss after one inner step of the rule, without cancellation."""
        end, _ = unroll(self.rule, start(self.rule, task), 1)
        apart = end.params["theta"] - self.solutions(task)
        return (apart @ task.shared["design"].mT).square().sum(1).mean().item()

    def predicted(self, task, begin, eta, steps):
        coordinates = self.u.mT @ (begin - self.best) @ self.v * (1 - 2 * eta * torch.outer(self.lam, self.sig)) ** steps
        apart = self.gradients(task) @ (self.u @ coordinates @ self.v.mT).mT
        return (apart @ task.shared["design"].mT).square().sum(1).mean().item()

    def limit(self, task, begin):
        unseen = self.v[:, self.sig < 1e-9 * self.sig[-1]]  # directions without a gradient in the training set never change
        apart = self.gradients(task) @ ((begin - self.best) @ unseen @ unseen.mT).mT
        return (apart @ task.shared["design"].mT).square().sum(1).mean().item()

    def slowest(self):
        """B* moved along the eigenvector of the least eigenvalue of the meta-Hessian."""
        return self.best + torch.outer(self.u[:, 0], self.v[:, 0])

    def train(self, eta, steps):
        """Meta-gradient descent through the package."""
        metagrad, objective = Unrolled(steps=1), ValidationLoss()
        episode = start(self.rule, self.task)
        for _ in range(steps):
            found = metagrad(self.rule, episode, objective).grads["matrix"]
            with torch.no_grad():
                self.rule.matrix.sub_(eta * found)

    def set(self, matrix):
        with torch.no_grad():
            self.rule.matrix.copy_(matrix)


def test_meta_hessian_is_the_kronecker_product():
    setting = Setting(p=3, tasks=5, rows=6)

    def meta_loss(matrix):
        end, _ = unroll(setting.rule, start(setting.rule, setting.task), 1, phi={"matrix": matrix}, order="second")
        return end.task.val_loss(end.params, {}).mean()

    point = torch.randn(3, 3, dtype=torch.float64)
    measured = torch.autograd.functional.hessian(meta_loss, point).reshape(9, 9)
    assert torch.allclose(measured, 2 * torch.kron(setting.hessian, setting.moment), rtol=1e-10)
    values = torch.linalg.eigvalsh(measured)
    assert float(values[-1]) == pytest.approx(setting.smoothness, rel=1e-10)
    assert float(values[0]) == pytest.approx(setting.convexity, rel=1e-7)


def test_meta_gradient_and_best_matrix():
    setting = Setting(p=5, tasks=8, rows=10)
    setting.set(torch.randn(5, 5, dtype=torch.float64))
    estimate = Unrolled(steps=1)(setting.rule, start(setting.rule, setting.task), ValidationLoss())
    expected = 2 * setting.hessian @ (setting.rule.matrix.detach() - setting.best) @ setting.moment
    assert torch.allclose(estimate.grads["matrix"], expected, rtol=1e-10)
    least = setting.task.optimum().mean()
    assert float(estimate.loss - least) == pytest.approx(setting.excess(setting.task), rel=1e-10)
    setting.set(setting.best)  # Eq. 21: one step solves every task
    assert setting.excess(setting.target) < 1e-20


@pytest.mark.parametrize(("p", "tasks", "seed"), [(5, 5, 0), (10, 10, 0), (10, 20, 0), (10, 100, 1)])
def test_slowest_mode_contracts_at_the_predicted_rate(p, tasks, seed):
    setting = Setting(p, tasks, rows=10 * p, seed=seed)
    eta, steps = 1 / setting.smoothness, 100
    setting.set(setting.slowest())
    before = setting.excess(setting.target)
    setting.train(eta, steps)
    measured = math.log(setting.excess(setting.target) / before)
    predicted = 2 * steps * math.log1p(-eta * setting.convexity)
    assert predicted < 0
    assert measured == pytest.approx(predicted, rel=1e-3)


def test_contraction_settles_at_the_slowest_rate_from_the_origin():
    setting = Setting(p=5, tasks=100, rows=100)
    eta = 1 / setting.smoothness
    contraction = (1 - eta * setting.convexity) ** 2
    setting.train(eta, 120)
    before = setting.excess(setting.target)
    setting.train(eta, 50)
    assert before > 1e-22  # still above rounding
    assert (setting.excess(setting.target) / before) ** (1 / 50) == pytest.approx(contraction, rel=2e-2)


@pytest.mark.parametrize("p", [5, 10])
def test_as_many_tasks_as_unknowns_follow_the_prediction(p):
    setting = Setting(p, tasks=p, rows=10 * p)
    assert setting.convexity > 0
    eta, begin = 1 / setting.smoothness, torch.zeros(p, p).double()
    for done in (0, 100, 200):
        assert setting.excess(setting.target) == pytest.approx(setting.predicted(setting.target, begin, eta, done), rel=1e-6)
        setting.train(eta, 100)


def test_too_few_tasks_stall():
    p = 10
    setting = Setting(p, tasks=p - 2, rows=10 * p)
    assert int((setting.sig > 1e-9 * setting.sig[-1]).sum()) == p - 2
    eta, begin = 1 / setting.smoothness, torch.zeros(p, p).double()
    limit = setting.limit(setting.target, begin)
    first, first_seen = setting.excess(setting.target), setting.excess(setting.task)
    setting.train(eta, 500)
    assert setting.excess(setting.target) == pytest.approx(setting.predicted(setting.target, begin, eta, 500), rel=1e-6)
    # In the limit of many steps the training tasks are solved; the excess on new tasks stays near that of no step at all.
    assert setting.predicted(setting.task, begin, eta, 10**9) < 1e-9 * first_seen
    assert setting.predicted(setting.target, begin, eta, 10**9) == pytest.approx(limit, rel=1e-3)
    assert limit > 0.05 * first
    unseen = setting.v[:, :2]
    assert (setting.rule.matrix.detach() @ unseen).abs().max() < 1e-12


@pytest.mark.parametrize("p", [10, 20])
def test_many_tasks_reach_1e_8_in_the_predicted_number_of_steps(p):
    setting = Setting(p, tasks=10 * p, rows=10 * p)
    eta, begin = 1 / setting.smoothness, torch.zeros(p, p).double()
    goal = 1e-8 * setting.excess(setting.target)
    steps = next(k for k in range(10_000) if setting.predicted(setting.target, begin, eta, k) <= goal)
    assert 30 < steps < 1000
    setting.train(eta, steps - 1)
    assert setting.excess(setting.target) > goal
    setting.train(eta, 1)
    assert setting.excess(setting.target) <= goal


def test_many_tasks_reach_the_limit_of_double_precision():
    setting = Setting(p=10, tasks=100, rows=100)
    first = setting.excess(setting.target)
    setting.train(1 / setting.smoothness, 700)
    assert setting.excess(setting.target) < 1e-25 * first
    assert (setting.rule.matrix - setting.best).abs().max() < 1e-13


def test_a_step_beyond_two_over_l_diverges():
    setting = Setting(p=5, tasks=50, rows=50)
    first = setting.excess(setting.target)
    setting.train(1.9 / setting.smoothness, 500)
    assert setting.excess(setting.target) < 1e-6 * first
    setting.train(2.1 / setting.smoothness, 600)  # from what rounding has left, 1.1 times as far in every step
    assert setting.excess(setting.target) > first
