"""The bounds of MetaMD's theorems against descents on convex problems, and against their printed forms."""

from __future__ import annotations

import math

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.analysis import convergence_bound, follow_gap, largest_step, new_task_bound, plot_gaps
from lightning_metaopt.episode import start

D = torch.float64
FAMILY = lmo.tasks.LeastSquares(dim=5, rows=20, mean=True, start_std=2.0, double=True)


def prepared(rule, seed=0, size=6):
    """An episode, theta_* - theta_1, the least losses, and the largest curvature of all problems."""
    episode = start(rule, FAMILY.draw(seed=seed, size=size))
    design, target = episode.task.data["design"], episode.task.data["target"]
    away = torch.linalg.lstsq(design, target.unsqueeze(2)).solution.squeeze(2) - episode.params["theta"]
    curvature = float(torch.linalg.eigvalsh(2 * design.mT @ design / design.shape[1]).max())
    return episode, away, episode.task.optimum(), curvature


@pytest.mark.parametrize("metric", [[1.0] * 5, [1.0, 1.2, 1.5, 2.0, 3.0], [4.0, 0.7, 1.0, 0.9, 8.0]])
def test_theorem_3_1_holds_for_diagonal_mirrors(metric) -> None:
    metric = torch.tensor(metric, dtype=D)
    probe, away, optimum, curvature = prepared(lmo.rules.GradientDescent())
    lr = largest_step(float(metric.min()), curvature)
    rule = lmo.rules.DCOGradient({"theta": (5,)}).double()
    with torch.no_grad():  # DCOGradient steps by g / Lambda^2
        next(iter(rule.parameters())).copy_((metric / lr).sqrt())
    divergence = (metric * away.square()).sum(1) / 2
    curve = follow_gap(rule, start(rule, probe.task), 200, divergence=divergence, lr=lr, optimum=optimum)
    assert curve.holds()
    assert (curve.averaged[-1] < 0.1 * curve.averaged[0]).all()
    assert (curve.best[1:] <= curve.best[:-1]).all()
    # It is not above by a mile: at some T the gap is a good part of it.
    assert (curve.averaged / curve.bound).max() > 0.02
    # ... and fails with a hundredth of the divergence, so that the comparison can fail.
    assert not follow_gap(rule, start(rule, probe.task), 200, divergence=divergence / 100, lr=lr, optimum=optimum).holds()


def test_averaged_and_best_gaps_are_those_of_a_plain_loop() -> None:
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode, away, optimum, _ = prepared(rule, size=2)
    curve = follow_gap(rule, episode, 4, divergence=away.square().sum(1) / 2, lr=0.1, optimum=optimum)
    design, target = episode.task.data["design"], episode.task.data["target"]
    for problem in range(2):
        x, found = episode.params["theta"][problem].clone(), []
        for count in range(1, 5):
            found.append(x.clone())
            mean = torch.stack(found).mean(0)
            losses = [((design[problem] @ point - target[problem]) ** 2).mean() - optimum[problem] for point in (mean, *found)]
            assert curve.averaged[count - 1, problem] == pytest.approx(float(losses[0]), rel=1e-6)
            assert curve.best[count - 1, problem] == pytest.approx(float(min(losses[1:])), rel=1e-6)
            assert curve.bound[count - 1, problem] == pytest.approx(float(away[problem].square().sum()) / (0.1 * count), rel=1e-6)
            x -= 0.1 * 2 * design[problem].T @ (design[problem] @ x - target[problem]) / len(target[problem])


def test_theorem_3_1_holds_with_minibatches_of_one_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 3, generator=generator, dtype=D)
    target = rows @ torch.ones(3, dtype=D) + torch.randn(12, generator=generator, dtype=D)
    solution = torch.linalg.lstsq(rows, target.unsqueeze(1)).solution.squeeze(1)
    least = float((rows @ solution - target).square().mean() / 2)  # every single row can be fitted: sigma^2 is the least mean loss
    smooth = float(rows.square().sum(1).max())
    lr = largest_step(1.0, smooth)
    trials, steps = 400, 200
    x, total = torch.zeros(trials, 3, dtype=D), torch.zeros(trials, 3, dtype=D)
    for count in range(1, steps + 1):
        total += x
        mean = total / count
        gap = ((mean @ rows.T - target).square().mean(1) / 2 - least).mean()
        assert gap <= convergence_bound(solution.square().sum() / 2, lr, count, least)
        chosen = torch.randint(12, (trials,), generator=generator)
        residual = (rows[chosen] * x).sum(1) - target[chosen]
        x = x - lr * residual.unsqueeze(1) * rows[chosen]
    assert gap > 0.0


def test_the_new_task_bound_holds_as_often_as_it_says_and_the_printed_one_does_not() -> None:
    # At M = I the printed complexity terms vanish with C = 0: half of all samples of tasks have too small a mean.
    generator = torch.Generator().manual_seed(0)
    radius, n, repeats, delta = 2.0, 10, 2000, 0.2
    away = torch.randn(repeats, n, 4, generator=generator, dtype=D)
    away = radius * torch.rand(repeats, n, 1, generator=generator, dtype=D) * away / away.norm(dim=2, keepdim=True)
    divergences = away.square().sum(2) / 2
    expected = convergence_bound(torch.tensor(radius**2 / 6, dtype=D), 0.1, 50)  # E r^2 u^2 / 2
    bounds = torch.stack([new_task_bound(d, 0.1, 50, distance=0.0, radius=radius, delta=delta) for d in divergences])
    printed = convergence_bound(divergences.mean(1), 0.1, 50)
    assert (bounds < expected).double().mean() <= delta
    assert (printed < expected).double().mean() > 0.4 > delta


def test_the_new_task_bound_is_the_formula() -> None:
    divergences = torch.tensor([1.0, 2.0, 6.0], dtype=D)
    found = new_task_bound(divergences, 0.5, 10, distance=2.0, radius=3.0, delta=0.1, noise=0.25)
    inner = 3.0 + 2.0 * 9 / math.sqrt(3) + 3 * (3.0 * 9 / 2) * math.sqrt(math.log(20) / 6)
    assert float(found) == pytest.approx(2 * inner / 5 + 0.5, rel=1e-12)


def test_the_gap_of_a_meta_trained_metric_can_be_bounded_uniformly() -> None:
    # The bound must hold for the M that fits the sample best, not only for one fixed before: M = I - C u u^T / |..| picks the
    # direction in which these n tasks moved most, the worst case of the class.
    generator = torch.Generator().manual_seed(1)
    n, distance, failures, repeats = 8, 0.9, 0, 300
    for _ in range(repeats):
        away = torch.randn(n, 3, generator=generator, dtype=D)
        away = away / away.norm(dim=1, keepdim=True)  # r = 1, uniform on the sphere: E d d^T = I / 3
        second = away.T @ away / n
        deviation = second - torch.eye(3, dtype=D) / 3
        metric = torch.eye(3, dtype=D) - distance * deviation / deviation.norm()
        divergences = torch.einsum("ni,ij,nj->n", away, metric, away) / 2
        expected = metric.trace() / 6
        failures += bool(new_task_bound(divergences, 1.0, 2, distance, 1.0, delta=0.1) < expected)
        assert divergences.mean() < expected  # the sample is always too hopeful
    assert failures <= 0.1 * repeats


def test_bad_numbers_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="both numbers must be positive"):
        largest_step(0.0, 1.0)
    with pytest.raises(ValueError, match="lr must be positive"):
        convergence_bound(one, 0.0, 3)
    with pytest.raises(ValueError, match="delta must lie"):
        new_task_bound(one, 0.1, 3, 1.0, 1.0, delta=1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        new_task_bound(one, 0.1, 3, -1.0, 1.0)
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode, _, optimum, _ = prepared(rule, size=1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        follow_gap(rule, episode, 0, divergence=one, lr=0.1, optimum=optimum)


def test_the_plot_shows_gaps_and_bounds(tmp_path) -> None:
    rule = lmo.rules.GradientDescent(lr=0.05).double()
    episode, away, optimum, _ = prepared(rule)
    curve = follow_gap(rule, episode, 20, divergence=away.square().sum(1) / 2, lr=0.05, optimum=optimum)
    plot_gaps({"gradient descent": curve}, tmp_path / "gaps.svg")
    text = (tmp_path / "gaps.svg").read_text()
    assert text.count("<path") > 3
    assert "gradient descent, bound" in text
