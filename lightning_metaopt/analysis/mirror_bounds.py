"""What theory promises about mirror descent, beside what happens.

Gao, Gouk, Lee, Hospedales: *Meta Mirror Descent: Optimiser Learning for Fast Convergence* (arXiv:2203.02711), Theorems 3.1 and 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree, tree_map

__all__ = ["GapCurve", "convergence_bound", "follow_gap", "largest_step", "new_task_bound", "plot_gaps"]


def largest_step(smallest_eigenvalue: float, smoothness: float) -> float:
    """The longest constant step of Theorem 3.1, :math:`\\eta = \\lambda/2L`.

    Args:
        smallest_eigenvalue: :math:`\\lambda`, by which the mirror map is strongly convex.
        smoothness: :math:`L`, the Lipschitz constant of the gradient of every minibatch's loss (the paper's footnote has
            another definition, :math:`\\frac12\\|\\nabla f\\|^2\\le L`, under which the theorem is not true).
    """
    if not (smallest_eigenvalue > 0 and smoothness > 0):
        raise ValueError(f"both numbers must be positive, got {smallest_eigenvalue} and {smoothness}")
    return smallest_eigenvalue / (2 * smoothness)


def convergence_bound(divergence: Tensor, lr: float, steps: int | Tensor, noise: float | Tensor = 0.0) -> Tensor:
    """Theorem 3.1 (Eq. 3), the gap of mirror descent on convex, :math:`L`-smooth losses.

    With constant steps :math:`\\eta\\le\\lambda/2L` it has

    .. math:: \\mathbb E[f(\\bar\\theta) - f(\\theta_*)] \\le \\frac{2B(\\theta_*, \\theta_1)}{\\eta T} + 2\\sigma^2,\\qquad
              \\bar\\theta = \\frac1T\\sum_{t=1}^T\\theta_t .

    With the longest step this is :math:`4BL/\\lambda T`; Eq. 7 of the paper has half of it. The smallest loss on the way
    is below the bound too.

    Args:
        divergence: :math:`B(\\theta_*, \\theta_1)`, any shape.
        lr: :math:`\\eta`.
        steps: :math:`T`, the number of iterates that are averaged, the starting point among them.
        noise: :math:`\\sigma^2 = \\inf_\\theta\\mathbb E f(\\theta;\\xi) - \\mathbb E\\inf_\\theta f(\\theta;\\xi)`, 0 without
            minibatches and where one point minimises the losses of all of them.

    >>> convergence_bound(torch.tensor([1.0, 3.0]), lr=0.5, steps=4)
    tensor([1., 3.])
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    return 2 * divergence / (lr * steps) + 2 * noise


def new_task_bound(
    divergences: Tensor, lr: float, steps: int | Tensor, distance: float, radius: float, delta: float = 0.05, noise: float = 0.0
) -> Tensor:
    """Theorem 4.1 (Eq. 9), corrected: the expected gap on a **new** task, from the divergences on ``n`` tasks of meta-training.

    For all :math:`M` with :math:`\\|M-I\\|_F\\le C` at once, and tasks with :math:`\\|\\theta_*-\\theta_1\\|\\le r`, with
    probability :math:`1-\\delta` over the tasks

    .. math:: \\mathbb E[f(\\bar\\theta) - f(\\theta_*)] \\le \\frac{2}{\\eta T}\\Big(\\frac1n\\sum_i B(\\theta_*^i,\\theta_1^i)
              + \\frac{Cr^2}{\\sqrt n} + 3\\,\\frac{(1+C)r^2}{2}\\sqrt{\\frac{\\ln(2/\\delta)}{2n}}\\Big) + 2\\sigma^2 .

    Three things differ from the printed form. Its proof bounds :math:`B` by :math:`Cr^2/2`, which is false at :math:`M=I`, where
    :math:`C` may be 0: :math:`B\\le(1+C)r^2/2`. Theorem A.1 asks for twice the Rademacher complexity
    :math:`Cr^2/2\\sqrt n`. And both terms belong to the mean of divergences, hence inside the factor :math:`2/\\eta T`.

    Args:
        divergences: :math:`B` of each task, shape ``(n,)``.
        lr: :math:`\\eta`.
        steps: :math:`T`.
        distance: :math:`C`, chosen before the tasks were seen.
        radius: :math:`r`.
        delta: probability that the bound may fail.
        noise: :math:`\\sigma^2`.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}")
    if distance < 0 or radius < 0:
        raise ValueError(f"distance and radius must not be negative, got {distance} and {radius}")
    count = divergences.numel()
    complexity = distance * radius**2 / (2 * math.sqrt(count))
    largest = (1 + distance) * radius**2 / 2
    deviation = 3 * largest * math.sqrt(math.log(2 / delta) / (2 * count))
    return convergence_bound(divergences.mean() + 2 * complexity + deviation, lr, steps, noise)


@dataclass(frozen=True)
class GapCurve:
    """Gaps :math:`f - f_*` of a batch of problems and what Theorem 3.1 allows, for :math:`T` = 1, 2, ... averaged iterates.

    Attributes:
        averaged: of the mean of the iterates, shape ``(T, B)``.
        best: of the best iterate so far, ``(T, B)``.
        bound: of Theorem 3.1, ``(T, B)``.
    """

    averaged: Tensor
    best: Tensor
    bound: Tensor

    def holds(self) -> bool:
        """Whether the bound is above the averaged and the best gap everywhere."""
        slack = 1e-9 * self.bound.abs().max()
        return bool(((self.averaged <= self.bound + slack) & (self.best <= self.bound + slack)).all())


def follow_gap(
    rule: Rule, episode: Episode, steps: int, *, divergence: Tensor, lr: float, optimum: Tensor, noise: float | Tensor = 0.0
) -> GapCurve:
    """Run ``rule`` from where the episode stands and compare the gaps with Theorem 3.1.

    Args:
        rule: what makes the steps; for the bound to apply, mirror descent with steps :math:`\\eta\\le\\lambda/2L`.
        episode: where it starts. The loss of its current batch is that whose gap is measured: give problems without minibatches.
        steps: :math:`T`.
        divergence: :math:`B(\\theta_*,\\theta_1)` of each problem, shape ``(B,)``.
        lr: :math:`\\eta`.
        optimum: least loss of each problem, shape ``(B,)``.
        noise: :math:`\\sigma^2`.

    >>> import lightning_metaopt as lmo
    >>> rule, family = lmo.rules.GradientDescent(lr=0.01), lmo.tasks.LeastSquares(dim=2, rows=8, double=True)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=3))
    >>> solution = torch.linalg.lstsq(episode.task.data["design"], episode.task.data["target"].unsqueeze(2)).solution.squeeze(2)
    >>> divergence = (solution - episode.params["theta"]).square().sum(1) / 2
    >>> follow_gap(rule, episode, 50, divergence=divergence, lr=0.01, optimum=episode.task.optimum()).holds()
    True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    batch = episode.task.batch(episode.step)

    def gap(params: Tree) -> Tensor:
        return episode.task.loss(params, tree_map(torch.clone, episode.buffers), batch).detach() - optimum

    total = tree_map(torch.zeros_like, episode.params)
    averaged: list[Tensor] = []
    best: list[Tensor] = []
    with torch.no_grad():
        for step in range(1, steps + 1):
            total = tree_map(torch.add, total, episode.params)
            averaged.append(gap({name: leaf / step for name, leaf in total.items()}))
            here = gap(episode.params)
            best.append(torch.minimum(here, best[-1]) if best else here)
            episode = unroll(rule, episode, 1)[0]
    counts = torch.arange(1, steps + 1, dtype=divergence.dtype, device=divergence.device)
    bounds = torch.stack([convergence_bound(divergence, lr, count, noise) for count in counts])
    return GapCurve(torch.stack(averaged), torch.stack(best), bounds)


def plot_gaps(curves: Mapping[str, GapCurve], path: str | Path) -> None:
    """Draw gaps of averaged and best iterates (means over problems) beside the bounds (dashed), into a file.

    Args:
        curves: by label.
        path: of a picture; its suffix says the format.
    """
    with axes_into(path) as axes:
        for number, (label, curve) in enumerate(curves.items()):
            counts = range(1, len(curve.bound) + 1)
            for values, look, what in ((curve.averaged, "-", "averaged"), (curve.best, ":", "best"), (curve.bound, "--", "bound")):
                means = values.mean(1).clamp_min(1e-15).cpu()
                axes.plot(counts, means, look, color=f"C{number % 10}", label=f"{label}, {what}", lw=1.3)
        axes.set(xscale="log", yscale="log", xlabel="iterates averaged, T", ylabel="loss above the optimum")
