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
from lightning_metaopt.rules.lstm_cell import Gates, affine, cell_backward, cell_forward, unjoined
from lightning_metaopt.rules.lstm_columns import Columns
from lightning_metaopt.rules.lstm_pools import Pool, Pools, Split
from lightning_metaopt.tree import Tree

__all__ = ["layer_names", "layers_of", "lstm_forward", "lstm_step", "pools_of"]


def lstm_step(rule: Any, x: Tensor, state: Sequence[Tensor], layout: Columns) -> tuple[Tensor, list[Tensor]]:
    """``rule.plain(x, state, layout)``, faster: updates of all coordinates, and the state's leaves, slot by slot.

    Args:
        rule: the rule, bound to the meta-parameters of the step.
        x: features, ``(features, N)``, or ``(R, features, N)`` for replicas.
        state: leaves, slot by slot, parameter by parameter.
        layout: between leaves and columns.
    """
    phi: Tree = rule.phi()
    if not torch.is_grad_enabled():
        return _forward(rule, phi, x, state, layout)[:2]
    if any(forward_ad.unpack_dual(value).tangent is not None for value in (x, *phi.values(), *state)):
        found: tuple[Tensor, list[Tensor]] = rule.plain(x, state, layout)
        return found
    update, *after = _Step.apply(rule, layout, list(phi), x, *phi.values(), *state)  # type: ignore[no-untyped-call]  # torch
    return update, after


def layers_of(phi: Tree) -> list[Gates]:
    """The layers' weights, joined."""
    count = sum(name.endswith(".weight_hidden") for name in phi)
    return [Gates.of(*(phi[name] for name in layer_names(index))) for index in range(count)]


def layer_names(index: int) -> list[str]:
    """Of the weights of layer ``index`` in phi."""
    return [f"cells.{index}.{part}" for part in ("weight_input", "weight_hidden", "bias")]


def pools_of(pools: Pools, layers: Sequence[Gates], like: Tensor) -> list[tuple[Pool, Pool, Pool]]:
    """For each layer's joint input, gates and cell states, of columns and a type like ``like``'s."""
    found = []
    for layer in layers:
        size = layer.weight.shape[-2] // 4
        joint = pools.of(like, layer.weight.shape[-1] - size, size)
        found.append((joint, pools.of(like, size, size, size, size), pools.of(like, size)))
    return found


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype is dtype else value.to(dtype)  # a call that does nothing costs as much as one that does


def _slots(leaves: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    size = len(leaves) // count
    return (leaves[begin : begin + size] for begin in range(0, len(leaves), size))


def lstm_forward(
    rule: Any, phi: Tree, layers: Sequence[Gates], x: Tensor, held: Sequence[Tensor], buffers: Sequence[tuple[Split, Split]] = ()
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Updates, the new state's columns, and what derivatives need: the last layer's output and each layer's input and gates.

    Args:
        rule: what goes before the layers and comes after them.
        phi: its meta-parameters.
        layers: of :func:`layers_of`.
        x: features.
        held: the old state's columns, hidden and cell by layer.
        buffers: for each layer where its joint input and its gates go. Then the new state is where the old one was, if that is
            of the precision of ``x``.
    """
    kept, after, below = [], [], rule.enter(phi, x, buffers[0][0][1][0] if buffers else None)
    for index, layer in enumerate(layers):
        old, cell = held[2 * index], _cast(held[2 * index + 1], x.dtype)
        if buffers:
            (joint, (top, bottom)), gates = buffers[index]
            bottom.copy_(old)
            if index:
                top.copy_(below)
            where = old if old.dtype is x.dtype else None
            below, cell, whole = cell_forward(layer, joint, cell, gates=gates, hidden=where, out=cell)
        else:
            joint = torch.cat([below, _cast(old, x.dtype)], -2)
            below, cell, whole = cell_forward(layer, joint, cell)
        after += [below, cell]
        kept += [joint, whole]
    out = rule.leave(affine(phi["out_bias"].unsqueeze(-1), phi["out_weight"], below))
    return (rule.factor(phi) * out).squeeze(-2), after, [out, *kept]


def _forward(
    rule: Any, phi: Tree, x: Tensor, state: Sequence[Tensor], layout: Columns
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    held = [layout.columns(slot) for slot in _slots(state, 2 * len(rule.cells))]
    update, after, kept = lstm_forward(rule, phi, layers_of(phi), x, held)
    leaves = [_cast(leaf, state[0].dtype) for slot in after for leaf in layout.leaves(slot)]
    return update, leaves, [*kept, *after]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Any, layout: Columns, names: list[str], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        phi, state = dict(zip(names, tensors, strict=False)), tensors[len(names) :]
        update, after, kept = _forward(rule, phi, x, state, layout)
        ctx.rule, ctx.layout, ctx.names, ctx.kept = rule, layout, names, len(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, x, *tensors)
        return (update, *after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grad_state: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        kept, x, tensors = saved[: ctx.kept], saved[ctx.kept], saved[ctx.kept + 1 :]
        phi, state = dict(zip(ctx.names, tensors, strict=False)), tensors[len(ctx.names) :]
        if torch.is_grad_enabled():  # this derivative will be differentiated itself
            return (None, None, None, *_slowly(ctx.rule, ctx.layout, x, phi, state, (grad, *grad_state)))
        found, grad_x, before = _backward(ctx.rule, ctx.layout, phi, x, state, kept, grad, grad_state)
        return (None, None, None, grad_x, *(found.get(name) for name in ctx.names), *before)


def _backward(
    rule: Any,
    layout: Columns,
    phi: Tree,
    x: Tensor,
    state: Sequence[Tensor],
    kept: Sequence[Tensor],
    grad: Tensor | None,
    grad_state: Sequence[Tensor | None],
) -> tuple[Tree, Tensor, list[Tensor]]:
    # Derivatives with respect to phi, features and old state, from those with respect to updates and new state.
    count = len(rule.cells)
    out, inputs, gates = kept[0], kept[1 : 2 * count + 1 : 2], kept[2 : 2 * count + 1 : 2]
    after = kept[2 * count + 1 :]
    held = [_cast(layout.columns(slot), x.dtype) for slot in _slots(state, 2 * count)]
    coming = []
    for slot, like in zip(_slots(grad_state, 2 * count), _slots(state, 2 * count), strict=True):  # type: ignore[arg-type]  # None
        leaves = [torch.zeros_like(leaf) if value is None else value for value, leaf in zip(slot, like, strict=True)]
        coming.append(None if all(value is None for value in slot) else _cast(layout.columns(leaves), x.dtype))
    found: Tree = {}
    below: Tensor | None = None
    if grad is not None:
        row = rule.factor(phi) * grad.unsqueeze(-2)
        if "log_scale" in phi:
            found["log_scale"] = (row * out).sum((-2, -1))
        row = rule.leave_backward(out, row)
        found |= {"out_weight": row @ after[-2].mT, "out_bias": row.sum(-1)}
        below = phi["out_weight"].mT @ row
    before: list[Tensor] = []
    layers = layers_of(phi)
    for index in reversed(range(count)):
        hidden, cell = coming[2 * index : 2 * index + 2]
        if below is None or hidden is None:
            either = hidden if below is None else below
            arrived = torch.zeros_like(held[2 * index]) if either is None else either.clone()
        else:
            arrived = below + hidden
        old, slopes = held[2 * index + 1], gates[index].clone()
        cell = torch.zeros_like(old) if cell is None else cell
        grad_cell, into = cell_backward(layers[index], (slopes, slopes.chunk(4, -2)), old, after[2 * index], arrived, cell)
        own = unjoined(inputs[index] @ slopes.mT, slopes.sum(-1))
        found |= dict(zip(layer_names(index), own, strict=True))
        below, grad_hidden = into.split([into.shape[-2] - rule.hidden, rule.hidden], -2)
        before = [grad_hidden, grad_cell, *before]
    assert below is not None
    y = inputs[0].narrow(-2, 0, below.shape[-2])
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
