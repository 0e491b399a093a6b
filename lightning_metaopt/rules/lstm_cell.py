"""A cell of an LSTM on columns of coordinates: its equations, and the same with few passes over memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["LSTMLayer", "affine", "cell_backward", "cell_forward", "elu", "linear_map"]


def linear_map(generator: torch.Generator, rows: int, columns: int) -> nn.Parameter:
    """A matrix with entries of a normal distribution of deviation :math:`1/\\sqrt{columns}`, cut off at two deviations."""
    std = 1 / math.sqrt(columns)
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, columns), std=std, a=-2 * std, b=2 * std, generator=generator))


def affine(bias: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """:math:`W x + b` for columns ``x``; all three may have one more axis in front, of replicas."""
    return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(bias.unsqueeze(-1), weight, x)


def elu(x: Tensor) -> Tensor:
    """:math:`\\max(x, e^x - 1)`, in the memory of ``x``. Without autograd in half of the time that torch's takes, whose
    exponential is exact around 0, where this one is off by the rounding of 1.
    """
    if torch.is_grad_enabled() or forward_ad.unpack_dual(x).tangent is not None:
        return nn.functional.elu(x, inplace=True)
    return torch.maximum(x, x.clamp(max=0).exp_().sub_(1), out=x)


class LSTMLayer(nn.Module):
    """A cell of an LSTM whose coordinates are columns; gates in PyTorch's order (input, forget, candidate, output)."""

    def __init__(self, features: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        joint = linear_map(generator, 4 * hidden, features + hidden).detach()
        self.weight_input = nn.Parameter(joint[:, :features].clone())
        self.weight_hidden = nn.Parameter(joint[:, features:].clone())
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1.0  # remember, until something else is learned

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """``(features, N)`` and the state ``(hidden, N)`` twice to the new state: the equations."""
        gates = affine(self.bias, torch.cat([self.weight_input, self.weight_hidden], -1), torch.cat([x, hidden], -2))
        enter, forget, candidate, leave = gates.chunk(4, -2)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * cell.tanh(), cell


Weights = tuple[Tensor, Tensor, Tensor]


def cell_forward(
    weights: Weights, x: Tensor, hidden: Tensor, cell: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of :class:`LSTMLayer` without autograd: new state, and the gates, squashed where they lie.

    ``weights`` are those of a layer in the order of its constructor. With ``in_place`` the new state is in the place of the old.
    """
    size = cell.shape[-2]
    gates = affine(weights[2], torch.cat(weights[:2], -1), torch.cat([x, hidden], -2))
    gates.narrow(-2, 0, 2 * size).sigmoid_()
    gates.narrow(-2, 2 * size, size).tanh_()
    gates.narrow(-2, 3 * size, size).sigmoid_()
    enter, forget, candidate, leave = gates.chunk(4, -2)
    cell = torch.mul(forget, cell, out=cell if in_place else None).addcmul_(enter, candidate)
    return torch.tanh(cell, out=hidden if in_place else None).mul_(leave), cell, gates


def cell_backward(
    weights: Weights,
    given: tuple[Tensor, Tensor, Tensor],
    after: Tensor,
    gates: Tensor,
    grad_hidden: Tensor,
    grad_cell: Tensor | None,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Derivatives with respect to the weights, and to ``given``: ``x``, ``hidden`` and ``cell`` of :func:`cell_forward`.

    What is cheap to compute again is not asked for: a window's activations are most of its memory.
    """
    x, hidden, cell = given
    size = cell.shape[-2]
    enter, forget, candidate, leave = gates.chunk(4, -2)
    squashed, through = after.tanh(), grad_hidden * leave
    slope = torch.addcmul(through, through, squashed.square(), value=-1)
    grad_cell = slope if grad_cell is None else slope.add_(grad_cell)
    # s - s^2 for the three sigmoids, 1 - t^2 for the candidate
    slopes = torch.addcmul(gates, gates, gates, value=-1)
    slopes.narrow(-2, 2 * size, size).sub_(candidate).add_(1)
    slopes *= torch.cat([grad_cell * candidate, grad_cell * cell, grad_cell * enter, grad_hidden.mul(squashed)], -2)
    weight = slopes @ torch.cat([x, hidden], -2).mT
    into = torch.cat(weights[:2], -1).mT @ slopes
    sizes = [x.shape[-2], size]
    return [*weight.split(sizes, -1), slopes.sum(-1)], (*into.split(sizes, -2), grad_cell * forget)
