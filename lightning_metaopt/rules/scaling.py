"""Element-wise step sizes that cannot change sign: the update rule of optimistic meta-gradients.

Flennerhag et al.: *Optimistic Meta-Gradients*, NeurIPS 2023 (arXiv:2301.03236), sections 7.1 ("Meta-Momentum") and 7.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_metaopt.rule import Rule, State, per_parameter
from lightning_metaopt.tree import Layout, Tree, escape

__all__ = ["ElementwiseScale"]


@final
class ElementwiseScale(Rule):
    """Gradient descent with a learned step size of at least 0 for every coordinate.

    .. math:: u = -w\\odot g, \\qquad w = \\phi,\\; \\phi\\leftarrow\\max(\\phi, 0) \\;\\text{after every meta-step (raw)}
              \\quad\\text{or}\\quad w = e^{\\phi} \\;\\text{(log)} .

    The raw form is :class:`MetaSGD` held to :math:`w\\ge 0`, as the paper does "to stabilize training" (section 7.2): same updates,
    same meta-gradients, but for the ``max``. The log form is positive, and a meta-step changes each step size by a factor, whatever
    its units; it is :class:`DCOGradient` with :math:`\\Lambda = e^{-\\phi/2}`. The paper prints
    :math:`\\varphi(x, w) = w\\odot\\nabla f(x)`, which would climb. This rule is for meta-training and for
    :class:`~lightning_metaopt.OptimisticFTRL`; :class:`~lightning_metaopt.OptimisticMetaGrad` scales the updates of any optimizer
    in the same two forms while a module trains.

    Args:
        shapes: names and shapes of the parameters.
        lr: initial step size of all coordinates, in units of parameter / gradient.
        form: ``"log"`` or ``"raw"``.

    Raises:
        ValueError: for a step size that is not positive (``"raw"``: negative), or another form.

    >>> rule = ElementwiseScale({"w": (2,)}, lr=0.5, form="raw")
    >>> rule({"w": torch.tensor([[4.0, -8.0]])}, {}, {"w": torch.zeros(1, 2)})[0]["w"].tolist()
    [[-2.0, 4.0]]
    """

    elementwise = True

    def __init__(self, shapes: Mapping[str, Sequence[int]], lr: float = 0.01, form: Literal["log", "raw"] = "log") -> None:
        super().__init__()
        if form not in ("log", "raw"):
            raise ValueError(f"form must be 'log' or 'raw', got {form!r}")
        if not (lr > 0 or (lr == 0 and form == "raw")) or not math.isfinite(lr):
            raise ValueError(f"lr must be positive and finite, got {lr}")
        self.form = form
        self.scale = per_parameter(shapes, math.log(lr) if form == "log" else lr)
        self.layout = Layout.of(shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        return {"shapes": dict(self.layout.shapes), "form": self.form}

    def step_size(self, name: str) -> Tensor:
        """:math:`w` of one parameter."""
        value: Tensor = self.scale[escape(name)]
        return value.exp() if self.form == "log" else value

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        factors = self.once("factors", lambda: {name: (-self.step_size(name)).expand_as(grad) for name, grad in grads.items()})
        return {name: factors[name] * grad for name, grad in grads.items()}, state

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        for name, grad in grads.items():
            params[name].addcmul_(self.step_size(name).detach(), grad, value=-(scale[name] if scale else 1.0))

    def project_(self) -> None:
        if self.form == "raw":
            with torch.no_grad():
                for value in self.scale.values():
                    value.clamp_(min=0)

    def describe(self) -> dict[str, float]:
        steps = torch.cat([self.step_size(name).detach().flatten() for name in self.shapes])
        low, middle, high = torch.quantile(steps[: 2**24], steps.new_tensor([0.05, 0.5, 0.95])).tolist()
        return {
            "step_size": middle,
            "step_size_5%": low,
            "step_size_95%": high,
            "step_size_zero": float((steps == 0).float().mean()),
        }
