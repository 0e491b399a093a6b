"""One step of a rule on the parameters themselves, and the checks that keep a bad step from doing harm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree

__all__ = ["Slot", "advance"]


@dataclass(frozen=True)
class Slot:
    """A parameter that takes part in a step.

    Attributes:
        param: the parameter.
        grad: its gradient.
        factor: what to multiply the rule's update by.
        shrink: what weight decay multiplies the parameter by, before the rule is applied.
    """

    param: Tensor
    grad: Tensor
    factor: float = 1.0
    shrink: float = 1.0


def advance(
    rule: Rule,
    slots: Mapping[str, Slot],
    store: defaultdict[Tensor, Any],
    dtype: torch.dtype,
    *,
    loss: Tensor | None = None,
    limit: float | None = None,
) -> tuple[str, str] | None:
    """Apply ``rule`` once to parameters and state, unless something is not finite: then neither changes.

    The in-place form of the rule runs where there is one and the gradients are tame (the sum of their squares does not
    overflow); otherwise updates are computed first, looked at, and then added.

    Args:
        rule: the update rule; its meta-parameters are on the parameters' device.
        slots: the parameters by the rule's names.
        store: state by parameter and slot, without the axis of problems; filled for parameters that are new to it.
        dtype: the precision in which the rule computes; other parameters and gradients are copied to it and back.
        loss: loss at the parameters, shape ``(1,)``, where known.
        limit: longest step in Euclidean norm, without weight decay.

    Returns:
        ``None``, or what was not finite and at which of the names (of the rule).
    """
    grads = {name: slot.grad.unsqueeze(0).to(dtype) for name, slot in slots.items()}
    # One pass over the gradients and one number to wait for; gradients are looked at one by one only where that fails.
    tame = _norm(grads) <= math.sqrt(torch.finfo(dtype).max)
    if not tame and (bad := _first_not_finite(grads)):
        return "gradient", bad
    params = {name: _leaf(slot.param, dtype) for name, slot in slots.items()}
    state = _read(rule, slots, store, params)
    if tame and limit is None and type(rule).forward_ is not Rule.forward_:
        _write(slots, store, state)
        for name, slot in slots.items():
            if slot.shrink != 1:
                params[name].mul_(slot.shrink)
        scale = {name: slot.factor for name, slot in slots.items()}
        rule.forward_(grads, state, params, loss, None if set(scale.values()) == {1.0} else scale)
    else:
        # Weight decay goes to a copy, which is thrown away if the update is not finite.
        params = {name: leaf if slots[name].shrink == 1 else leaf * slots[name].shrink for name, leaf in params.items()}
        updates, state = rule(grads, state, params, loss)
        length = _norm({name: slots[name].factor * leaf.norm(dtype=leaf.dtype) for name, leaf in updates.items()})
        if not math.isfinite(length):
            if bad := _first_not_finite(updates):
                return "update", bad
            length = _norm({name: slots[name].factor * leaf.double().norm() for name, leaf in updates.items()})
        if not tame and (bad := next(filter(None, map(_first_not_finite, state.values())), None)):
            return "new state", bad
        _write(slots, store, _owned(state, [*grads.values(), *params.values()]))
        shorten = 1.0 if limit is None or length <= limit else limit / length
        for name, update in updates.items():
            params[name].add_(update, alpha=slots[name].factor * shorten)
    for name, slot in slots.items():
        if slot.param.requires_grad and params[name].data_ptr() != slot.param.data_ptr():
            slot.param.copy_(params[name].squeeze(0))
    return None


def _leaf(param: Tensor, dtype: torch.dtype) -> Tensor:
    # The parameter as a batch of one problem: a view where possible, but a copy of frozen ones, which joint rules would move.
    leaf = param.detach().unsqueeze(0).to(dtype)
    return leaf if param.requires_grad else leaf.clone()


def _read(rule: Rule, slots: Mapping[str, Slot], store: Mapping[Tensor, Mapping[str, Tensor]], params: Tree) -> State:
    # The rule's state with the axis of problems (views); fresh for parameters that take part for the first time.
    state: State = {}
    fresh = {}
    for name, slot in slots.items():
        if slot.param in store:
            for key, leaf in store[slot.param].items():
                state.setdefault(key, {})[name] = leaf.unsqueeze(0)
        else:
            fresh[name] = params[name]
    if fresh:
        for key, tree in _owned(rule.init(fresh), params.values()).items():
            state.setdefault(key, {}).update(tree)
    return state


def _write(slots: Mapping[str, Slot], store: defaultdict[Tensor, Any], state: State) -> None:
    for key, tree in state.items():
        for name, leaf in tree.items():
            store[slots[name].param][key] = leaf.squeeze(0)


def _owned(state: State, others: Iterable[Tensor]) -> State:
    # A rule may hand back its arguments as state (the last gradient, the starting point); here those change in place.
    shared = {leaf.untyped_storage().data_ptr() for leaf in others}
    return {
        key: {name: leaf.clone() if leaf.untyped_storage().data_ptr() in shared else leaf for name, leaf in tree.items()}
        for key, tree in state.items()
    }


def _norm(tree: Tree) -> float:
    # Euclidean norm of all leaves together; not finite if one of them is not, or if a square overflows.
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.values()])))


def _first_not_finite(tree: Tree) -> str | None:
    return next((name for name, leaf in tree.items() if not torch.isfinite(leaf).all()), None)
