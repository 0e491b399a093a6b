"""Regularised epochs and averaged iterates (Algorithms 2 and 3) against plain loops with double backward."""

from __future__ import annotations

import io

import pytest
import torch
from contracts import NETS
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start
from lightning_metaopt.metagrads import Epochs
from lightning_metaopt.objectives import FinalLoss, ValidationLoss

D = torch.float64
BETA, LENGTH, ETA, HISTORY, ROLLOUT, RATE = 0.4, 10, 0.1, 2, 2, 0.01


def net_loss(x: dict[str, Tensor], task: lmo.Task, step: int) -> Tensor:
    return task.loss(x, {"seen": torch.zeros(task.size, 1)}, task.batch(step))


def regularised(x: dict[str, Tensor], center: dict[str, Tensor], task: lmo.Task, step: int, beta: float) -> Tensor:
    squares = [(leaf - center[name]).square().reshape(task.size, -1).sum(1) for name, leaf in x.items()]
    return net_loss(x, task, step) + beta * torch.stack(squares).sum(0)


def slopes(x: dict[str, Tensor], *where, graph: bool = False) -> dict[str, Tensor]:
    x = {n: leaf if leaf.requires_grad else leaf.detach().requires_grad_() for n, leaf in x.items()}
    loss = regularised(x, *where).sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values()), create_graph=graph), strict=True))


def algorithm_2(task: lmo.Task, begin: dict[str, Tensor], steps: int, beta: float, average: bool):
    """Yields (x, M) after every step; lists of gradients, no rings, everything differentiated from the rollout's text."""
    m, x, center = torch.zeros(HISTORY, dtype=D), begin, begin
    path, met = [begin], []
    zero = {n: torch.zeros_like(leaf) for n, leaf in begin.items()}
    for t in range(steps):
        local = len(path) - 1
        first = t - local  # step of the episode at which the epoch began
        met.append(slopes(x, center, task, t, beta))

        def old(s, met=met):
            return met[s] if s >= 0 else zero

        x = {n: x[n] - ETA * met[-1][n] - sum(float(m[h]) * old(local - h)[n] for h in range(HISTORY)) for n in x}
        path.append(x)
        now = local + 1
        if now >= HISTORY + ROLLOUT - 1:
            own = m.clone().requires_grad_()
            point = path[now - ROLLOUT]
            for s in range(now - ROLLOUT, now):
                g = slopes(point, center, task, first + s, beta, graph=True)
                point = {n: point[n] - ETA * g[n] - sum(own[h] * old(s - h)[n] for h in range(HISTORY)) for n in point}
            (grad,) = torch.autograd.grad(regularised(point, center, task, t + 1, beta).mean(), [own])
            m = (m - RATE * grad).detach()
        if now == LENGTH:
            x = {n: sum(p[n] for p in path[:-1]) / LENGTH for n in x} if average else x
            center, path, met = x, [x], []
        yield x, m


@pytest.mark.parametrize(("beta", "average"), [(BETA, True), (0.0, False)])
def test_algorithm_2_is_a_plain_loop_over_100_steps(beta: float, average: bool) -> None:
    task = NETS.draw(seed=0, size=2)
    rule = lmo.rules.GradientPerturbation(HISTORY, ETA).double()
    episode = start(rule, task)
    how = Epochs(lmo.Counterfactual(ROLLOUT), LENGTH, beta, "average" if average else "last")
    for x, m in algorithm_2(task, episode.params, 100, beta, average):
        estimate = how(rule, episode, FinalLoss())
        episode = estimate.episode
        with torch.no_grad():
            rule.coefficients.sub_(RATE * estimate.grads["coefficients"])
        torch.testing.assert_close(rule.coefficients.detach(), m, rtol=1e-8, atol=1e-10)
        for name, leaf in x.items():
            torch.testing.assert_close(episode.params[name], leaf, rtol=1e-8, atol=1e-10)
    assert rule.coefficients.abs().max() > 0.005
    assert episode.step == 100


def test_algorithm_3_is_gradient_descent_on_regularised_problems() -> None:
    task = NETS.draw(seed=0, size=2)
    rule = lmo.rules.GradientPerturbation(1, ETA).double()  # M = 0: gradient descent
    episode = start(rule, task)
    how = Epochs(lmo.Unrolled(steps=1), LENGTH, BETA, "average")
    x = center = episode.params
    walked = []
    for t in range(100):
        walked.append(x)
        grad = slopes(x, center, task, t, BETA)
        x = {n: x[n] - ETA * grad[n] for n in x}
        if len(walked) == LENGTH:
            x = center = {n: torch.stack([p[n] for p in walked]).mean(0) for n in x}
            walked = []
        episode = how(rule, episode, FinalLoss()).episode
        for name, leaf in x.items():
            torch.testing.assert_close(episode.params[name], leaf, rtol=1e-9, atol=1e-11)


def test_full_matrices_of_algorithm_1_are_a_plain_loop() -> None:
    # x+ = (1 - d) x - eta g - sum M^h g, on a quadratic of two unknowns, 100 steps; gradients written out.
    family = lmo.tasks.LeastSquares(dim=2, rows=5, mean=True, double=True, start_std=1.0)
    rule = lmo.rules.GradientPerturbation(2, 0.05, 0.01, "full", family.shapes, bound=0.3).double()
    episode, how, rate = start(rule, family.draw(seed=2, size=1)), lmo.Counterfactual(2), 5e-3
    design, target = episode.task.data["design"][0], episode.task.data["target"][0]

    def slope(x: Tensor) -> Tensor:
        return 2 * design.T @ (design @ x - target) / 5

    m, path, met = torch.zeros(2, 2, 2, dtype=D), [episode.params["theta"][0]], []
    for t in range(100):
        met.append(slope(path[-1]))
        old = [met[t - h] if t >= h else torch.zeros(2, dtype=D) for h in range(2)]
        path.append(0.99 * path[-1] - 0.05 * met[-1] - m[0] @ old[0] - m[1] @ old[1])
        if t + 1 >= 3:
            own, x = m.clone().requires_grad_(), path[t - 1]
            for s in (t - 1, t):
                older = met[s - 1] if s >= 1 else torch.zeros(2, dtype=D)
                x = 0.99 * x - 0.05 * slope(x) - own[0] @ met[s] - own[1] @ older
            (grad,) = torch.autograd.grad((design @ x - target).square().mean(), [own])
            for h, part in enumerate((m - rate * grad).detach()):
                u, size, v = torch.linalg.svd(part)
                m[h] = u @ torch.diag(size.clamp(max=0.3)) @ v
        estimate = how(rule, episode, FinalLoss())
        episode = estimate.episode
        with torch.no_grad():
            rule.coefficients.sub_(rate * estimate.grads["coefficients"])
        rule.project_()
        torch.testing.assert_close(rule.coefficients.detach(), m, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(episode.params["theta"][0], path[-1], rtol=1e-9, atol=1e-11)
    assert m.abs().max() > 0.02


def test_validation_does_not_see_the_regulariser_and_chunks_follow() -> None:
    rule = lmo.rules.HeavyBall(lr=0.05).double()
    begin = start(rule, NETS.draw(seed=0, size=4))
    whole, chunked = (Epochs(lmo.Unrolled(steps=1, chunk=chunk), 50, 0.7) for chunk in (None, 1))
    one, two = begin, begin
    for _ in range(3):
        one, last = whole(rule, one, FinalLoss()).episode, one
        two = chunked(rule, two, FinalLoss()).episode
    for name, leaf in one.params.items():
        torch.testing.assert_close(two.params[name], leaf, rtol=1e-9, atol=1e-11)
    assert float(whole(rule, last, ValidationLoss()).loss) == pytest.approx(
        float(one.task.val_loss(one.params, {"seen": torch.zeros(4, 1)}).mean()), rel=1e-9
    )


@pytest.mark.parametrize("restart", ["last", "average", "start"])
def test_resume_in_mid_epoch_is_exact(restart: str) -> None:
    rule = lmo.rules.GradientPerturbation(HISTORY, ETA).double()
    with torch.no_grad():
        rule.coefficients.fill_(0.02)
    how, episode = Epochs(lmo.Counterfactual(ROLLOUT), 6, 0.3, restart), start(rule, NETS.draw(seed=0, size=2))
    for _ in range(9):
        episode = how(rule, episode, FinalLoss()).episode
    file = io.BytesIO()
    torch.save(episode.state_dict(), file)
    file.seek(0)
    again = Episode.from_state_dict(torch.load(file, weights_only=True), NETS.draw(seed=0, size=2))
    for _ in range(8):
        one, two = how(rule, episode, FinalLoss()), how(rule, again, FinalLoss())
        episode, again = one.episode, two.episode
        assert torch.equal(one.grads["coefficients"], two.grads["coefficients"])
        assert all(torch.equal(leaf, again.params[name]) for name, leaf in episode.params.items())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 steps"):
        Epochs(lmo.Unrolled(steps=3), 4)
    with pytest.raises(ValueError, match="beta"):
        Epochs(lmo.Unrolled(), 4, beta=-1.0)
    with pytest.raises(ValueError, match="restart must be"):
        Epochs(lmo.Unrolled(), 4, restart="first")
    with pytest.raises(ValueError, match="every iterate"):
        Epochs(lmo.Unrolled(steps=2), 4, restart="average")
    rule = lmo.rules.GradientDescent().double()
    with pytest.raises(TypeError, match="knows no jumps"):
        Epochs(lmo.Unrolled(), 4, jump=True)(rule, start(rule, NETS.draw(seed=0, size=1)), FinalLoss())
