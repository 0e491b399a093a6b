"""Epochs within an episode: nonconvex problems as a sequence of strongly convex ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Tree, cat, detach, select, tree_map

__all__ = ["Epochs", "Steered"]

CENTER, SUM = "epoch/center", "epoch/sum"  # slots of Episode.history


@runtime_checkable
class Steered(Protocol):
    """A rule to which a restart is one more disturbance: its state goes on."""

    def jumped(self, state: State, params: Tree, target: Tree) -> State:
        """The state after the iterates were moved from ``params`` to ``target``."""


@final
class Epochs(MetaGradient):
    """Splits an episode into epochs of ``length`` steps, each with an objective that is regularised towards where the epoch began.

    .. math:: f_k(x) = f(x) + \\beta\\,\\|x - x_k\\|^2, \\qquad x_{k+1} = \\frac1S\\sum_{s=1}^S x_{k,s} .

    With ``beta`` above the constant of smoothness of :math:`f` each :math:`f_k` is strongly convex: Algorithm 3 is this with any
    rule, Algorithm 2 with a meta-gradient that learns while it runs (:class:`Counterfactual` for Algorithm 1 as its inner
    algorithm, :class:`ZerothOrder` for Algorithm 5). Meta-parameters go on from epoch to epoch; the rule's state starts anew.

    **Theory's settings are not the defaults**: ``beta`` of the size that it asks for holds the iterates back, averages lag behind
    them, and the paper's own experiments leave both out (appendix E.1).

    Args:
        inner: the meta-gradient of each step.
        length: :math:`S`, a multiple of ``inner.inner_steps``; more than the inner one waits for (:math:`H + L`).
        beta: :math:`\\beta`.
        restart: from where the next epoch begins: the ``"last"`` iterate, the ``"average"`` of the iterates before each step, or
            the episode's own ``"start"`` (so that epochs are the episodes of Algorithm 5).
        jump: let the rule see the restart as a disturbance (Eq. 8; ``rules.DisturbanceFeedback``) instead of starting anew.

    The estimate's loss is that of :math:`f_k`. What an epoch needs travels with the episode, in ``episode.history``.

    Raises:
        ValueError: for sizes that do not fit, and for averages of an inner meta-gradient with several steps.
        TypeError: when called with ``jump`` and a rule that knows none.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientDescent(lr=0.01)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=4))
    >>> metagrad = Epochs(lmo.Unrolled(steps=1), length=5, beta=1.0, restart="average")
    >>> for _ in range(5):
    ...     episode = metagrad(rule, episode, lmo.objectives.FinalLoss()).episode
    >>> bool((episode.params["theta"] == episode.history["epoch/center"]["theta"]).all())  # a new epoch begins
    True
    """

    def __init__(
        self,
        inner: MetaGradient,
        length: int,
        beta: float = 0.0,
        restart: Literal["last", "average", "start"] = "last",
        jump: bool = False,
    ) -> None:
        if length < 1 or length % inner.inner_steps:
            raise ValueError(f"length must be a multiple of the {inner.inner_steps} steps of the inner meta-gradient, got {length}")
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        if restart not in ("last", "average", "start"):
            raise ValueError(f"restart must be 'last', 'average' or 'start', got {restart!r}")
        if restart == "average" and inner.inner_steps > 1:
            raise ValueError("an average needs every iterate: use an inner meta-gradient of one step, or restart='last'")
        self.inner = inner
        self.length = length
        self.beta = beta
        self.restart = restart
        self.jump = jump

    @property
    def exact_of(self) -> str:
        return f"within epochs of {self.length} steps regularised with {self.beta}: {self.inner.exact_of}"

    @property
    def inner_steps(self) -> int:
        return self.inner.inner_steps

    @property
    def gradient_evaluations(self) -> int:
        return self.inner.gradient_evaluations

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        if self.jump and not isinstance(rule, Steered):
            raise TypeError(f"{type(rule).__name__} knows no jumps, as rules.DisturbanceFeedback does; pass jump=False")
        own = {slot: tree for slot, tree in episode.history.items() if slot in (CENTER, SUM)}
        center = own.get(CENTER) or detach(episode.params)
        local = episode.step % self.length
        total = tree_map(torch.add, own[SUM], episode.params) if SUM in own else episode.params
        task = _Regularized(episode.task, center, self.beta, episode.step - local)
        history = {slot: tree for slot, tree in episode.history.items() if slot not in own}
        found = self.inner(rule, replace(episode, task=task, step=local, history=history), objective)
        end = replace(found.episode, task=episode.task, step=episode.step + self.inner_steps, origin=episode.origin)
        if local + self.inner_steps == self.length:
            return replace(found, episode=self._next_epoch(rule, end, total))
        kept = {CENTER: center} | ({SUM: detach(total)} if self.restart == "average" else {})
        return replace(found, episode=replace(end, history={**end.history, **kept}))

    @torch.no_grad()
    def _next_epoch(self, rule: Rule, end: Episode, total: Tree) -> Episode:
        target = end.params
        if self.restart == "average":
            target = tree_map(lambda leaf: leaf / self.length, total)
        elif self.restart == "start":
            target = end.origin
        target = tree_map(Tensor.clone, detach(target))
        state = rule.jumped(end.state, end.params, target) if self.jump and isinstance(rule, Steered) else rule.init(target)
        return replace(end, params=target, state=state, history={CENTER: target})

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


@final
class _Regularized(Task):
    """A task with :math:`\\beta\\|x - c\\|^2` added to its training loss, whose steps are counted from ``offset`` on."""

    def __init__(self, task: Task, center: Tree, beta: float, offset: int) -> None:
        super().__init__(center)
        self.task, self.beta, self.offset = task, beta, offset

    @property
    def size(self) -> int:
        return self.task.size

    @property
    def preferred_chunk(self) -> int | None:
        return self.task.preferred_chunk

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return self.task.init(generator)

    def batch(self, step: int) -> Any:
        return self.task.batch(self.offset + step)

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        # A batch holds the problems' data only; centers follow the problems by select and join.
        loss = self.task.loss(params, buffers, batch)
        return loss + self.beta * self._distance(params, self.data).sum(0) if self.beta else loss

    def loss_alone(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        loss = self.task.loss_alone(params, buffers, batch)
        if not self.beta:
            return loss
        alone = tree_map(lambda leaf: leaf.unsqueeze(0), params)
        return loss + self.beta * self._distance(alone, self.data).sum()

    @staticmethod
    def _distance(params: Tree, center: Tree) -> Tensor:
        return torch.stack([(leaf - center[name]).square().reshape(len(leaf), -1).sum(1) for name, leaf in params.items()])

    def val_loss(self, params: Tree, buffers: Tree) -> Tensor:
        return self.task.val_loss(params, buffers)

    def to(self, device: torch.device | str) -> Task:
        return _Regularized(self.task.to(device), tree_map(lambda leaf: leaf.to(device), self.data), self.beta, self.offset)

    def select(self, part: slice) -> Task:
        return _Regularized(self.task.select(part), select(self.data, part), self.beta, self.offset)

    @classmethod
    def join(cls, tasks: Sequence[Task]) -> Task:
        parts = [task for task in tasks if isinstance(task, _Regularized)]
        joined = type(parts[0].task).join([part.task for part in parts])
        return _Regularized(joined, cat([part.data for part in parts]), parts[0].beta, parts[0].offset)
