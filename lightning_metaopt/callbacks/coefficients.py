"""The learned coefficients, and the steps of the meta-optimizer on them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_metaopt.rules.control import GradientPerturbation
from lightning_metaopt.storage import load_rule
from lightning_metaopt.tree import escape

__all__ = ["Coefficients", "MetaOptimizer", "numbers_of", "rule_of"]

MetaOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MEMORY = 0.98  # of the running mean square that spikes are compared with


@final
class Coefficients:
    """:math:`M` and its optimizer.

    Args:
        start: the first values, shape ``(H,)`` or ``(H, n)``.
        make: makes the meta-optimizer.
        clip: a meta-gradient is shortened to so many times the root of the running mean square of those before it in the episode.
            One spike, where training is at the edge of stability, would else fill Adam's second moment and stop learning for
            a thousand steps. ``None`` for no limit.
    """

    def __init__(self, start: Tensor, make: MetaOptimizer, clip: float | None) -> None:
        self.value = nn.Parameter(start.detach().clone())
        self.optimizer = make([self.value])
        self.clip = clip
        self.steps = self.skipped = self.clipped = 0
        self._square, self._seen = 0.0, 0  # running mean of squared norms, and how many
        self._warned = False

    def begin(self) -> None:
        """A new episode: its first meta-gradients are larger than the last ones before."""
        self._square, self._seen = 0.0, 0

    @torch.enable_grad()
    def step(self, grad: Tensor) -> None:
        """One step of the meta-optimizer, unless the meta-gradient is not finite."""
        size = float(torch.linalg.vector_norm(grad.double()))
        if not math.isfinite(size):
            self.skip()
            return
        if self.clip is not None:
            usual = math.sqrt(self._square / (1 - MEMORY**self._seen)) if self._seen else size
            if size > self.clip * usual > 0:
                grad, size = grad * (self.clip * usual / size), self.clip * usual
                self.clipped += 1
            self._seen += 1
            self._square = MEMORY * self._square + (1 - MEMORY) * size**2
        self.value.grad = grad.to(self.value.dtype)
        self.optimizer.step()
        self.value.grad = None
        self.steps += 1

    def skip(self) -> None:
        """Count a step without meta-step."""
        self.skipped += 1
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a gradient or a meta-gradient is not finite, so the coefficients were not changed in this step. Clip the "
                "gradients, or lower lr or meta_lr. Further such steps are only counted, in `skipped`.",
                UserWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain containers."""
        counts = {"steps": self.steps, "skipped": self.skipped, "clipped": self.clipped}
        usual = [self._square, self._seen]
        return {"value": self.value.detach().clone(), "optimizer": self.optimizer.state_dict(), "usual": usual, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        with torch.no_grad():
            self.value.copy_(state_dict["value"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.steps, self.skipped, self.clipped = (state_dict[key] for key in ("steps", "skipped", "clipped"))
        self._square, self._seen = state_dict["usual"]


def rule_of(given: Any) -> GradientPerturbation | None:
    """The rule that was given, or that is in a file; ``None`` for plain numbers."""
    found = load_rule(given) if isinstance(given, (str, os.PathLike)) else given
    return found if isinstance(found, GradientPerturbation) else None


def numbers_of(given: Any) -> Tensor | None:
    """Coefficients from a rule, its file, or numbers, of shape ``(H,)`` or ``(H, n)``."""
    if given is None:
        return None
    rule = rule_of(given)
    if rule is None:
        return torch.as_tensor(given).detach().clone()
    if isinstance(rule.coefficients, nn.ParameterDict):
        values = [rule.coefficients[escape(name)] for name in rule.shapes or {}]
        return torch.cat([value.detach().reshape(rule.history, -1) for value in values], 1)
    return rule.coefficients.detach().clone()
