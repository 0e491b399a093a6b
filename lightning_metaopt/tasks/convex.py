"""Least-squares families (DCO, sections V and VI-B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

__all__ = ["LeastSquares"]


@final
class LeastSquaresTask(Task):
    """:math:`f_i(\\theta) = c\\,\\|X_i\\theta - y_i\\|_2^2` with ``X``: ``(B, rows, dim)`` or shared ``(rows, dim)``."""

    def __init__(self, data: Tree, shared: Tree, weight: float) -> None:
        super().__init__(data, shared)
        self.weight = weight

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return {"theta": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        residual: Tensor
        if "design" in self.shared:
            residual = params["theta"] @ self.shared["design"].mT - batch["target"]
        else:
            residual = torch.bmm(batch["design"], params["theta"].unsqueeze(2)).squeeze(2) - batch["target"]
        return self.weight * residual.square().sum(1)

    def optimum(self) -> Tensor:
        """The least value :math:`f_i^*`, shape ``(B,)``, by a QR factorization in float64."""
        design = (self.shared if "design" in self.shared else self.data)["design"].double()
        target = self.data["target"].double().unsqueeze(2)
        basis: Tensor = torch.linalg.qr(design).Q  # of the range, if no column depends on the others
        residual = target - basis @ (basis.mT @ target)
        least: Tensor = self.weight * residual.square().sum((1, 2))
        return least.to(self.data["target"].dtype)


@final
class LeastSquares(TaskFamily):
    """Linear least squares, :math:`\\min_\\theta \\|X\\theta - y\\|_2^2` (DCO Eq. 22), or the family of Theorem 1
    (Eq. 17), :math:`\\min_\\theta \\|X\\theta - (y + X\\Delta_i)\\|_2^2` with one :math:`X` and one :math:`y`.

    All entries of :math:`X, y` are standard normal.

    Args:
        dim: number of unknowns ``p``.
        rows: number of equations.
        design: ``"fresh"`` draws a new :math:`X` for each problem; ``"fixed"`` uses one :math:`X` (drawn from
            ``design_seed``) and a fresh :math:`y`; ``"shifted"`` is Theorem 1's: one :math:`X`, one :math:`y`, and
            :math:`\\Delta_i \\sim N(0, I)`.
        start_std: standard deviation of the starting point, 0 for the origin.
        mean: use the mean over rows instead of the sum.
        design_seed: where the shared :math:`X` and :math:`y` come from.
        double: make the problems in float64.

    >>> LeastSquares(dim=3, rows=5).draw(seed=0, size=2).optimum().shape
    torch.Size([2])
    """

    def __init__(
        self,
        dim: int = 100,
        rows: int = 100,
        design: str = "fresh",
        *,
        start_std: float = 0.0,
        mean: bool = False,
        design_seed: int = 0,
        double: bool = False,
    ) -> None:
        if design not in ("fresh", "fixed", "shifted"):
            raise ValueError(f"design must be 'fresh', 'fixed' or 'shifted', got {design!r}")
        if dim < 1 or rows < 1:
            raise ValueError(f"dim and rows must be at least 1, got {dim} and {rows}")
        self.dim, self.rows, self.design = dim, rows, design
        self.start_std, self.mean, self.design_seed = start_std, mean, design_seed
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"theta": (self.dim,)}

    def sample(self, generator: torch.Generator, size: int) -> Task:
        common = torch.Generator().manual_seed(self.design_seed)
        shared: Tree = {}
        data: Tree = {"start": self.start_std * torch.randn(size, self.dim, generator=generator, dtype=self.dtype)}
        if self.design == "fresh":
            data["design"] = torch.randn(size, self.rows, self.dim, generator=generator, dtype=self.dtype)
        else:
            shared["design"] = torch.randn(self.rows, self.dim, generator=common, dtype=self.dtype)
        if self.design == "shifted":
            target = torch.randn(self.rows, generator=common, dtype=self.dtype)
            shift = torch.randn(size, self.dim, generator=generator, dtype=self.dtype)
            data["target"] = target + shift @ shared["design"].mT
        else:
            data["target"] = torch.randn(size, self.rows, generator=generator, dtype=self.dtype)
        return LeastSquaresTask(data, shared, 1 / self.rows if self.mean else 1.0)
