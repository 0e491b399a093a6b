"""Hypergradient descent, the classical way to learn a learning rate online."""

from __future__ import annotations

import os
from typing import Any, Literal, final

from torch.optim import Optimizer

from lightning_metaopt.callbacks.drawing import DrawnStepCallback
from lightning_metaopt.callbacks.fused import Compile
from lightning_metaopt.callbacks.step_sizes import StepSizes
from lightning_metaopt.metastep import Additive, Multiplicative, StepSizeUpdate

__all__ = ["HypergradientDescent"]


@final
class HypergradientDescent(DrawnStepCallback):
    """Learns one learning rate :math:`\\alpha` for each optimizer, as a baseline.

    .. math:: \\alpha_t = \\alpha_{t-1} + \\beta\\, g_t^\\top P_{t-1} \\quad\\text{(additive)}, \\qquad
              \\alpha_t = \\alpha_{t-1}\\Bigl(1 + \\beta\\,\\frac{g_t^\\top P_{t-1}}{\\|g_t\\|\\,\\|P_{t-1}\\|}\\Bigr)
              \\quad\\text{(multiplicative, Eq. 8)}, \\qquad x_t = x_{t-1} - \\alpha_t P_t

    with :math:`\\alpha_0 = \\mathrm{lr}`. With ``torch.optim.SGD`` as the module's optimizer, :math:`P_t = g_t`, these are the
    paper's Algorithm SGD-HD; with momentum SGDN-HD, with ``torch.optim.Adam`` Adam-HD. A scheduler goes on acting:
    :math:`\\alpha` is multiplied by ``lr / base lr``. Where groups have several learning rates, one factor is common to all.

    Args:
        meta_lr: :math:`\\beta \\ge 0`, the paper's hypergradient learning rate. For the additive form it is in units of
            learning rate / squared gradient; the paper's experiments have 1e-3 for SGD, 1e-7 for Adam. For the multiplicative
            form it is below 1: the largest relative change of :math:`\\alpha` in one step.
        nonnegative: keep :math:`\\alpha` at least 0; the paper does not. In the multiplicative form it always is.
        optimizer_index: which of several optimizers to follow; ``None`` for all, each with its own :math:`\\alpha`.
        log: log the factor :math:`\\alpha / \\mathrm{lr}`, and the cosine of gradient and last direction.
        form: ``"additive"`` or ``"multiplicative"``.
        draw: file for a picture of what was logged, see :class:`~lightning_metaopt.callbacks.drawing.DrawnStepCallback`.
        compile: as in :class:`~lightning_metaopt.callbacks.optimistic.OptimisticMetaGrad`.

    Raises:
        ValueError: for a ``meta_lr`` out of range; for others see :class:`~lightning_metaopt.callbacks.base.StepCallback`.

    >>> import torch
    >>> x = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = torch.optim.SGD([x], lr=0.1)
    >>> engine = HypergradientDescent.attach(optimizer, meta_lr=0.01)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     (x.square().sum() / 2).backward()
    ...     loss = optimizer.step()
    >>> round(float(engine.factors()[x]) * 0.1, 4)  # 0.1 + 0.01 * 0.9 * 1
    0.109

    Reference: Online Learning Rate Adaptation with Hypergradient Descent (Baydin et al. 2018), Algorithms 4 to 6.
    """

    def __init__(
        self,
        meta_lr: float = 1e-3,
        nonnegative: bool = False,
        optimizer_index: int | None = None,
        log: bool = True,
        form: Literal["additive", "multiplicative"] = "additive",
        draw: str | os.PathLike[str] | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(optimizer_index, log, draw)
        if form not in ("additive", "multiplicative"):
            raise ValueError(f"form must be 'additive' or 'multiplicative', got {form!r}")
        self.compile: Compile = compile
        self.update: StepSizeUpdate = Additive(meta_lr, nonnegative) if form == "additive" else Multiplicative(meta_lr)

    def engine(self, optimizer: Optimizer) -> StepSizes:
        return StepSizes(optimizer, self.update, "optimizer", compile=self.compile)

    @classmethod
    def attach(cls, optimizer: Optimizer, **options: Any) -> StepSizes:
        """The same outside of Lightning; see :meth:`OptimisticMetaGrad.attach`."""
        engine = cls(**options).engine(optimizer)
        engine.attach()
        return engine
