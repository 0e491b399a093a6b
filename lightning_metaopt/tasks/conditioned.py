"""Quadratics of any dimension and condition, solved again and again from new starting points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

__all__ = ["ConditionedQuadratic"]


@final
class ConditionedQuadraticTask(Task):
    """:math:`f_i(x) = \\frac12 x^\\top H x`, with one shared :math:`H`."""

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return {"x": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        return (params["x"] @ self.shared["curvature"] * params["x"]).sum(1) / 2


@final
class ConditionedQuadratic(TaskFamily):
    """One quadratic :math:`f(x) = \\frac12 x^\\top H x`, minimum 0, in many episodes with starting points of their own.

    The setting of *Online Control for Meta-optimization* and of Algorithm 1: the same problem is solved repeatedly. Eigenvalues
    of :math:`H` are spaced evenly in the logarithm from ``largest / condition`` to ``largest``; its eigenvectors are the axes or a
    random orthogonal basis. Starts are normal with variance 1 in each coordinate.

    Args:
        dim: number of unknowns ``d``.
        condition: ratio of the largest and the smallest eigenvalue.
        largest: the largest eigenvalue: gradient descent converges below ``lr = 2 / largest``.
        basis_seed: of the eigenvectors; ``None`` for the axes.
        double: make the problems in float64.

    >>> task = ConditionedQuadratic(dim=3, condition=100.0).draw(seed=0, size=4)
    >>> bool(torch.allclose(task.loss({"x": torch.ones(4, 3)}, {}, task.batch(0)), torch.tensor((0.01 + 0.1 + 1.0) / 2)))
    True
    """

    def __init__(
        self, dim: int = 2, condition: float = 10.0, largest: float = 1.0, *, basis_seed: int | None = None, double: bool = False
    ) -> None:
        if dim < 1 or not condition >= 1 or not largest > 0:
            raise ValueError(f"dim and condition must be at least 1, largest positive, got {dim}, {condition} and {largest}")
        self.dim, self.condition, self.largest, self.basis_seed = dim, condition, largest, basis_seed
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"x": (self.dim,)}

    def sample(self, generator: torch.Generator, size: int) -> Task:
        exponents = torch.linspace(-1, 0, self.dim, dtype=torch.float64) if self.dim > 1 else torch.zeros(1, dtype=torch.float64)
        values = self.largest * self.condition**exponents
        basis = torch.eye(self.dim, dtype=torch.float64)
        if self.basis_seed is not None:
            source = torch.Generator().manual_seed(self.basis_seed)
            basis = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=source, dtype=torch.float64)).Q
        start = torch.randn(size, self.dim, generator=generator, dtype=self.dtype)
        curvature: Tensor = (basis * values) @ basis.mT
        return ConditionedQuadraticTask({"start": start}, {"curvature": curvature.to(self.dtype)})
