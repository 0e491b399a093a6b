"""One step of a coordinatewise LSTM as one node of the autograd graph.

Meta-training is bound by the number of operations: networks of twenty units on a thousand coordinates take microseconds, and each
node of a graph as long again. What ``CoordinatewiseLSTM.plain`` says in some sixty nodes is one here, with its derivative by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_metaopt.rule import Rule, under
from lightning_metaopt.rules.lstm_cell import affine, cell_backward, cell_forward
from lightning_metaopt.tree import Tree

__all__ = ["Columns", "lstm_backward", "lstm_forward", "lstm_step"]


class Columns:
    """How leaves ``(B, k, *shape)`` of parameters ``(B, *shape)`` become the columns of one matrix ``(k, N)``, and back.

    With replicas the matrix is ``(R, k, N / R)``, and problems come replica by replica. Without shapes the leaf of the only
    parameter is such a matrix already.
    """

    def __init__(self, shapes: Sequence[torch.Size], replicas: int | None = None) -> None:
        self.shapes, self.replicas = shapes, replicas

    def columns(self, leaves: Sequence[Tensor]) -> Tensor:
        """Of one slot, with a leaf for each parameter; without a copy where the last step left it so."""
        if not self.shapes:
            return leaves[0]
        found = [leaf.transpose(0, 1).reshape(leaf.shape[1], *self._split) for leaf in leaves]
        joined = found[0] if len(found) == 1 else torch.cat(found, -1)
        return joined if self.replicas is None else joined.transpose(0, 1)

    def leaves(self, columns: Tensor) -> list[Tensor]:
        """The inverse."""
        if not self.shapes:
            return [columns]
        columns = columns if self.replicas is None else columns.transpose(0, 1)
        sizes = [shape.numel() // (self.replicas or 1) for shape in self.shapes]
        pieces = columns.split(sizes, -1) if len(sizes) > 1 else [columns]
        return [piece.reshape(len(columns), *shape).transpose(0, 1) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @property
    def _split(self) -> tuple[int, ...]:
        return (-1,) if self.replicas is None else (self.replicas, -1)


def lstm_step(rule: Any, x: Tensor, state: Sequence[Tensor], layout: Columns) -> tuple[Tensor, list[Tensor]]:
    """``rule.plain(x, state, layout)``, faster: updates of all coordinates, and the state's leaves, slot by slot.

    Args:
        rule: the rule, bound to the meta-parameters of the step.
        x: features, ``(features, N)``, or ``(R, features, N)`` for replicas.
        state: leaves, slot by slot, parameter by parameter.
        layout: between leaves and columns.
    """
    if not torch.is_grad_enabled():
        return lstm_forward(rule, x, state, layout)[:2]
    phi = [value for _, value in rule.named_parameters()]
    if any(forward_ad.unpack_dual(value).tangent is not None for value in (x, *phi, *state)):
        found: tuple[Tensor, list[Tensor]] = rule.plain(x, state, layout)
        return found
    update, *after = _Step.apply(rule, layout, len(phi), x, *phi, *state)  # type: ignore[no-untyped-call]  # torch has no types here
    return update, after


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype is dtype else value.to(dtype)  # a call that does nothing costs as much as one that does


def _slots(leaves: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    size = len(leaves) // count
    return (leaves[begin : begin + size] for begin in range(0, len(leaves), size))


def lstm_forward(
    rule: Any, x: Tensor, state: Sequence[Tensor], layout: Columns, in_place: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Updates, the state's leaves, and what :func:`lstm_backward` needs.

    With ``in_place`` new leaves lie where the old ones did, or, where these are of another precision, have that of ``x``.
    """
    held = [_cast(layout.columns(slot), x.dtype) for slot in _slots(state, 2 * len(rule.cells))]
    y = rule.enter(x)
    kept, after, below = [y], [], y
    for index, layer in enumerate(rule.cells):
        weights = (layer.weight_input, layer.weight_hidden, layer.bias)
        hidden, cell, gates = cell_forward(weights, below, held[2 * index], held[2 * index + 1], in_place)
        after += [hidden, cell]
        kept += [hidden, cell, gates]
        below = hidden
    out = rule.leave(affine(rule.out_bias, rule.out_weight, below))
    dtype = x.dtype if in_place else state[0].dtype
    leaves = [_cast(leaf, dtype) for slot in after for leaf in layout.leaves(slot)]
    return (rule.factor() * out).squeeze(-2), leaves, [out, *kept]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Any, layout: Columns, count: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        update, after, kept = lstm_forward(rule, x, tensors[count:], layout)
        ctx.rule, ctx.layout, ctx.count, ctx.kept = rule, layout, count, len(kept)
        ctx.names = [name for name, _ in rule.named_parameters()]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, x, *tensors)
        return (update, *after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grad_state: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        kept, x, tensors = saved[: ctx.kept], saved[ctx.kept], saved[ctx.kept + 1 :]
        phi, state = dict(zip(ctx.names, tensors[: ctx.count], strict=True)), tensors[ctx.count :]
        if torch.is_grad_enabled():  # this derivative will be differentiated itself
            return (None, None, None, *_slowly(ctx.rule, ctx.layout, x, phi, state, (grad, *grad_state)))
        found, grad_x, before = lstm_backward(ctx.rule, ctx.layout, phi, x, state, kept, grad, grad_state)
        return (None, None, None, grad_x, *(found.get(name) for name in ctx.names), *before)


def lstm_backward(
    rule: Any,
    layout: Columns,
    phi: Tree,
    x: Tensor,
    state: Sequence[Tensor],
    kept: Sequence[Tensor],
    grad: Tensor | None,
    grad_state: Sequence[Tensor | None],
) -> tuple[Tree, Tensor, list[Tensor]]:
    """Derivatives with respect to phi, features and old state, from those with respect to updates and new state.

    ``kept`` is what :func:`lstm_forward` returned last; the rest as in :func:`lstm_step`.
    """
    slots = 2 * len(rule.cells)
    out, y = kept[:2]
    held = [_cast(layout.columns(slot), x.dtype) for slot in _slots(state, slots)]
    coming = []
    for slot, like in zip(_slots(grad_state, slots), _slots(state, slots), strict=True):  # type: ignore[arg-type]  # some are None
        leaves = [torch.zeros_like(leaf) if value is None else value for value, leaf in zip(slot, like, strict=True)]
        coming.append(None if all(value is None for value in slot) else _cast(layout.columns(leaves), x.dtype))
    found: Tree = {}
    top = kept[-3]
    below: Tensor | None = None
    if grad is not None:
        row = grad.unsqueeze(-2)
        factor = rule.scale
        if rule.log_scale is not None:
            factor = rule.factor_of(phi["log_scale"])
            found["log_scale"] = (factor * out * row).sum((-2, -1))
        row = rule.leave_backward(out, factor * row)
        found["out_weight"], found["out_bias"] = row @ top.mT, row.sum(-1)
        below = phi["out_weight"].mT @ row
    before: list[Tensor] = []
    for index in reversed(range(slots // 2)):
        hidden, cell = coming[2 * index : 2 * index + 2]
        if below is None or hidden is None:
            either = hidden if below is None else below
            arrived = torch.zeros_like(held[2 * index]) if either is None else either
        else:
            arrived = below + hidden
        names = [f"cells.{index}.{part}" for part in ("weight_input", "weight_hidden", "bias")]
        weights = (phi[names[0]], phi[names[1]], phi[names[2]])
        given = (y if index == 0 else kept[2 + 3 * (index - 1)], held[2 * index], held[2 * index + 1])
        own, (below, *states) = cell_backward(weights, given, kept[3 + 3 * index], kept[4 + 3 * index], arrived, cell)
        found |= dict(zip(names, own, strict=True))
        before = [*states, *before]
    assert below is not None
    own_in, grad_x = rule.enter_backward(phi, x, y, below)
    leaves = [_cast(leaf, state[0].dtype) for slot in before for leaf in layout.leaves(slot)]
    return found | own_in, grad_x, leaves


def _slowly(
    rule: Rule, layout: Columns, x: Tensor, phi: Tree, state: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    # States have come from the same meta-parameters: do not go back to these through them.
    x, *rest = (value.view_as(value) for value in (x, *phi.values(), *state))
    own = dict(zip(phi, rest, strict=False))
    update, after = under(rule, own, lambda bound: bound.plain(x, rest[len(phi) :], layout))  # type: ignore[operator]
    outputs, arriving = zip(
        *((value, grad) for value, grad in zip((update, *after), grads, strict=True) if grad is not None), strict=True
    )
    given = [x, *rest]
    wanted = [value for value in given if value.requires_grad]
    results = torch.autograd.grad(outputs, wanted, arriving, create_graph=True, allow_unused=True)
    answers = iter(results)
    return tuple(next(answers) if value.requires_grad else None for value in given)
