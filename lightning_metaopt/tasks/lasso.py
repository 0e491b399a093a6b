"""LASSO, quadratic and Rosenbrock problems of M-L2O (Yang et al., ICLR 2023, section 5 and appendix A.6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import Tree

__all__ = ["Lasso", "Rosenbrock"]


@final
class LassoTask(Task):
    """:math:`f_i(\\theta) = \\frac12\\|A_i\\theta - b_i\\|_2^2 + \\lambda\\|\\theta\\|_1`."""

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return {"theta": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        theta = params["theta"]
        residual = torch.baddbmm(batch["target"].unsqueeze(2), batch["matrix"], theta.unsqueeze(2), beta=-1)
        # |theta| with a constant sign: autograd would follow the sign's derivative, which is 0, through slow operations
        absolute = (theta * theta.detach().sign()).sum(1)
        return torch.add(batch["penalty"] * absolute, (residual * residual).sum((1, 2)), alpha=0.5)


@final
class Lasso(TaskFamily):
    """:math:`\\min_\\theta \\frac12\\|A\\theta - b\\|_2^2 + \\lambda\\|\\theta\\|_1`, with :math:`b\\sim U(-1, 1)` and
    :math:`\\theta_0\\sim N(0, 0.01^2)`.

    With ``std`` the entries of :math:`A` are :math:`N(0, \\sigma^2)`: the paper's problems for adaptation and test. Without, each
    problem draws its own range :math:`r` from ``ranges`` with equal probability, and the entries are :math:`U(0, r)`: the paper's
    mixture for training. ``penalty=0`` gives its quadratics. The published code starts from the same distributions, and
    fixes how many problems of a batch have each range; here that is random.

    Args:
        std: :math:`\\sigma`, at least 0; ``None`` for the mixture.
        ranges: the ranges of the mixture.
        penalty: :math:`\\lambda`, at least 0.
        dim: number of unknowns and of equations.
        log_scale: multiply each :math:`A` by :math:`e^s`, :math:`s` uniform in this range: random scaling of training problems.
        common_scale: one :math:`s` for all problems that are drawn together, so that there is something to adapt to.
        double: make the problems in float64.

    Raises:
        ValueError: for a negative deviation, range or penalty.

    >>> task = Lasso(std=10.0).draw(seed=0, size=2)
    >>> task.loss(*task.init(torch.Generator()), task.batch(0)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        std: float | None = None,
        ranges: Sequence[float] = (0.1, 0.5, 1.0),
        penalty: float = 0.005,
        dim: int = 10,
        *,
        log_scale: tuple[float, float] = (0.0, 0.0),
        common_scale: bool = False,
        double: bool = False,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if std is not None and not std >= 0:
            raise ValueError(f"std must be at least 0, or None for the mixture, got {std}")
        if not ranges or not all(value > 0 for value in ranges):
            raise ValueError(f"ranges must be positive numbers, got {list(ranges)}")
        if not penalty >= 0:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        if not log_scale[0] <= log_scale[1]:
            raise ValueError(f"log_scale must be a range (low, high), got {tuple(log_scale)}")
        self.std, self.ranges, self.penalty, self.dim = std, tuple(ranges), penalty, dim
        self.log_scale, self.common_scale = tuple(log_scale), common_scale
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"theta": (self.dim,)}

    def sample(self, generator: torch.Generator, size: int) -> Task:
        shape = (size, self.dim, self.dim)
        if self.std is None:
            which = torch.randint(len(self.ranges), (size, 1, 1), generator=generator)
            width = torch.tensor(self.ranges, dtype=self.dtype)[which]
            matrix = width * torch.rand(shape, generator=generator, dtype=self.dtype)
        else:
            matrix = self.std * torch.randn(shape, generator=generator, dtype=self.dtype)
        low, high = self.log_scale
        if low or high:
            drawn = torch.rand(1 if self.common_scale else size, 1, 1, generator=generator, dtype=self.dtype)
            matrix = matrix * (low + (high - low) * drawn).exp()
        data = {
            "matrix": matrix,
            "target": 2 * torch.rand(size, self.dim, generator=generator, dtype=self.dtype) - 1,
            "start": 0.01 * torch.randn(size, self.dim, generator=generator, dtype=self.dtype),
            "penalty": torch.full((size,), self.penalty, dtype=self.dtype),
        }
        return LassoTask(data)


@final
class RosenbrockTask(Task):
    """:math:`f(x) = (1 - x_1)^2 + 100\\,(x_2 - x_1^2)^2`."""

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return {"theta": self.data["start"]}, {}

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        first, second = params["theta"].unbind(1)
        return (1 - first).square() + 100 * (second - first.square()).square()


@final
class Rosenbrock(TaskFamily):
    """Rosenbrock's function in the plane, minimum 0 at (1, 1), from starting points :math:`N(0, \\sigma^2)`.

    Args:
        start_std: :math:`\\sigma`, finite and at least 0.
        double: make the problems in float64.

    Raises:
        ValueError: for another deviation.

    >>> task = Rosenbrock(start_std=0.0).draw(seed=0, size=1)
    >>> task.loss(*task.init(torch.Generator()), task.batch(0)).tolist()
    [1.0]
    """

    def __init__(self, start_std: float = 1.0, *, double: bool = False) -> None:
        if not start_std >= 0 or not math.isfinite(start_std):
            raise ValueError(f"start_std must be finite and at least 0, got {start_std}")
        self.start_std = start_std
        self.dtype = torch.float64 if double else torch.float32

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"theta": (2,)}

    def sample(self, generator: torch.Generator, size: int) -> Task:
        return RosenbrockTask({"start": self.start_std * torch.randn(size, 2, generator=generator, dtype=self.dtype)})
