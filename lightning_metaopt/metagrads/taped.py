"""The gradient of a window for rules that know the derivative of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, full_precision, unroll
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, Tape
from lightning_metaopt.tree import Tree, leaves, tree_map

__all__ = ["taped_window"]


@final
class _Recorder(Rule):
    # Steps of a tape as those of a rule. The state is the tape's own.

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.steps = tape
        self.gradients: list[Tree] = []

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        self.gradients.append(grads)
        return self.steps.step(grads, params), state


def taped_window(
    rule: Rule, tape: Tape, episode: Episode, objective: Objective, steps: int, second: bool
) -> tuple[Tensor, Tree, Episode]:
    """Value, gradient, and the episode after ``steps`` steps.

    With constant gradients :math:`g_t` the iterates are :math:`\\theta_{t+1} = \\theta_t + u_t`, and the derivative of the
    objective with respect to :math:`u_t` is its derivative with respect to :math:`\\theta_T` plus the sum of
    :math:`\\partial L/\\partial f_s\\, g_s` over the later steps :math:`s`: all of it is known when the window ends. In second
    order each :math:`g_t` keeps a graph of its own, back to :math:`\\theta_t` and no further; on the way back a product with the
    Hessian there comes to the derivative.

    Args:
        rule: whose ``tape`` it is.
        tape: made for the episode's state.
        episode: where to start.
        objective: what to differentiate.
        steps: the window's length.
        second: differentiate gradients too.
    """
    recorder = _Recorder(tape)
    end, losses = unroll(recorder, episode, steps, order="local" if second else "none")
    end = replace(end, state=tape.state)
    phi: Tree = dict(rule.named_parameters())
    leaf = replace(end, params=tree_map(_leaf, end.params), state={slot: tree_map(_leaf, tree) for slot, tree in end.state.items()})
    losses = losses.requires_grad_()
    with torch.enable_grad():
        value = objective(rule, episode, leaf, losses).mean()
    if not value.requires_grad:  # the objective is a constant
        return value.detach(), tree_map(torch.zeros_like, phi), end
    trees = [leaf.params, {"": losses}, phi, *leaf.state.values()]
    reached = iter(torch.autograd.grad(value, leaves(trees), allow_unused=True))
    params, weights, total, *slots = ({name: next(reached) for name in tree} for tree in trees)
    with torch.no_grad(), full_precision(end.params):
        pairs = zip(end.state.items(), slots, strict=True)
        tape.begin_backward(
            {slot: _filled(found, like) for (slot, like), found in pairs if any(grad is not None for grad in found.values())}
        )
        _back(tape, recorder.gradients, _filled(params, end.params), _filled(weights, {"": losses})[""], second)
        own = tape.grads()
        total = {name: grad + own[name] if name in own else grad for name, grad in _filled(total, phi).items()}
    return value.detach(), total, end


def _back(tape: Tape, gradients: Sequence[Tree], params: Tree, weights: Tensor, second: bool) -> None:
    direct = {name: _weighted([grads[name] for grads in gradients], weights) for name in params}
    if not second:
        tape.backward({name: _later(direct[name], leaf) for name, leaf in params.items()})
        return
    for index in reversed(range(len(gradients))):
        through = tape.backward(tree_map(lambda leaf: leaf.unsqueeze(0), params))
        params = {name: leaf + direct[name][index] for name, leaf in params.items()}
        for name, part in through.items():
            params[name].add_(part)


def _weighted(gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(gradients))
    return stacked.mul_(weights.view(*weights.shape, *(1,) * (stacked.dim() - 2)))


def _later(direct: Tensor, last: Tensor) -> Tensor:
    # last, plus the sum of what comes after each step
    return torch.cat([last.unsqueeze(0), direct[1:].flip(0)]).cumsum(0).flip(0)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def _filled(grads: Mapping[str, Tensor | None], like: Tree) -> Tree:
    return {name: torch.zeros_like(like[name]) if grad is None else grad for name, grad in grads.items()}
