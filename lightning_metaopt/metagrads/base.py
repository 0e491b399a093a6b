"""What every way of differentiating an unrolled episode has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["Estimate", "MetaGradient", "surrogate_loss"]


@dataclass(frozen=True)
class Estimate:
    """What a meta-gradient returns.

    Attributes:
        loss: the meta-objective, the mean over the ``B`` problems; shape ``()``.
        grads: estimate of its gradient with respect to every meta-parameter, by name.
        episode: the episode after the unroll, detached: where the next estimate may continue.
        info: figures for the log; never needed to go on.
    """

    loss: Tensor
    grads: Tree
    episode: Episode
    info: dict[str, float] = field(default_factory=dict)


class MetaGradient(ABC):
    """*How* to differentiate the meta-objective, as a value: called with a rule, an episode and an objective, it returns
    an :class:`Estimate`. Differentiates with ``torch.autograd.grad`` only, so nobody's ``.grad`` is touched.
    """

    @property
    @abstractmethod
    def exact_of(self) -> str:
        """In words: of what this is the exact gradient (or its unbiased estimate)."""

    @property
    @abstractmethod
    def inner_steps(self) -> int:
        """Inner steps that one estimate advances the episode by."""

    @property
    @abstractmethod
    def gradient_evaluations(self) -> int:
        """Cost of one estimate for one problem, in evaluations of an inner gradient (a product with an inner Hessian
        counts as two).
        """

    @abstractmethod
    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        """Unroll from ``episode`` and estimate the gradient of ``objective`` with respect to the rule's parameters."""

    def state_dict(self) -> dict[str, Any]:
        """What the estimator itself carries from one call to the next, in plain containers; by default nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} carries nothing between calls, but the saved state holds {sorted(state)}")


def surrogate_loss(rule: Rule, estimate: Estimate) -> Tensor:
    """A scalar with the value of the meta-loss whose gradient with respect to phi is the estimate.

    Returned from ``training_step``, it leaves backward, clipping, accumulation, averaging over ranks and precision to
    Lightning. It touches every meta-parameter, so that DDP, which waits for all of them, never hangs.

    >>> import lightning_metaopt as lmo
    >>> rule = lmo.rules.GradientDescent()
    >>> loss = surrogate_loss(rule, Estimate(torch.tensor(7.0), {"log_lr": torch.tensor(3.0)}, episode=None))
    >>> loss.backward(); float(loss.detach()), float(rule.log_lr.grad)
    (7.0, 3.0)
    """
    linear = torch.stack([(value * estimate.grads[name].detach()).sum() for name, value in rule.named_parameters()]).sum()
    return estimate.loss.detach() + (linear - linear.detach())
