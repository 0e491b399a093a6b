"""A cell of an LSTM on columns of coordinates: its equations, and the same with few passes over memory.

Without autograd everything is a sigmoid: :math:`\\tanh z = 2\\sigma(2z) - 1`. PyTorch's vectorised sigmoid takes a sixth of the
time of its tanh, activations take most of a step after its matrix products, and four gates are then one call. The price is a
rounding error of the size of that of 1, also where the tanh is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_metaopt.rules.lstm_pools import Split

__all__ = ["Gates", "LSTMLayer", "affine", "cell_backward", "cell_forward", "linear_map", "unjoined"]


def linear_map(generator: torch.Generator, rows: int, columns: int) -> nn.Parameter:
    """A matrix with entries of a normal distribution of deviation :math:`1/\\sqrt{columns}`, cut off at two deviations."""
    std = 1 / math.sqrt(columns)
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, columns), std=std, a=-2 * std, b=2 * std, generator=generator))


def affine(bias: Tensor, weight: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """:math:`W x + b` for columns ``x`` and a column ``b``; all may have one more axis in front, of replicas."""
    return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(bias, weight, x, out=out)


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
        gates = affine(self.bias.unsqueeze(-1), torch.cat([self.weight_input, self.weight_hidden], -1), torch.cat([x, hidden], -2))
        enter, forget, candidate, leave = gates.chunk(4, -2)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * cell.tanh(), cell


@dataclass(frozen=True)
class Gates:
    """The weights of an :class:`LSTMLayer` joined, so that all four gates are sigmoids.

    Attributes:
        weight: ``(4 hidden, features + hidden)``, rows of the candidate doubled.
        bias: ``(4 hidden, 1)``, likewise.
        back: the transpose, columns of the candidate four times the layer's: what takes :func:`cell_backward`'s slopes back.
    """

    weight: Tensor
    bias: Tensor
    back: Tensor

    @classmethod
    def of(cls, weight_input: Tensor, weight_hidden: Tensor, bias: Tensor) -> Gates:
        """From the layer's own, in the order of its constructor."""
        weight, bias = torch.cat([weight_input, weight_hidden], -1), bias.unsqueeze(-1).clone()
        _candidate(weight, -2).mul_(2)
        _candidate(bias, -2).mul_(2)
        back = weight.mT.clone(memory_format=torch.contiguous_format)
        _candidate(back, -1).mul_(2)
        return cls(weight, bias, back)


def _candidate(joint: Tensor, dim: int) -> Tensor:
    size = joint.shape[dim] // 4
    return joint.narrow(dim, 2 * size, size)


def cell_forward(
    layer: Gates,
    joint: Tensor,
    cell: Tensor,
    *,
    gates: Split | None = None,
    hidden: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of :class:`LSTMLayer` without autograd: new hidden and cell state, and the four gates' sigmoids.

    Args:
        layer: its weights.
        joint: input and old hidden state, ``(features + hidden, N)``.
        cell: old cell state.
        gates: where to write the sigmoids.
        hidden: where to write the new hidden state.
        out: where to write the new cell state; it may be ``cell``.
    """
    whole = affine(layer.bias, layer.weight, joint, gates[0] if gates else None).sigmoid_()
    enter, forget, candidate, leave = gates[1] if gates else whole.chunk(4, -2)
    cell = torch.mul(forget, cell, out=out).addcmul_(enter, candidate, value=2).sub_(enter)
    return torch.mul(cell, 2, out=hidden).sigmoid_().mul_(leave).mul_(2).sub_(leave), cell, whole


def cell_backward(
    layer: Gates, gates: Split, before: Tensor, hidden: Tensor, grad_hidden: Tensor, grad_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """From derivatives with respect to the new state to those with respect to the old cell state and the joint input.

    Args:
        layer: its weights.
        gates: as :func:`cell_forward` made them. **In their place** are slopes afterwards, the derivatives with respect to what
            went into the sigmoids, for the candidate a quarter of the layer's own: :func:`unjoined` has those of weights from them.
        before: old cell state.
        hidden: new hidden state.
        grad_hidden: the derivative with respect to it. **It is changed.**
        grad_cell: the same of the new cell state; it is not.
    """
    slopes, (enter, forget, candidate, leave) = gates
    bounded = hidden / leave.clamp(min=torch.finfo(leave.dtype).tiny)  # tanh(c), 0 where the gate has no number but 0
    grad_cell = torch.addcmul(grad_cell, torch.addcmul(leave, bounded, hidden, value=-1), grad_hidden)
    # For each gate s what arrives, times s, in the memory of something done with; and that times 1 - s, in the place of s.
    through = grad_hidden.mul_(hidden)
    torch.addcmul(through, through, leave, value=-1, out=leave)
    old = grad_cell * forget
    torch.mul(old, before, out=through)
    torch.addcmul(through, through, forget, value=-1, out=forget)
    grad_cell.mul_(enter)
    torch.mul(candidate, 2, out=through).sub_(1).mul_(grad_cell)
    torch.addcmul(through, through, enter, value=-1, out=enter)
    grad_cell.mul_(candidate)
    torch.addcmul(grad_cell, grad_cell, candidate, value=-1, out=candidate)
    return old, layer.back @ slopes


def unjoined(weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Derivatives with respect to the weights of a layer, in the order of its constructor, from sums over coordinates: of joint
    inputs times slopes, ``(features + hidden, 4 hidden)`` (a tenth faster than the transpose), and of slopes. Both are changed.
    """
    _candidate(weight, -1).mul_(4)
    _candidate(bias, -1).mul_(4)
    size = bias.shape[-1] // 4
    return [*weight.mT.split([weight.shape[-2] - size, size], -1), bias]
