"""Objectives around other objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.objectives.base import Objective
from lightning_metaopt.objectives.presets import resolve_objective
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree, detach

__all__ = ["Imitation", "PerReplica"]


@final
class Imitation(Objective):
    """Another objective, plus the squared distance from what an ordinary optimizer would do (Chen et al.: *Training Stronger
    Baselines for Learning to Optimize*, NeurIPS 2020).

    .. math:: L + w\\sum_{t<T}\\|u_t - \\bar u_t\\|^2 ,

    where the teacher makes the steps :math:`\\bar u_t` from where the window begins, and :math:`u_t` is what the rule would do with
    the same gradients: every iterate of the teacher's is compared with the one that the rule would have put in its place. The
    rule begins with the state that it has; the teacher, whose state is not carried from window to window, with a fresh one.
    This costs one more unroll, with inner gradients as constants. For meta-gradients in reverse mode or without derivatives.

    Args:
        teacher: a rule, such as ``rules.Adam(0.01)``; it is not trained.
        weight: :math:`w`, positive, in units of the objective over the square of the parameters'.
        objective: :math:`L`, an object or its short name.

    Raises:
        ValueError: for a weight that is not positive.

    >>> import lightning_metaopt as lmo
    >>> rule, task = lmo.rules.GradientDescent(0.1), lmo.tasks.LeastSquares(dim=3, rows=5).draw(seed=0, size=4)
    >>> objective = Imitation(lmo.rules.GradientDescent(0.1), objective="final")  # the rule is its own teacher
    >>> begin = lmo.episode.start(rule, task)
    >>> torch.equal(*(lmo.Unrolled(5)(rule, begin, one).loss for one in (objective, lmo.objectives.FinalLoss())))
    True
    """

    def __init__(self, teacher: Rule, weight: float = 1.0, objective: Objective | str = "sum") -> None:
        if not weight > 0:
            raise ValueError(f"weight must be positive, got {weight}; without imitation use the objective itself")
        self.teacher, self.weight, self.objective = teacher, weight, resolve_objective(objective)

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        begin = start.detach()
        beside = _Beside(rule, self.teacher, begin.state)
        begin = replace(begin, state=beside.init(begin.params))
        after = unroll(beside, begin, len(losses), order="first" if torch.is_grad_enabled() else "none")[0]
        return self.objective(rule, start, end, losses) + self.weight * torch.stack(list(after.state["apart"].values())).sum(0)

    def grouped(self, groups: int) -> Imitation:
        return Imitation(self.teacher, self.weight, self.objective.grouped(groups))


@final
class _Beside(Rule):
    # The teacher's steps; in its state, how far off the student's would have been.

    def __init__(self, student: Rule, teacher: Rule, state: State) -> None:
        super().__init__()
        self.student, self.teacher, self._begin = student, teacher, state

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def init(self, params: Tree) -> State:
        state = {f"student/{slot}": tree for slot, tree in self._begin.items()}
        state |= {f"teacher/{slot}": detach(tree) for slot, tree in self.teacher.init(params).items()}
        return state | {"apart": {name: leaf.new_zeros(len(leaf)) for name, leaf in params.items()}}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        new: State = {}
        found = {}
        for who, part in (("student", self.student), ("teacher", self.teacher)):
            own = {slot.removeprefix(f"{who}/"): tree for slot, tree in state.items() if slot.startswith(f"{who}/")}
            found[who], after = part(grads, own, params, loss)
            new |= {f"{who}/{slot}": tree for slot, tree in after.items()}
        steps = detach(found["teacher"])
        apart = {name: (found["student"][name] - step).square().reshape(len(step), -1).sum(1) for name, step in steps.items()}
        new["apart"] = {name: state["apart"][name] + distance for name, distance in apart.items()}
        return steps, new


@final
class PerReplica(Objective):
    """Another objective, so weighed that its mean over all problems is the sum over replicas of each replica's own mean.

    With it, each replica of a :class:`~lightning_metaopt.rules.Stacked` gets the meta-gradient that it would get alone.

    Args:
        objective: an object or its short name.
        replicas: how many, :math:`R`: the value is :math:`R\\,L`.

    >>> PerReplica("sum", 3).replicas
    3
    """

    def __init__(self, objective: Objective | str, replicas: int) -> None:
        self.objective, self.replicas = resolve_objective(objective).grouped(replicas), replicas

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return self.replicas * self.objective(rule, start, end, losses)
