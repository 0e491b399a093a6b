"""A cell of an LSTM on columns of coordinates, with a derivative written out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["LSTMLayer", "linear_map", "plain_cell"]


def linear_map(generator: torch.Generator, rows: int, columns: int) -> nn.Parameter:
    """A matrix with entries of a normal distribution of deviation :math:`1/\\sqrt{columns}`, cut off at two deviations."""
    std = 1 / math.sqrt(columns)
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, columns), std=std, a=-2 * std, b=2 * std, generator=generator))


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
        """``(features, N)`` and the state ``(hidden, N)`` twice to the new state."""
        given = (self.weight_input, self.weight_hidden, self.bias, x, hidden, cell)
        if any(forward_ad.unpack_dual(value).tangent is not None for value in given):
            return plain_cell(*given)
        if torch.is_grad_enabled():
            found: tuple[Tensor, ...] = _Cell.apply(*given)  # type: ignore[no-untyped-call]  # torch has no types here
            return found[0], found[1]
        return _cell(*given)[:2]


def plain_cell(
    weight_input: Tensor, weight_hidden: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations of the cell, for derivatives of every kind and order."""
    gates = torch.addmm(torch.addmm(bias.unsqueeze(1), weight_input, x), weight_hidden, hidden)
    enter, forget, candidate, leave = gates.chunk(4)
    cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _cell(
    weight_input: Tensor, weight_hidden: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # One product of matrices where the equations have two; gates are squashed where they lie.
    size = len(cell)
    gates = torch.addmm(bias.unsqueeze(1), torch.cat([weight_input, weight_hidden], 1), torch.cat([x, hidden]))
    gates[: 2 * size].sigmoid_()
    gates[2 * size : 3 * size].tanh_()
    gates[3 * size :].sigmoid_()
    enter, forget, candidate, leave = gates.chunk(4)
    cell = torch.addcmul(forget * cell, enter, candidate)
    return cell.tanh().mul_(leave), cell, gates


class _Cell(torch.autograd.Function):
    """:func:`plain_cell` with fewer passes, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _cell(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        # What is cheap to compute again is not kept: a window's activations are most of its memory.
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_cell: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        *given, after, gates = ctx.saved_tensors
        weight_input, weight_hidden, _, x, hidden, cell = given
        grad_hidden = torch.zeros_like(cell) if grad_hidden is None else grad_hidden
        grad_cell = torch.zeros_like(cell) if grad_cell is None else grad_cell
        if torch.is_grad_enabled():  # this derivative will be differentiated itself
            return _slowly(given, (grad_hidden, grad_cell))
        enter, forget, candidate, leave = gates.chunk(4)
        squashed = after.tanh()
        through = grad_hidden * leave
        grad_cell = torch.addcmul(grad_cell + through, through, squashed.square(), value=-1)
        slopes = torch.cat([grad_cell * candidate, grad_cell * cell, grad_cell * enter, grad_hidden * squashed])
        slopes *= _slope(gates, len(cell))
        weight = slopes @ torch.cat([x, hidden]).mT
        into = torch.cat([weight_input, weight_hidden], 1).mT @ slopes
        sizes = [len(x), len(hidden)]
        return (*weight.split(sizes, 1), slopes.sum(1), *into.split(sizes), grad_cell * forget)


def _slope(gates: Tensor, size: int) -> Tensor:
    # The derivatives of the gates in terms of their values: s - s^2, and 1 - t^2 for the candidate.
    slope = torch.addcmul(gates, gates, gates, value=-1)
    candidate = gates[2 * size : 3 * size]
    slope[2 * size : 3 * size] += 1 - candidate
    return slope


def _slowly(given: list[Tensor], grads: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    given = [value.view_as(value) for value in given]  # states have come from the weights: do not go back to these through them
    wanted = [value for value in given if value.requires_grad]
    found = iter(torch.autograd.grad(plain_cell(*given), wanted, grads, create_graph=True))
    return tuple(next(found) if value.requires_grad else None for value in given)
