"""How sharp the minimum is that an optimizer ends in: the loss along the direction of largest curvature.

Gao, Gouk, Lee, Hospedales: *Meta Mirror Descent: Optimiser Learning for Fast Convergence* (arXiv:2203.02711), appendix A.10 and
Figure 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.replay import Replay
from lightning_metaopt.tree import Tree

__all__ = ["Landscape", "Loss", "loss_landscape", "plot_landscapes", "step_loss", "top_eigenpair"]

Loss = Callable[[Tree, Any], Tensor]
"""``loss(params, batch)``, shape ``()``: of one network, whose parameters have no axis of problems."""


def step_loss(module: nn.Module) -> Loss:
    """The ``training_step`` of a ``LightningModule`` as a function of parameters and batch.

    The module's mode counts: call ``module.eval()`` first for running statistics of BatchNorm and no dropout. In training mode
    each batch is normalised by itself, and dropout draws the same masks every time.

    >>> import lightning as L
    >>> class Line(L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Linear(1, 1, bias=False)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.net(batch).square().mean()
    >>> step_loss(Line())({"net.weight": torch.full((1, 1), 3.0)}, torch.ones(4, 1)).item()
    9.0
    """
    replay = Replay(module)
    return lambda params, batch: replay.loss(replay.record(batch), params)


def top_eigenpair(
    loss: Loss, params: Tree, batches: Sequence[Any], *, tolerance: float = 1e-4, iterations: int = 300, seed: int = 0
) -> tuple[float, Tree]:
    """The largest eigenvalue of the Hessian of the mean loss over ``batches``, and its eigenvector of length 1.

    By the Lanczos iteration of SciPy (ARPACK) on products of the Hessian with vectors: about twenty vectors of the size of the
    network are kept in main memory, in float64, and the graph of one batch at a time on the device.

    Args:
        loss: see :data:`Loss`; of :func:`step_loss` for a ``LightningModule``.
        params: where; for a trained module, ``Replay(module).params()`` or its named parameters.
        batches: what the mean is over, each with the same weight.
        tolerance: relative accuracy of the eigenvalue; in float32 no less than about 1e-5 makes sense.
        iterations: restarts of the Lanczos iteration, each of about twenty products.
        seed: of the starting vector.

    Raises:
        ModuleNotFoundError: without SciPy (the extra ``study`` has it).
        FloatingPointError: if a product is not finite.
        RuntimeError: if the tolerance was not reached.

    >>> value, vector = top_eigenpair(lambda p, batch: (batch * p["w"] ** 2).sum() / 2, {"w": torch.ones(3)},
    ...                               [torch.tensor([1.0, 5.0, 2.0])])
    >>> round(value, 3), [round(abs(v), 3) for v in vector["w"].tolist()]
    (5.0, [0.0, 1.0, 0.0])
    """
    if not batches:
        raise ValueError("batches must not be empty: the Hessian is that of the mean loss over them")
    sizes = {name: leaf.numel() for name, leaf in params.items()}
    like = next(iter(params.values()))

    def product(vector: Tensor) -> Tensor:
        parts = dict(zip(sizes, vector.to(like).split(list(sizes.values())), strict=True))
        found = _hessian_product(loss, params, {name: part.view_as(params[name]) for name, part in parts.items()}, batches)
        if not found.isfinite().all():
            raise FloatingPointError(
                "a product with the Hessian is not finite; the loss or its derivatives overflow at these params"
            )
        return found.double().cpu()

    if sum(sizes.values()) == 1:
        return float(product(torch.ones(1))), {name: torch.ones_like(leaf) for name, leaf in params.items()}
    value, direction = _lanczos(product, sum(sizes.values()), tolerance, iterations, seed)
    parts = direction.to(like).split(list(sizes.values()))
    return value, {name: part.view_as(params[name]) for name, part in zip(sizes, parts, strict=True)}


def _lanczos(product: Callable[[Tensor], Tensor], size: int, tolerance: float, iterations: int, seed: int) -> tuple[float, Tensor]:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "top_eigenpair needs the package 'scipy': pip install 'lightning-metaopt[study]'", name="scipy"
        ) from error

    operator = LinearOperator((size, size), matvec=lambda v: product(torch.from_numpy(v).flatten()).numpy(), dtype="float64")
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if not product(start).any():  # a linear loss, from whose Hessian ARPACK does not start
        return 0.0, start / start.norm()
    try:
        values, vectors = eigsh(operator, k=1, which="LA", v0=start.numpy(), tol=tolerance, maxiter=iterations)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the largest eigenvalue was not found to a relative {tolerance:g} in {iterations} iterations; allow a larger "
            "tolerance or more iterations"
        ) from error
    return float(values[0]), torch.from_numpy(vectors[:, 0].copy())


def _hessian_product(loss: Loss, params: Tree, vector: Tree, batches: Sequence[Any]) -> Tensor:
    total = torch.zeros(())
    for batch in batches:
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
        with torch.enable_grad():
            grads = torch.autograd.grad(
                loss(leaves, batch), list(leaves.values()), create_graph=True, materialize_grads=True, allow_unused=True
            )
            slope = torch.stack([(grad * vector[name]).sum() for name, grad in zip(leaves, grads, strict=True)]).sum()
            if not slope.requires_grad:  # a linear loss
                rows = [torch.zeros_like(leaf) for leaf in leaves.values()]
            else:
                rows = list(torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True, allow_unused=True))
        total = total.to(rows[0]) + torch.cat([row.flatten() for row in rows]) / len(batches)
    return total


@dataclass(frozen=True)
class Landscape:
    """The mean loss on a line through trained parameters.

    Attributes:
        offsets: how far from the parameters, in the length of the vector of all parameters, shape ``(N,)``.
        losses: there, ``(N,)``.
        curvature: second derivative at offset 0 along the line: the largest eigenvalue of the Hessian if that was its direction.
    """

    offsets: Tensor
    losses: Tensor
    curvature: float


def loss_landscape(
    loss: Loss,
    params: Tree,
    batches: Sequence[Any],
    *,
    radius: float = 1.0,
    points: int = 41,
    direction: Tree | None = None,
    **options: Any,
) -> Landscape:
    """The mean loss over ``batches`` along the eigenvector of the largest eigenvalue of its Hessian (Figure 7).

    .. math:: \\epsilon \\mapsto f(\\theta + \\epsilon v), \\qquad \\nabla^2 f(\\theta)\\, v = \\lambda_{max} v, \\; \\|v\\| = 1 .

    The sign of an eigenvector is arbitrary, so left and right are. Networks that compute the same function may have very
    different curvatures (rescaled rectified layers): compare networks of one architecture and one parameterisation.

    Args:
        loss: see :data:`Loss`.
        params: the trained parameters, without an axis of problems.
        batches: what the mean is over.
        radius: largest offset.
        points: number of offsets, from ``-radius`` to ``radius``; odd for one at 0.
        direction: another direction, by name; it is scaled to length 1.
        **options: of :func:`top_eigenpair`.

    >>> found = loss_landscape(lambda p, batch: (batch * p["w"] ** 2).sum() / 2, {"w": torch.zeros(2)},
    ...                        [torch.tensor([1.0, 4.0])], points=3)
    >>> round(found.curvature, 3), [round(value, 3) for value in found.losses.tolist()]
    (4.0, [2.0, 0.0, 2.0])
    """
    if points < 2 or not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"points must be at least 2 and radius positive and finite, got {points} and {radius}")
    if direction is None:
        curvature, direction = top_eigenpair(loss, params, batches, **options)
    else:
        length = torch.stack([leaf.square().sum() for leaf in direction.values()]).sum().sqrt()
        direction = {name: leaf / length for name, leaf in direction.items()}
        product = _hessian_product(loss, params, direction, batches)
        curvature = float(product @ torch.cat([direction[name].flatten() for name in params]))
    offsets = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses = []
    for offset in offsets.tolist():
        moved = {name: leaf.detach() + offset * direction[name] for name, leaf in params.items()}
        losses.append(torch.stack([loss(moved, batch).detach() for batch in batches]).mean())
    return Landscape(offsets, torch.stack(losses).cpu(), curvature)


def plot_landscapes(landscapes: Mapping[str, Landscape], path: str | Path) -> None:
    """Draw several landscapes over each other, into a file.

    Args:
        landscapes: by label.
        path: of a picture; its suffix says the format.
    """
    with axes_into(path) as axes:
        for label, found in landscapes.items():
            axes.plot(found.offsets, found.losses, label=f"{label} ($\\lambda_{{max}}$ = {found.curvature:.3g})")
        axes.set(xlabel="distance along the top eigenvector of the Hessian", ylabel="training loss")
