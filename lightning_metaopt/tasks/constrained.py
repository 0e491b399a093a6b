"""Least squares over a convex set: what constrained update rules are trained and judged on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

__all__ = ["NonNegativeLeastSquares", "SimplexLeastSquares"]


def nearest_on_simplex(point: Tensor) -> Tensor:
    """The Euclidean projection of ``(B, n)`` onto the probability simplex."""
    falling = point.sort(dim=1, descending=True).values
    count = torch.arange(1, point.shape[1] + 1, device=point.device)
    shift = (falling.cumsum(1) - 1) / count
    last = (falling > shift).sum(1, keepdim=True) - 1
    return (point - shift.gather(1, last)).clamp(min=0)


@final
class ConstrainedLeastSquaresTask(Task):
    """:math:`f_i(\\theta) = \\tfrac1{2m}\\|X_i\\theta - y_i\\|_2^2` over the simplex or the non-negative vectors.

    ``loss`` is the plain objective: to stay in the set is the update rule's business.
    """

    def __init__(self, data: Tree, *, simplex: bool, excess: bool) -> None:
        super().__init__(data)
        self.simplex, self.excess = simplex, excess
        if excess:
            self.data = {**data, "solution": self.solution()}

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        design = self.data["design"]
        value = 1 / design.shape[2] if self.simplex else 0.0
        return {"theta": design.new_full((design.shape[0], design.shape[2]), value)}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        residual: Tensor = torch.bmm(batch["design"], params["theta"].unsqueeze(2)).squeeze(2) - batch["target"]
        return 0.5 * residual.square().mean(1)

    def val_loss(self, params: Tree, buffers: Tree) -> Tensor:
        if not self.excess:
            return super().val_loss(params, buffers)
        # f(theta) - f(solution) without the difference of two nearly equal numbers.
        design, solution = self.data["design"], self.data["solution"].unsqueeze(2)
        apart = torch.bmm(design, params["theta"].unsqueeze(2) - solution).squeeze(2)
        left = torch.bmm(design, solution).squeeze(2) - self.data["target"]
        return (apart * (0.5 * apart + left)).mean(1)

    def optimum(self) -> Tensor:
        """The least value over the set, :math:`f_i^*`, shape ``(B,)``."""
        solution = self.data["solution"] if "solution" in self.data else self.solution()
        return self.loss({"theta": solution}, {}, self.data)

    def solution(self, tolerance: float = 1e-12, iterations: int = 20_000) -> Tensor:
        """The minimiser over the set, shape ``(B, n)``: accelerated projected gradient with restarts, in float64.

        Args:
            tolerance: stop when no coordinate moves by more than this part of the largest one.
            iterations: at most so many.
        """
        design, target = self.data["design"].double(), self.data["target"].double()
        hessian = design.mT @ design / design.shape[1]
        linear = (design.mT @ target.unsqueeze(2)).squeeze(2) / design.shape[1]
        step = 1 / torch.linalg.eigvalsh(hessian)[:, -1:]
        theta = self.init(torch.Generator())[0]["theta"].double()
        ahead, momentum = theta, torch.ones_like(step)
        for _ in range(iterations):
            gradient = (hessian @ ahead.unsqueeze(2)).squeeze(2) - linear
            point = ahead - step * gradient
            new = nearest_on_simplex(point) if self.simplex else point.clamp(min=0)
            uphill = ((ahead - new) * (new - theta)).sum(1, keepdim=True) > 0
            momentum = torch.where(uphill, torch.ones_like(momentum), momentum)
            following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            settled = (new - ahead).abs().max() <= tolerance * new.abs().max().clamp(min=1)
            ahead = new + (momentum - 1) / following * (new - theta)
            theta, momentum = new, following
            if settled:
                break
        return theta.to(self.data["design"].dtype)


class ConstrainedLeastSquares(TaskFamily):
    """Least squares over a set with a badly scaled design, :math:`X = Z\\operatorname{diag}(10^{-s}, \\dots, 10^{s})`,
    a fresh standard normal :math:`Z` for each problem.

    Args:
        dim: number of unknowns ``n``.
        rows: number of equations ``m``.
        spread: :math:`s`, half the range of the columns' scales in powers of ten.
        noise: standard deviation of what is added to :math:`X\\theta^\\circ` in the targets.
        excess: let ``val_loss`` be the excess :math:`f - f^*` over the optimum of the set.
        double: make the problems in float64.
    """

    simplex: ClassVar[bool]  # whether the set is the simplex; otherwise it is the non-negative vectors

    def __init__(
        self, dim: int = 20, rows: int = 40, spread: float = 0.75, *, noise: float = 0.1, excess: bool = False, double: bool = False
    ) -> None:
        if dim < 1 or rows < 1:
            raise ValueError(f"dim and rows must be at least 1, got {dim} and {rows}")
        self.dim, self.rows, self.spread, self.noise, self.excess = dim, rows, spread, noise, excess
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"theta": (self.dim,)}

    @abstractmethod
    def truth(self, generator: torch.Generator, size: int) -> Tensor:
        """What the targets are made from, :math:`\\theta^\\circ` of shape ``(B, n)``."""

    def sample(self, generator: torch.Generator, size: int) -> Task:
        scales = torch.logspace(-self.spread, self.spread, self.dim, dtype=self.dtype)
        design = torch.randn(size, self.rows, self.dim, generator=generator, dtype=self.dtype) * scales
        clean = torch.bmm(design, self.truth(generator, size).unsqueeze(2)).squeeze(2)
        target = clean + self.noise * torch.randn(size, self.rows, generator=generator, dtype=self.dtype)
        return ConstrainedLeastSquaresTask({"design": design, "target": target}, simplex=self.simplex, excess=self.excess)


@final
class SimplexLeastSquares(ConstrainedLeastSquares):
    """Least squares over the probability simplex, started at its centre; targets from a point with about a third of its
    coordinates positive, uniform on their face.

    See :class:`ConstrainedLeastSquares` for the arguments.

    >>> task = SimplexLeastSquares(dim=5, rows=10, excess=True).draw(seed=0, size=3)
    >>> bool((task.val_loss(*task.init(torch.Generator())) > 0).all())
    True
    """

    simplex = True

    def truth(self, generator: torch.Generator, size: int) -> Tensor:
        drawn = -torch.rand(size, self.dim, generator=generator, dtype=self.dtype).clamp(min=1e-12).log()
        kept = torch.rand(size, self.dim, generator=generator, dtype=self.dtype) < 1 / 3
        kept[:, 0] |= ~kept.any(1)
        sparse = torch.where(kept, drawn, torch.zeros_like(drawn))
        return sparse / sparse.sum(1, keepdim=True)


@final
class NonNegativeLeastSquares(ConstrainedLeastSquares):
    """Least squares over :math:`\\theta \\ge 0`, started at 0; targets from a standard normal point, so that about half of
    the coordinates end at 0.

    See :class:`ConstrainedLeastSquares` for the arguments.
    """

    simplex = False

    def truth(self, generator: torch.Generator, size: int) -> Tensor:
        return torch.randn(size, self.dim, generator=generator, dtype=self.dtype)
