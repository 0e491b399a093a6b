"""Step sizes that follow their meta-gradients: what the online callbacks do to an optimizer's updates.

In all formulas :math:`x` are the parameters, :math:`P_t` is the base optimizer's direction (the gradient for SGD), so that its
update is :math:`-\\mathrm{lr}_t P_t`, and :math:`w` are factors on that update. The gradient at step :math:`t` says of the step
before that :math:`-\\partial f(x_t) / \\partial \\log w_{t-1} \\propto g_t P_{t-1}`: if positive, it was too short.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

__all__ = ["Additive", "Hint", "Logarithmic", "Multiplicative", "StepSizeUpdate"]

Slots = dict[str, Tensor]

_ROOT_OF_LARGEST = {dtype: 0.1 * math.sqrt(torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


@final
@dataclass(frozen=True)
class Hint:
    """A guess of the next meta-gradient, used before it is known (optimism).

    Args:
        of: ``"current"`` for :math:`h_t = \\kappa\\, g_t P_t` (section 7.2 of the paper, with :math:`P_t = g_t`), ``"previous"``
            for :math:`h_t = \\kappa\\, g_t P_{t-1}`, the meta-gradient that is known already (Corollary 1).
        scale: :math:`\\kappa`.
        corrected: take the last hint off again, as in AO-FTRL: :math:`D_t = g_t P_{t-1} + h_t - h_{t-1}`, else
            :math:`D_t = g_t P_{t-1} + h_t`. ``None`` to do so for base optimizers with momentum only. Without correction a hint
            lets factors grow with the noise of the gradient; that offsets the short sight of :math:`g_t g_{t-1}`, but not of
            :math:`g_t P_{t-1}` where :math:`P` looks further back: there factors would grow until training breaks down.
        fade: :math:`\\kappa` falls like ``scale / (1 + t / fade)**2`` with the number :math:`t` of meta-steps; ``None`` if not.
    """

    of: Literal["current", "previous"] = "current"
    scale: float = 1.0
    corrected: bool | None = True
    fade: float | None = None

    def __post_init__(self) -> None:
        if self.of not in ("current", "previous"):
            raise ValueError(f"of must be 'current' or 'previous', got {self.of!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        _check_fade(self.fade)

    def corrects(self, momentum: bool) -> bool:
        """Whether the last hint is taken off again, for a base optimizer with or without momentum."""
        return momentum if self.corrected is None else self.corrected

    def strength(self, count: int) -> float:
        """The scale in the ``count``-th meta-step, from 1."""
        return _faded(self.scale, self.fade, count)

    def add_(self, meta: Tensor, current: tuple[Tensor, Tensor] | None, last: Tensor | None, strength: float | Tensor) -> Tensor:
        """``meta`` (:math:`g_t P_{t-1}`, changed in place) with the hint.

        Args:
            meta: the meta-gradient with its sign turned.
            current: two tensors whose product is :math:`g_t P_t`, for ``of="current"``.
            last: where the last hint is kept, zero at first, and the new one afterwards; ``None`` without correction.
            strength: see :meth:`strength`; in compiled code a tensor without dimensions.
        """
        source, factor = (meta, None) if current is None else current
        if last is None and factor is not None and not isinstance(strength, Tensor):
            return meta.addcmul_(source, factor, value=strength)
        hint = source * strength if factor is None else (source * factor).mul_(strength)
        if last is None:
            return meta.add_(hint)
        meta.add_(hint).sub_(last)
        last.copy_(hint)
        return meta


class StepSizeUpdate(ABC):
    """How factors follow the sum :math:`D_t` of meta-gradient (its sign turned) and hint; a subclass is final."""

    rate: float
    relative: bool = False
    """True if :meth:`advance_` wants the cosine of gradient and last direction, not their product; for one factor in all."""

    @abstractmethod
    def start(self, like: Tensor) -> Slots:
        """State in which every factor is 1."""

    @abstractmethod
    def weight(self, lr: float, first: float) -> float:
        """What :math:`D` of a tensor is multiplied by.

        Args:
            lr: base learning rate of the tensor.
            first: that of the first tensor that has the same factor.
        """

    def scales(self, count: int) -> tuple[float, ...]:
        """Numbers that the ``count``-th meta-step needs; by default none."""
        return ()

    @abstractmethod
    def advance_(self, slots: Slots, increase: Tensor, scales: Sequence[float | Tensor]) -> None:
        """One meta-step, in place.

        Args:
            slots: state of the factors.
            increase: :math:`D_t`; it may be changed.
            scales: what :meth:`scales` gave, as numbers or, in compiled code, as tensors without dimensions.
        """

    def shift(self, factor: float) -> float:
        """What :meth:`shorten_` wants for a factor; by default the factor."""
        return factor

    @abstractmethod
    def shorten_(self, slots: Slots, shift: float | Tensor) -> None:
        """Multiply the factors, in place, after a step that was too long; see :meth:`shift`."""

    @abstractmethod
    def factor(self, slots: Slots) -> Tensor:
        """The factors :math:`w`."""


@final
class Additive(StepSizeUpdate):
    """The paper's rule for absolute step sizes :math:`\\mathrm{lr}\\, w`.

    .. math:: \\mathrm{lr}\\, w \\leftarrow \\max(\\mathrm{lr}\\, w + \\beta D_t,\\ 0) .

    Args:
        rate: :math:`\\beta`.
        nonnegative: whether to clamp at 0.

    >>> rule, one = Additive(rate=0.1), torch.ones(2)
    >>> slots = rule.start(one)
    >>> rule.advance_(slots, torch.tensor([2.0, -30.0]) * rule.weight(lr=0.5, first=0.5), rule.scales(1))
    >>> rule.factor(slots)
    tensor([1.4000, 0.0000])
    """

    def __init__(self, rate: float, nonnegative: bool = True) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"the rate of the step sizes must be at least 0, got {rate}")
        self.rate, self.nonnegative = rate, nonnegative

    def start(self, like: Tensor) -> Slots:
        """See :class:`StepSizeUpdate`."""
        return {"factor": torch.ones_like(like)}

    def weight(self, lr: float, first: float) -> float:
        """See :class:`StepSizeUpdate`."""
        return lr / first**2  # the gradient to a common factor, in units of the first learning rate

    def advance_(self, slots: Slots, increase: Tensor, scales: Sequence[float | Tensor]) -> None:
        """See :class:`StepSizeUpdate`."""
        slots["factor"].add_(increase, alpha=self.rate)
        if self.nonnegative:
            slots["factor"].clamp_(min=0)

    def shorten_(self, slots: Slots, shift: float | Tensor) -> None:
        """See :class:`StepSizeUpdate`."""
        slots["factor"].mul_(shift)

    def factor(self, slots: Slots) -> Tensor:
        """See :class:`StepSizeUpdate`."""
        return slots["factor"]


@final
class Multiplicative(StepSizeUpdate):
    """Hypergradient descent in its multiplicative form, :math:`w \\leftarrow w\\,(1 + \\beta\\cos_t)`, with the cosine between
    gradient and last direction over all parameters (Baydin et al. 2018, Eq. 8). Neither units nor lengths matter.

    Args:
        rate: :math:`\\beta`, below 1, so that factors stay positive.

    >>> rule = Multiplicative(rate=0.1)
    >>> slots = rule.start(torch.ones(()))
    >>> rule.advance_(slots, torch.tensor(0.5), rule.scales(1))
    >>> rule.factor(slots)
    tensor(1.0500)
    """

    relative = True

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of the multiplicative form must be at least 0 and below 1, got {rate}")
        self.rate = rate

    def start(self, like: Tensor) -> Slots:
        """See :class:`StepSizeUpdate`."""
        return {"factor": torch.ones_like(like)}

    def weight(self, lr: float, first: float) -> float:
        """See :class:`StepSizeUpdate`."""
        return lr / first

    def advance_(self, slots: Slots, increase: Tensor, scales: Sequence[float | Tensor]) -> None:
        """See :class:`StepSizeUpdate`."""
        slots["factor"].mul_(1 + self.rate * increase)

    def shorten_(self, slots: Slots, shift: float | Tensor) -> None:
        """See :class:`StepSizeUpdate`."""
        slots["factor"].mul_(shift)

    def factor(self, slots: Slots) -> Tensor:
        """See :class:`StepSizeUpdate`."""
        return slots["factor"]


@final
class Logarithmic(StepSizeUpdate):
    """Logarithms :math:`v = \\log w` of the factors, moved by Adam, so that the scale of the gradients does not matter.

    .. math:: m \\leftarrow \\beta_1 m + (1 - \\beta_1) D_t, \\quad s \\leftarrow \\beta_2 s + (1 - \\beta_2) D_t^2, \\quad
              v \\leftarrow v + \\beta_t\\, \\hat m / (\\sqrt{\\hat s} + 10^{-20}), \\quad \\beta_t = \\beta / (1 + t / t_0)^2

    Args:
        rate: :math:`\\beta`, the usual change of a logarithm in the first steps.
        betas: :math:`\\beta_1, \\beta_2`.
        limit: factors stay between ``1 / limit`` and ``limit``.
        fade: :math:`t_0`, the number of meta-steps after which the rate is a quarter; ``None`` for a constant rate. A logarithm
            moves by at most about :math:`\\beta t_0` in all: with a rate like :math:`1 / t` it would never come to rest.

    >>> rule = Logarithmic(rate=0.1)
    >>> slots = rule.start(torch.ones(2))
    >>> rule.advance_(slots, torch.tensor([2.0, -30.0]), rule.scales(1))
    >>> slots["log"]
    tensor([ 0.1000, -0.1000])
    """

    def __init__(
        self, rate: float = 0.1, betas: tuple[float, float] = (0.9, 0.999), limit: float = 1e4, fade: float | None = None
    ) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"the rate of the step sizes must be at least 0, got {rate}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not limit >= 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        _check_fade(fade)
        self.rate, self.betas, self.limit, self.fade = rate, betas, limit, fade

    def start(self, like: Tensor) -> Slots:
        """See :class:`StepSizeUpdate`."""
        return {"log": torch.zeros_like(like), "mean": torch.zeros_like(like), "square": torch.zeros_like(like)}

    def scales(self, count: int) -> tuple[float, ...]:
        """What the root of ``square`` is multiplied by, and what is added, so that ``mean`` divided by it is the change."""
        rate = _faded(self.rate, self.fade, count)
        first = (1 - self.betas[0] ** count) / rate
        return first / math.sqrt(1 - self.betas[1] ** count), 1e-20 * first

    def weight(self, lr: float, first: float) -> float:
        """See :class:`StepSizeUpdate`."""
        return lr / first

    def advance_(self, slots: Slots, increase: Tensor, scales: Sequence[float | Tensor]) -> None:
        """See :class:`StepSizeUpdate`."""
        (beta1, beta2), mean, square = self.betas, slots["mean"], slots["square"]
        increase.clamp_(-_ROOT_OF_LARGEST[increase.dtype], _ROOT_OF_LARGEST[increase.dtype])  # else its square may overflow
        mean.lerp_(increase, 1 - beta1)
        square.mul_(beta2).addcmul_(increase, increase, value=1 - beta2)
        slots["log"].addcdiv_(mean, square.sqrt().mul_(scales[0]).add_(scales[1]))
        self._clamp(slots)

    def shift(self, factor: float) -> float:
        """Its logarithm."""
        return math.log(max(factor, 1 / self.limit))

    def shorten_(self, slots: Slots, shift: float | Tensor) -> None:
        """See :class:`StepSizeUpdate`."""
        slots["log"].add_(shift)
        self._clamp(slots)

    def _clamp(self, slots: Slots) -> None:
        slots["log"].clamp_(-math.log(self.limit), math.log(self.limit))

    def factor(self, slots: Slots) -> Tensor:
        """See :class:`StepSizeUpdate`."""
        return slots["log"].exp()


def _check_fade(fade: float | None) -> None:
    if fade is not None and not fade > 0:
        raise ValueError(f"fade must be positive or None, got {fade}")


def _faded(value: float, fade: float | None, count: int) -> float:
    return value if fade is None else value / (1 + count / fade) ** 2
