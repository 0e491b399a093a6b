"""Objectives of the losses on the way and at the end."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.objectives.base import Objective
from lightning_metaopt.rule import Rule

__all__ = ["FinalLoss", "LogLoss", "LogMeanLoss", "MeanLoss", "SumLoss", "ValidationLoss"]


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
class LogMeanLoss(Objective):
    """:math:`\\frac1{T+1}\\sum_{t=0}^{T} \\log\\big(\\frac1B\\sum_{b} f_b(\\theta_t) + \\epsilon\\big)`: the curve that studies
    draw, on its logarithmic axis. Where problems have different scales, the largest losses lead; with :class:`LogLoss` all count
    alike.

    A mean over problems is one over those that are differentiated together: the part of one process, and of one chunk
    (``Unrolled(chunk=None)`` takes all at once). Every problem's value is that of its group.

    Args:
        eps: added before the logarithm, in units of the loss.
        groups: equal groups of problems, each with a mean of its own (:class:`PerReplica` sets it).

    Raises:
        ValueError: for a number of groups below 1, or one that does not divide the problems.

    >>> import lightning_metaopt as lmo
    >>> rule, task = lmo.rules.GradientDescent(), lmo.tasks.LeastSquares(dim=3, rows=5).draw(seed=0, size=2)
    >>> begin = lmo.episode.start(rule, task)
    >>> values = LogMeanLoss()(rule, begin, *lmo.episode.unroll(rule, begin, 3))
    >>> values.shape, bool(values[0] == values[1])
    (torch.Size([2]), True)
    """

    def __init__(self, eps: float = 1e-12, groups: int = 1) -> None:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.eps, self.groups = eps, groups

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        if end.size % self.groups:
            raise ValueError(f"{end.size} problems do not split into {self.groups} equal groups; take a multiple")
        values: Tensor = torch.cat([losses, _end_loss(end)[None]]).unflatten(1, (self.groups, -1)).mean(2)
        return values.add(self.eps).log().mean(0).repeat_interleave(end.size // self.groups)

    def grouped(self, groups: int) -> LogMeanLoss:
        return LogMeanLoss(self.eps, groups)


@final
class ValidationLoss(Objective):
    """:math:`l^{val}(\\theta_T)`, the objective of DCO's Algorithm 1 (line 6)."""

    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return end.task.val_loss(end.params, {name: leaf.clone() for name, leaf in end.buffers.items()})
