"""Optimizers as linear dynamical systems, and the sequential stability that theory asks of them.

Chen, Dogariu, Lu, Hazan: *Nonconvex Meta-optimization for Deep Learning*, appendix B (Eq. 2, Definition 3) and Figure 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Layout, Tree, detach, shapes_of

__all__ = [
    "Stability",
    "controlled_dynamics",
    "descent_dynamics",
    "hessian",
    "momentum_dynamics",
    "plot_stability",
    "product_norms",
    "sequential_stability",
    "spectral_radius",
]


def _blocks(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


def descent_dynamics(curvature: Tensor, lr: float, decay: float = 0.0) -> Tensor:
    """:math:`A` of Eq. 2, on the state :math:`(x_s, x_{s-1}, \\nabla f(x_{s-1}))`, in which gradients act one step late.

    .. math:: A = \\begin{pmatrix} (1-\\delta) I & 0 & -\\eta I \\\\ I & 0 & 0 \\\\ H & -H & 0\\end{pmatrix}

    Args:
        curvature: :math:`H`, shape ``(..., d, d)``.
        lr: :math:`\\eta`.
        decay: :math:`\\delta`.

    Returns:
        Shape ``(..., 3d, 3d)``.

    >>> descent_dynamics(torch.full((1, 1), 2.0), lr=0.1).tolist()
    [[1.0, 0.0, -0.10000000149011612], [1.0, 0.0, 0.0], [2.0, -2.0, 0.0]]
    """
    one = _eye(curvature)
    zero = torch.zeros_like(one)
    return _blocks([[(1 - decay) * one, zero, -lr * one], [one, zero, zero], [curvature, -curvature, zero]])


def momentum_dynamics(curvature: Tensor, lr: float, momentum: float) -> Tensor:
    """Heavy ball on :math:`\\frac12 x^\\top H x` with its buffer, ``(..., 2d, 2d)``.

    :math:`(x, v)\\mapsto(x - \\eta v', v')` with :math:`v' = \\mu v + Hx`.

    >>> float(spectral_radius(momentum_dynamics(torch.ones(1, 1), lr=0.0, momentum=0.9)))
    1.0
    """
    one = _eye(curvature)
    return _blocks([[one - lr * curvature, -lr * momentum * one], [curvature, momentum * one]])


def controlled_dynamics(curvature: Tensor, coefficients: Tensor, lr: float, decay: float = 0.0) -> Tensor:
    """Gradient perturbation with fixed :math:`M` on :math:`\\frac12 x^\\top H x`, with the gradients that it remembers.

    The state is :math:`(x_t, g_{t-1}, \\dots, g_{t-H+1})`; the system converges if its :func:`spectral_radius` is below 1.

    Args:
        curvature: :math:`H`, shape ``(d, d)``.
        coefficients: :math:`M`, shape ``(H,)``, ``(H, d)`` for diagonal ones or ``(H, d, d)``.
        lr: :math:`\\eta`.
        decay: :math:`\\delta`.

    Returns:
        Shape ``(H d, H d)``.
    """
    one = _eye(curvature)
    zero = torch.zeros_like(one)
    matrices = [c * one if c.dim() == 0 else torch.diag(c) if c.dim() == 1 else c for c in coefficients]
    rows = [[(1 - decay) * one - (lr * one + matrices[0]) @ curvature, *[-matrix for matrix in matrices[1:]]]]
    for lag in range(1, len(matrices)):
        rows.append([curvature if lag == 1 else zero] + [one if age == lag - 1 else zero for age in range(1, len(matrices))])
    return _blocks(rows)


def spectral_radius(matrix: Tensor) -> Tensor:
    """The largest absolute eigenvalue, shape ``(...)``."""
    sizes: Tensor = torch.linalg.eigvals(matrix).abs()
    return sizes.amax(-1)


def product_norms(matrices: Tensor) -> Tensor:
    """Largest singular values of all products of consecutive matrices.

    Args:
        matrices: :math:`A_1, \\dots, A_T`, shape ``(T, ..., n, n)``.

    Returns:
        Shape ``(T, T, ...)``: at ``[s, r]`` that of :math:`A_r \\cdots A_s` for ``s <= r``; otherwise NaN.

    >>> product_norms(torch.full((3, 1, 1), 0.5))[0].tolist()
    [0.5, 0.25, 0.125]
    """
    steps = len(matrices)
    norms = matrices.new_full((steps, steps, *matrices.shape[1:-2]), torch.nan)
    for first in range(steps):
        product = matrices[first]
        for last in range(first, steps):
            product = product if last == first else matrices[last] @ product
            norms[first, last] = torch.linalg.matrix_norm(product, ord=2)
    return norms


def hessian(task: Task, params: Tree, buffers: Tree, batch: Any) -> Tensor:
    """The second derivatives of every problem's loss, shape ``(B, n, n)``, in the order of :class:`~lightning_metaopt.tree.Layout`.

    Needs :math:`n` products with it, each for all problems at once: for small networks.
    """
    layout = Layout.of(shapes_of(params))
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        loss = task.loss(leaves, {name: leaf.clone() for name, leaf in buffers.items()}, batch).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True, allow_unused=True)
        flat = layout.flatten(dict(zip(leaves, grads, strict=True)))
        rows = []
        for index in range(layout.size):
            found = torch.autograd.grad(
                flat[:, index].sum(), list(leaves.values()), retain_graph=True, materialize_grads=True, allow_unused=True
            )
            rows.append(layout.flatten(dict(zip(leaves, found, strict=True))))
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class Stability:
    """Norms of the products of an optimizer's dynamics along its path.

    Attributes:
        norms: of :func:`product_norms`, shape ``(T, T, B)``.
    """

    norms: Tensor

    def by_length(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation over the ``B`` trials (of the means over intervals) and largest norm, each of shape ``(T,)``,
        for intervals of 1 to T steps.
        """
        parts = [self.norms.diagonal(length).reshape(-1, len(self.norms) - length) for length in range(len(self.norms))]
        means = torch.stack([part.mean(1) for part in parts])  # over the intervals of each trial
        spread = means.std(1) if means.shape[1] > 1 else torch.zeros_like(means[:, 0])
        return means.mean(1), spread, torch.stack([part.max() for part in parts])

    def kappa(self, gamma: float = 0.0) -> float:
        """The smallest :math:`\\kappa\\ge 1` with which the path is :math:`(\\kappa, \\gamma)` sequentially stable (Definition 3).

        .. math:: \\|A_r\\cdots A_s\\| \\le \\kappa^2 (1-\\gamma)^{r-s+1} \\quad\\text{for all } s\\le r .
        """
        largest = self.by_length()[2]
        lengths = torch.arange(1, len(largest) + 1, dtype=largest.dtype, device=largest.device)
        return max(1.0, float((largest / (1 - gamma) ** lengths).max().sqrt()))


def sequential_stability(
    rule: Rule,
    episode: Episode,
    steps: int,
    dynamics: Callable[[Tensor], Tensor],
    beta: float = 0.0,
) -> Stability:
    """Follow ``rule`` for some steps and look at the dynamics on the way (Figure 3), each problem of the episode being a trial.

    The paper's :math:`H_s` maps differences of iterates to differences of gradients (Eq. 1); this takes the second derivatives at
    each iterate, as the paper's code does, which is the same on quadratics.

    Args:
        rule: what makes the steps.
        episode: where it starts.
        steps: how many.
        dynamics: from second derivatives ``(B, n, n)`` to matrices, such as ``partial(descent_dynamics, lr=0.1)``.
        beta: of Algorithm 2's regulariser, which adds :math:`2\\beta` to the second derivatives.

    >>> import lightning_metaopt as lmo
    >>> from functools import partial
    >>> rule, family = lmo.rules.GradientDescent(lr=0.05), lmo.tasks.LeastSquares(dim=2, rows=8, mean=True)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=3))
    >>> sequential_stability(rule, episode, 5, partial(descent_dynamics, lr=0.05)).norms.shape
    torch.Size([5, 5, 3])
    """
    found = []
    for _ in range(steps):
        curvature = hessian(episode.task, detach(episode.params), episode.buffers, episode.task.batch(episode.step))
        found.append(dynamics(curvature + 2 * beta * _eye(curvature)))
        with torch.no_grad():
            episode = unroll(rule, episode, 1)[0]
    return Stability(product_norms(torch.stack(found)))


def plot_stability(curves: Mapping[str, Stability], path: str | Path, gamma: float = 0.0) -> None:
    """Draw the mean norm of products by length for several systems, with the spread over trials, into a file.

    Args:
        curves: by label.
        path: of a picture; its suffix says the format.
        gamma: of the constants that the legend gives.
    """
    with axes_into(path, fontsize=10) as axes:
        for label, stability in curves.items():
            mean, spread, _ = (value.cpu() for value in stability.by_length())
            lengths = range(1, len(mean) + 1)
            axes.plot(lengths, mean, marker="o", markersize=3, label=f"{label} ($\\kappa$ = {stability.kappa(gamma):.2f})")
            axes.fill_between(lengths, mean - spread, mean + spread, alpha=0.2)
        axes.set(yscale="log", xlabel="steps in the product", ylabel="spectral norm, mean over intervals")
