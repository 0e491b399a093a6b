"""The gradient of a window without a graph, for rules whose derivative is written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, Traced
from lightning_metaopt.tree import Tree, expand_to, tree_map

__all__ = ["traced_window"]


@final
class _Recorder(Rule):
    # Steps of a traced rule, with what their derivatives need.

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule
        self.tapes: list[tuple[Tree, Any]] = []

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        updates, after, tape = self.rule.trace(grads, state)
        self.tapes.append((grads, tape))
        return updates, after


def traced_window(rule: Rule, episode: Episode, objective: Objective, steps: int) -> tuple[Tensor, Tree, Episode]:
    """Value, gradient with inner gradients held constant, and the episode after ``steps`` steps.

    With constant gradients :math:`g_t` the iterates are :math:`\\theta_{t+1} = \\theta_t + u_t`, and the derivative of the
    objective with respect to :math:`u_t` is its derivative with respect to :math:`\\theta_T` plus the sum of
    :math:`\\partial L/\\partial f_s\\, g_s` over the later steps :math:`s`: all of it is known when the window ends.
    """
    traced: Any = rule
    assert isinstance(traced, Traced)
    recorder = _Recorder(rule)
    end, losses = unroll(recorder, episode, steps)
    slots = [slot for slot in end.state if any(leaf.is_floating_point() for leaf in end.state[slot].values())]
    leaf = replace(
        end,
        params=tree_map(_leaf, end.params),
        state=end.state | {slot: tree_map(_leaf, end.state[slot]) for slot in slots},
    )
    losses = losses.requires_grad_()
    with torch.enable_grad():
        value = objective(rule, episode, leaf, losses).mean()
    names, phi = zip(*rule.named_parameters(), strict=True)
    given = [*leaf.params.values(), *(part for slot in slots for part in leaf.state[slot].values()), losses, *phi]
    found = iter(torch.autograd.grad(value, given, allow_unused=True, materialize_grads=True)) if value.requires_grad else None
    if found is None:  # the objective is a constant
        return value.detach(), {name: torch.zeros_like(part) for name, part in zip(names, phi, strict=True)}, end
    params = {name: next(found) for name in leaf.params}
    state: State = {slot: {name: next(found) for name in leaf.params} for slot in slots}
    weights = next(found)
    total = {name: next(found).clone() for name in names}
    for weight, (grads, tape) in zip(reversed(weights), reversed(recorder.tapes), strict=True):
        own, state = traced.pull(tape, params, state)
        for name, grad in own.items():
            total[name] += grad
        params = {name: torch.addcmul(leaf, grads[name], expand_to(weight, leaf)) for name, leaf in params.items()}
    return value.detach(), total, end


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
