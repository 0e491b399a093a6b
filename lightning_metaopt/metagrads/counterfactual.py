"""Counterfactual rollouts: what today's meta-parameters would have done with the last few steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Tree

__all__ = ["Counterfactual", "Rewindable"]


@runtime_checkable
class Rewindable(Protocol):
    """A rule that remembers what it was given in the last ``history`` steps, and can be set back."""

    history: int

    def oldest(self, state: State) -> Tree:
        """What the next step will forget."""

    def rewind(self, state: State, steps: int, forgotten: Sequence[Tree]) -> State:
        """The state ``steps`` ago, in which what was remembered since then is a constant."""


@final
class Counterfactual(MetaGradient):
    """Takes one step, and differentiates what **today's** meta-parameters would have done since ``rollout`` steps ago (Algorithm 4;
    with ``objective="final"``, the meta-gradient of Algorithms 1 and 7).

    .. math:: \\hat x_{t-L} = x_{t-L}, \\qquad
              \\hat x_{s+1} = (1-\\delta)\\,\\hat x_s - \\eta\\,\\nabla f_s(\\hat x_s) - \\sum_{h=1}^H M^h g_{s+1-h}, \\qquad
              \\nabla_M f_t(\\hat x_t) .

    The gradients :math:`g` in the sum were met on the way and are constants; those of the middle term are computed at
    :math:`\\hat x`, and differentiated. Before :math:`H + L - 1` steps of an episode there is nothing to go back to, and the
    meta-gradient is 0. (There the paper makes no meta-step; with plain SGD as meta-optimizer that is the same.) The episode keeps
    the last :math:`L` iterates and :math:`L - 1` gradients that the rule has forgotten.

    ``loss`` of the estimate is the objective of the step that was taken; ``info`` has that of the rollout.

    Args:
        rollout: :math:`L`.
        first_order: hold the gradients of the middle term constant, too: no second derivatives.
        common_batch: use the data of the present step in the whole rollout, rather than those of each step. Where batches are
            small, this takes away the noise that drives :math:`M` down from episode to episode.

    Raises:
        ValueError: for ``rollout`` below 1.
        TypeError: when called with a rule that cannot be set back.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientPerturbation(history=2, lr=0.01)
    >>> episode, metagrad = lmo.episode.start(rule, family.draw(seed=0, size=4)), Counterfactual(rollout=2)
    >>> for _ in range(3):
    ...     estimate = metagrad(rule, episode, lmo.objectives.FinalLoss())
    ...     episode = estimate.episode
    >>> (estimate.grads["coefficients"] < 0).tolist(), episode.step  # more of both gradients would have been better
    ([True, True], 3)

    Reference: Nonconvex Meta-optimization for Deep Learning (Chen, Dogariu, Lu, Hazan), Algorithms 1, 4 and 7.
    """

    def __init__(self, rollout: int = 2, first_order: bool = False, common_batch: bool = False) -> None:
        if rollout < 1:
            raise ValueError(f"rollout must be at least 1, got {rollout}")
        self.rollout = rollout
        self.first_order = first_order
        self.common_batch = common_batch

    @property
    def exact_of(self) -> str:
        what = f"the objective of a rollout of {self.rollout} steps that ends now, with recorded disturbances"
        return what + (" and inner gradients held constant" if self.first_order else "")

    @property
    def inner_steps(self) -> int:
        return 1

    @property
    def gradient_evaluations(self) -> int:
        return 3 + self.rollout * (1 if self.first_order else 3)

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        if not isinstance(rule, Rewindable):
            raise TypeError(f"{type(rule).__name__} cannot be set back by some steps, as rules.GradientPerturbation can")
        end, losses = unroll(rule, episode, 1)
        end = replace(end.detach(), history=self._remembered(rule, episode))
        with torch.no_grad():
            loss = objective(rule, episode, end, losses).mean()
        if end.step < rule.history + self.rollout - 1:
            return Estimate(loss, {name: torch.zeros_like(value) for name, value in rule.named_parameters()}, end)
        start = self._past(rule, end)
        rolled, on_the_way = unroll(rule, start, self.rollout, order="first" if self.first_order else "second")
        with torch.enable_grad():
            value = objective(rule, start, rolled, on_the_way).mean()
        return Estimate(loss, _gradient(value, rule), end, {"counterfactual": float(value.detach())})

    def _remembered(self, rule: Rewindable, episode: Episode) -> State:
        # Slots "params 1" (one step ago) to "params L"; likewise buffers, and the gradients that the rule has forgotten.
        now = {"params": episode.params, "buffers": episode.buffers}
        if self.rollout > 1:
            now["forgotten"] = rule.oldest(episode.state)
        found: State = {}
        for kind, tree in now.items():
            found[f"{kind} 1"] = tree
            for ago in range(1, self.rollout - (kind == "forgotten")):
                if f"{kind} {ago}" in episode.history:
                    found[f"{kind} {ago + 1}"] = episode.history[f"{kind} {ago}"]
        return found

    def _past(self, rule: Rewindable, end: Episode) -> Episode:
        forgotten = [end.history[f"forgotten {ago}"] for ago in reversed(range(1, self.rollout))]
        begin, now = end.step - self.rollout, end.step
        return replace(
            end,
            task=_at(end.task, now) if self.common_batch else end.task,
            params=end.history[f"params {self.rollout}"],
            buffers=end.history[f"buffers {self.rollout}"],
            state=rule.rewind(end.state, self.rollout, forgotten),
            step=begin,
            history={},
        )


def _at(task: Task, now: int) -> Task:
    # The task with the data of one step in every step.
    other, batch = copy.copy(task), task.batch
    vars(other)["batch"] = lambda step: batch(now)
    return other


def _gradient(value: Tensor, rule: Rule) -> Tree:
    names, parameters = zip(*rule.named_parameters(), strict=True)
    if not value.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in rule.named_parameters()}
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return {name: grad.detach() for name, grad in zip(names, found, strict=True)}
