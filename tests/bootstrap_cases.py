"""A small problem for bootstrapped meta-gradients, in float64."""

from __future__ import annotations

from typing import Any

import torch
from step_cases import STEPS
from torch import Tensor, nn

N = 4


class Point(nn.Module):
    """Two parameters, and the loss of a minibatch ``(A, c)``: sum of cos(A x) + |x - c|^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor([0.8, 1.2], dtype=torch.float64))

    def forward(self, batch: Any) -> Tensor:
        x = torch.cat([self.first, self.second])
        return (batch[0] @ x).cos().sum() + 0.5 * (x - batch[1]).square().sum()


def minibatches(steps: int = STEPS) -> list[Any]:
    torch.manual_seed(0)
    common = torch.randn(N, dtype=torch.float64)
    return [
        (0.5 * torch.randn(3, N, dtype=torch.float64), common + 0.5 * torch.randn(N, dtype=torch.float64)) for _ in range(steps)
    ]
