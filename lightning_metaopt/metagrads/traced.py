"""The gradient of a window for rules that know the derivative of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, full_precision, unroll
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, Trace
from lightning_metaopt.tree import Tree, tree_map

__all__ = ["traced_window"]


@final
class _Recorder(Rule):
    # Steps of a trace as those of a rule. The state is the trace's own.

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.steps = trace
        self.gradients: list[Tree] = []

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        self.gradients.append(grads)
        return self.steps.step(grads, params), state


def traced_window(
    rule: Rule, trace: Trace, episode: Episode, objective: Objective, steps: int, second: bool
) -> tuple[Tensor, Tree, Episode]:
    """Value, gradient, and the episode after ``steps`` steps.

    With constant gradients :math:`g_t` the iterates are :math:`\\theta_{t+1} = \\theta_t + u_t`, and the derivative of the
    objective with respect to :math:`u_t` is its derivative with respect to :math:`\\theta_T` plus the sum of
    :math:`\\partial L/\\partial f_s\\, g_s` over the later steps :math:`s`: all of it is known when the window ends. In second order
    each :math:`g_t` keeps a graph of its own, back to :math:`\\theta_t` and no further; a product with its Hessian is what
    comes to the derivative on the way back.

    Args:
        rule: whose ``trace`` it is.
        trace: made for the episode's state.
        episode: where to start.
        objective: what to differentiate.
        steps: the window's length.
        second: differentiate gradients too.
    """
    recorder = _Recorder(trace)
    end, losses = unroll(recorder, episode, steps, order="local" if second else "none")
    end = replace(end, state=trace.state)
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
    total = {name: next(found) for name in names}
    with torch.no_grad(), full_precision(params):
        trace.turn(state)
        direct = {name: _weighted([grads[name] for grads in recorder.gradients], weights) for name in params}
        if second:
            for index in reversed(range(steps)):
                through = trace.back(tree_map(lambda leaf: leaf.unsqueeze(0), params))
                params = {name: leaf + direct[name][index] for name, leaf in params.items()}
                for name, part in through.items():
                    params[name].add_(part)
        else:
            trace.back({name: _later(direct[name], leaf) for name, leaf in params.items()})
        own = trace.grads()
    return value.detach(), {name: grad + own[name] if name in own else grad for name, grad in total.items()}, end


def _weighted(gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(gradients))
    return stacked.mul_(weights.view(*weights.shape, *(1,) * (stacked.dim() - 2)))


def _later(direct: Tensor, last: Tensor) -> Tensor:
    # last, plus the sum of what comes after each step
    return torch.cat([last.unsqueeze(0), direct[1:].flip(0)]).cumsum(0).flip(0)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
