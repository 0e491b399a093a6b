"""Objectives: what of an unrolled episode should be small."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.rule import Rule

__all__ = ["FinalLoss", "LogLoss", "MeanLoss", "Objective", "SumLoss", "ValidationLoss", "resolve_objective"]


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


PRESETS: dict[str, type[Objective]] = {
    "final": FinalLoss,
    "sum": SumLoss,
    "mean": MeanLoss,
    "log": LogLoss,
    "validation": ValidationLoss,
}


def resolve_objective(objective: Objective | str) -> Objective:
    """An objective from its short name: ``"final"``, ``"sum"``, ``"mean"``, ``"log"`` or ``"validation"``.

    >>> type(resolve_objective("mean")).__name__
    'MeanLoss'
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in PRESETS:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(PRESETS)} or pass an Objective")
    return PRESETS[objective]()
