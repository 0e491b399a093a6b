"""Ill-conditioned quadratics in the plane (Optimistic Meta-Gradients, section 7.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

__all__ = ["ConvexQuadratic"]


@final
class ConvexQuadraticTask(Task):
    """:math:`f_i(\\theta) = \\theta^\\top Q_i\\theta`."""

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return {"theta": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        theta = params["theta"]
        return (theta * torch.bmm(batch["matrix"], theta.unsqueeze(2)).squeeze(2)).sum(1)


@final
class ConvexQuadratic(TaskFamily):
    """Quadratics :math:`f(\\theta) = \\theta^\\top Q\\theta` of two unknowns, minimum 0 at the origin, started at (4, 4).

    :math:`Q` is a rotation by a uniform angle of :math:`\\mathrm{diag}(10^a, 10^b)` with uniform :math:`a, b`. The paper says that
    :math:`Q` is ill-conditioned and leaves the rest to an appendix that is not public; ranges of :math:`a` and :math:`b` are ours.

    Args:
        smaller: range of :math:`a`.
        larger: range of :math:`b`.
        seed: draw the same problems each time, whatever seed is asked for: the paper tunes on the problems that it reports.
        double: make the problems in float64.

    >>> task = ConvexQuadratic().draw(seed=0, size=5)
    >>> task.init(torch.Generator())[0]["theta"][0].tolist()
    [4.0, 4.0]
    """

    def __init__(
        self,
        smaller: tuple[float, float] = (0.0, 0.3),
        larger: tuple[float, float] = (1.7, 2.0),
        *,
        seed: int | None = None,
        double: bool = False,
    ) -> None:
        for name, (low, high) in (("smaller", smaller), ("larger", larger)):
            if not low <= high:
                raise ValueError(f"{name} must be a range (low, high) of exponents, got {(low, high)}")
        self.smaller, self.larger, self.seed = smaller, larger, seed
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"theta": (2,)}

    def sample(self, generator: torch.Generator, size: int) -> Task:
        source = generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(size, 3, generator=source, dtype=torch.float64)
        (low, high), (first, last) = self.smaller, self.larger
        values = 10 ** torch.stack([low + (high - low) * drawn[:, 0], first + (last - first) * drawn[:, 1]], dim=1)
        cos, sin = torch.cos(math.pi * drawn[:, 2]), torch.sin(math.pi * drawn[:, 2])
        basis = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
        matrix = basis @ torch.diag_embed(values) @ basis.mT
        return ConvexQuadraticTask({"matrix": matrix.to(self.dtype), "start": torch.full((size, 2), 4.0, dtype=self.dtype)})
