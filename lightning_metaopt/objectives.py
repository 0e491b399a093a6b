"""Objectives: what of an unrolled episode should be small."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree, detach

__all__ = [
    "FinalLoss",
    "Imitation",
    "LogLoss",
    "MeanLoss",
    "Mirror",
    "MirrorBound",
    "Objective",
    "PerReplica",
    "SumLoss",
    "ValidationLoss",
    "displacement",
    "mirror_of",
    "resolve_objective",
]


@runtime_checkable
class Mirror(Protocol):
    """What a rule offers whose steps are those of mirror descent with :math:`\\phi_M(\\theta) = \\frac12\\theta^\\top M\\theta`:
    the quantities of MetaMD's bounds, in closed form and differentiable with respect to its meta-parameters.
    """

    def divergence(self, difference: Tree) -> Tensor:
        """:math:`B_M = \\frac12\\Delta^\\top M\\Delta` of differences with leaves ``(B, *shape)``; shape ``(B,)``."""

    def distance_from_identity(self) -> Tensor:
        """:math:`\\|M - I\\|_F`, shape ``()``."""

    def smallest_eigenvalue(self) -> Tensor:
        """:math:`\\lambda`, over all blocks of :math:`M`; shape ``()``."""

    def trace(self) -> Tensor:
        """:math:`\\operatorname{tr} M`, shape ``()``."""


def mirror_of(rule: Rule, who: str) -> Mirror:
    """``rule`` as a mirror; ``TypeError`` in the name of ``who`` if it has no divergence."""
    if not isinstance(rule, Mirror):
        raise TypeError(
            f"{who} needs a rule with a Bregman divergence, such as KroneckerMirror or DiagonalMirror; {type(rule).__name__} has "
            "none"
        )
    return rule


def displacement(episode: Episode) -> Tree:
    """How far the iterates have come since the episode began, :math:`\\theta_t - \\theta_0`."""
    if not episode.origin:
        raise ValueError("the episode does not know where it began; start it with lightning_metaopt.episode.start")
    return {name: leaf - episode.origin[name] for name, leaf in episode.params.items()}


class Objective(ABC):
    """A number for each problem, computed from an unrolled window."""

    @abstractmethod
    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        """Value of the objective, shape ``(B,)``.

        Args:
            rule: the rule that made the steps (some objectives use its geometry).
            start: the episode before the window.
            end: the episode after it.
            losses: training losses ``(T, B)`` before each of the ``T`` steps.
        """


def _end_loss(end: Episode) -> Tensor:
    buffers = {name: leaf.clone() for name, leaf in end.buffers.items()}
    return end.task.loss(end.params, buffers, end.task.batch(end.step))


@final
class FinalLoss(Objective):
    """:math:`f(\\theta_T)`, on the batch that the next step would use."""

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return _end_loss(end)


@final
class SumLoss(Objective):
    """:math:`\\sum_{t=0}^{T} f(\\theta_t)` (the plain sum over an unroll, as in M-L2O)."""

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return losses.sum(0) + _end_loss(end)


@final
class MeanLoss(Objective):
    """:math:`\\frac1{T+1}\\sum_{t=0}^{T} f(\\theta_t)`: the area under the loss curve."""

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return (losses.sum(0) + _end_loss(end)) / (len(losses) + 1)


@final
class LogLoss(Objective):
    """:math:`\\frac1{T+1}\\sum_{t=0}^{T} \\log(f(\\theta_t) + \\epsilon)`: weighs problems and phases of different scale
    alike. Needs non-negative losses.

    Args:
        eps: added before the logarithm, in units of the loss.
    """

    def __init__(self, eps: float = 1e-12) -> None:
        self.eps = eps

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return torch.cat([losses, _end_loss(end)[None]]).add(self.eps).log().mean(0)


@final
class ValidationLoss(Objective):
    """:math:`l^{val}(\\theta_T)`, the objective of DCO's Algorithm 1 (line 6)."""

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return end.task.val_loss(end.params, {name: leaf.clone() for name, leaf in end.buffers.items()})


@final
class MirrorBound(Objective):
    """What a rule of mirror descent promises about its own speed (MetaMD, Eq. 8), without validation data and without losses.

    .. math:: B_{\\phi_M}(\\theta_T, \\theta_0) + \\frac{k}{\\lambda} + \\gamma\\,\\|M - I\\|_F ,

    with :math:`\\theta_0` where the episode began, :math:`B = \\frac12(\\theta_T - \\theta_0)^\\top M(\\theta_T - \\theta_0)` and
    :math:`\\lambda` the smallest eigenvalue of :math:`M`. It bounds the excess loss after T steps up to factors without
    :math:`M` (Eq. 7, where the factor should be 4 instead of 2: :math:`\\eta = \\lambda/2L` in Theorem 3.1 gives
    :math:`4BL/\\lambda T`). The bound is for :math:`\\theta_*` in the place of :math:`\\theta_T`, thus for inner loops that run to
    convergence: after few steps "do not move at all" has the smallest divergence. What else to know:

    - Under the paper's Kronecker factors :math:`aa^\\top + I` the smallest eigenvalue is 1, so that :math:`k/\\lambda` has
      no gradient.
    - The three terms are all smallest at :math:`M = I`, up to a scale. Only what an unrolled :math:`\\theta_T` adds to the gradient
      leads away from it: :class:`~lightning_metaopt.Unrolled` and :class:`~lightning_metaopt.ForwardMode` have it,
      :class:`~lightning_metaopt.Implicit` has the paper's heuristic.

    Args:
        k: weight of :math:`1/\\lambda`, at least 0.
        gamma: weight of the distance from the identity, at least 0.
        squared: take :math:`\\|M - I\\|_F^2` instead, which is smooth at :math:`M = I`.

    Raises:
        ValueError: for a negative weight.
        TypeError: when it is called with a rule that has no divergence.
    """

    def __init__(self, k: float = 0.0, gamma: float = 0.0, squared: bool = False) -> None:
        if k < 0 or gamma < 0:
            raise ValueError(f"k and gamma must be at least 0, got k={k} and gamma={gamma}")
        self.k, self.gamma, self.squared = k, gamma, squared

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        mirror = mirror_of(rule, "MirrorBound")
        value = mirror.divergence(displacement(end))
        if self.k:
            value = value + self.k / mirror.smallest_eigenvalue()
        if self.gamma:
            distance = mirror.distance_from_identity()
            value = value + self.gamma * (distance.square() if self.squared else distance)
        return value


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
    >>> torch.equal(*(lmo.Unrolled(5)(rule, begin, one).loss for one in (objective, FinalLoss())))
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
        self.objective, self.replicas = resolve_objective(objective), replicas

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return self.replicas * self.objective(rule, start, end, losses)


PRESETS: dict[str, type[Objective]] = {
    "final": FinalLoss,
    "sum": SumLoss,
    "mean": MeanLoss,
    "log": LogLoss,
    "validation": ValidationLoss,
    "bound": MirrorBound,
}


def resolve_objective(objective: Objective | str) -> Objective:
    """An objective from its short name: ``"final"``, ``"sum"``, ``"mean"``, ``"log"``, ``"validation"`` or
    ``"bound"``.

    >>> type(resolve_objective("mean")).__name__
    'MeanLoss'
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in PRESETS:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(PRESETS)} or pass an Objective")
    return PRESETS[objective]()
