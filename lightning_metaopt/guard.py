"""What to do when meta-training diverges: back to the best rule, with half the meta learning rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["Best", "halve_learning_rates", "too_large"]

GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last two are OneCycleLR's
SCHEDULER_RATES = ("base_lrs", "max_lrs")
PATIENCE = 20  # restores without a finite meta-gradient in between


class Best:
    """The best meta-parameters so far, their validation loss and how often they had to be restored.

    Attributes:
        value: validation loss, infinite as long as none is known.
        phi: copies of the meta-parameters.
        step: meta-steps taken when they were found.
        restores: how often :meth:`restore_` was called.
    """

    def __init__(self) -> None:
        self.value = math.inf
        self.phi: Tree = {}
        self.step = 0
        self.restores = 0
        self._in_vain = 0

    def offer(self, rule: Rule, value: float, step: int) -> None:
        """Keep a copy of the meta-parameters if there is none yet or ``value`` is no larger than the best."""
        if not self.phi or value <= self.value:
            self.phi = {name: parameter.detach().clone() for name, parameter in rule.named_parameters()}
            self.value = value if math.isfinite(value) else math.inf
            self.step = step

    def load_into_(self, rule: Rule) -> None:
        """Overwrite the meta-parameters of ``rule`` with the best."""
        with torch.no_grad():
            for name, parameter in rule.named_parameters():
                if name in self.phi:
                    parameter.copy_(self.phi[name])

    def restore_(self, rule: Rule, optimizers: Iterable[Optimizer], schedulers: Iterable[Any], reason: str) -> None:
        """After a divergence: the best meta-parameters, half the learning rate, no moments.

        Raises:
            FloatingPointError: if the meta-gradient was not finite :data:`PATIENCE` times in a row, so that the best
                rule known diverges itself.
        """
        self.restores += 1
        self._in_vain += 1
        if self._in_vain > PATIENCE:
            raise FloatingPointError(
                f"{reason}, {PATIENCE} times in a row although the best rule known (meta-step {self.step}) was restored each "
                "time: the inner problems diverge under it. Start from smaller inner steps, unroll fewer steps, or use "
                "objective='log'"
            )
        if self.restores == 1:
            warnings.warn(
                f"{reason}: restored the rule of meta-step {self.step} and halved the meta learning rate. "
                "Further restores are counted in the log as guard/restores",
                stacklevel=2,
            )
        self.load_into_(rule)
        for optimizer in optimizers:
            halve_learning_rates(optimizer)
            optimizer.state.clear()
        for scheduler in schedulers:
            _halve_base_rates(scheduler)

    def progressed(self) -> None:
        """A finite meta-gradient was seen."""
        self._in_vain = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "value": self.value,
            "phi": dict(self.phi),
            "step": self.step,
            "restores": self.restores,
            "in_vain": self._in_vain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.value, self.phi, self.step = state["value"], dict(state["phi"]), state["step"]
        self.restores, self._in_vain = state["restores"], state["in_vain"]


def too_large(value: float, best: float, factor: float) -> bool:
    """Whether ``value`` is not finite or exceeds ``factor`` times ``best`` (for negative losses: lies as much above it).

    >>> too_large(101.0, best=1.0, factor=100.0), too_large(50.0, best=1.0, factor=100.0), too_large(float("nan"), 1.0, 2.0)
    (True, False, True)
    """
    return not math.isfinite(value) or (math.isfinite(best) and value > best + (factor - 1) * abs(best))


def halve_learning_rates(optimizer: Optimizer) -> None:
    """Halve the learning rate of every parameter group, and what schedulers have noted there."""
    for group in optimizer.param_groups:
        for key in GROUP_RATES:
            if isinstance(group.get(key), (float, int, Tensor)):
                group[key] = group[key] * 0.5


def _halve_base_rates(scheduler: Any) -> None:
    for key in SCHEDULER_RATES:
        rates = getattr(scheduler, key, None)
        if isinstance(rates, list):
            setattr(scheduler, key, [rate * 0.5 for rate in rates])
    # A schedule made of others (SequentialLR, ChainedScheduler) keeps them under this name only.
    for part in getattr(scheduler, "_schedulers", ()):
        _halve_base_rates(part)
