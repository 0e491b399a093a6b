"""Mirror descent with potentials that are not quadratic: negative entropy and squared p-norms.

*MetaMD: Principled Optimiser Meta-Learning for Deep Learning*, 2022 (arXiv:2203.02711), section 3;
Kivinen, Warmuth: *Exponentiated Gradient versus Gradient Descent for Linear Predictors*, 1997.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Layout, Tree

__all__ = ["EntropyMirror", "PNormMirror"]


@final
class EntropyMirror(Rule):
    """Exponentiated gradient: mirror descent with the negative entropy
    :math:`\\phi(\\theta) = \\sum_i (\\theta_i\\log\\theta_i - \\theta_i)`, whose divergence is that of Kullback and Leibler.

    .. math:: \\theta_{t+1} = \\arg\\min_\\theta\\; \\eta\\langle g_t,\\theta\\rangle + B(\\theta,\\theta_t)
              = \\theta_t\\odot e^{-\\eta g_t} \\qquad (\\text{times } s/\\textstyle\\sum_i\\theta_{t,i}e^{-\\eta g_{t,i}}
              \\text{ if } \\sum_i\\theta_i = s)

    with a learned :math:`\\eta = e^{\\phi}`. Iterates stay positive. All parameters together are one vector.

    Args:
        shapes: names and shapes of the parameters.
        lr: initial :math:`\\eta`, in units of 1 / gradient: a step changes logarithms of parameters.
        total: :math:`s`, for parameters on the simplex of this sum; ``None`` for all positive vectors.

    Raises:
        ValueError: for numbers that are not positive; by :meth:`init`, for parameters that are not positive or whose sum is not
            ``total``.

    >>> rule = EntropyMirror({"w": (2,)}, lr=1.0)
    >>> updates, _ = rule({"w": torch.tensor([[math.log(3.0), 0.0]])}, {}, {"w": torch.full((1, 2), 0.5)})
    >>> torch.round(updates["w"], decimals=4).tolist()
    [[-0.25, 0.25]]
    """

    joint = True

    def __init__(self, shapes: Mapping[str, Sequence[int]], lr: float = 0.1, *, total: float | None = 1.0) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("total", 1.0 if total is None else total)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.layout = Layout.of(shapes)
        self.total = total
        self.log_lr = nn.Parameter(torch.tensor(math.log(lr)))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        return {"shapes": dict(self.layout.shapes), "total": self.total}

    def init(self, params: Tree) -> State:
        least = min(float(leaf.detach().min()) for leaf in params.values())
        if not least > 0:
            raise ValueError(
                f"EntropyMirror moves positive parameters only, and the smallest is {least:g}; start with positive ones (at 0 an "
                "iterate would stay for ever), or take PNormMirror"
            )
        if self.total is not None and params.keys() == self.shapes.keys():
            found = self.layout.flatten(params).detach().sum(1)
            if not torch.allclose(found, torch.full_like(found, self.total), rtol=1e-3):
                raise ValueError(
                    f"the parameters of a problem sum to {float(found[0]):g}, not to total={self.total:g}; start on the simplex, "
                    "or pass total=None for positive parameters without a fixed sum"
                )
        return {}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        here, slopes = self.layout.flatten(params), -self.log_lr.exp() * self.layout.flatten(grads)
        if self.total is None:
            return self.layout.unflatten(here * slopes.expm1()), state
        logs = here.clamp(min=torch.finfo(here.dtype).tiny).log()
        return self.layout.unflatten(self.total * torch.softmax(logs + slopes, 1) - here), state

    def divergence(self, x: Tree, y: Tree) -> Tensor:
        """:math:`\\sum_i x_i\\log(x_i/y_i) - x_i + y_i` of every problem, shape ``(B,)``; ``x`` may have zeros."""
        first, second = self.layout.flatten(x), self.layout.flatten(y)
        return (torch.xlogy(first, first) - torch.xlogy(first, second) - first + second).sum(1)

    def describe(self) -> dict[str, float]:
        return {"lr": float(self.log_lr.detach().exp())}


@final
class PNormMirror(Rule):
    """The p-norm algorithm: mirror descent with :math:`\\phi(\\theta) = \\tfrac12\\|\\theta\\|_p^2`.

    .. math:: \\theta_{t+1} = f_q\\big(f_p(\\theta_t) - \\eta g_t\\big), \\qquad
              f_p(\\theta) = \\nabla\\tfrac12\\|\\theta\\|_p^2 = \\mathrm{sign}(\\theta)\\,|\\theta|^{p-1}\\,\\|\\theta\\|_p^{2-p},
              \\quad \\tfrac1p+\\tfrac1q = 1 .

    :math:`p = 2` is gradient descent; towards 1 steps become multiplicative as those of :class:`EntropyMirror`, for parameters of
    both signs, and favour few large coordinates. :math:`\\eta = e^{\\phi_1}` and :math:`p = 1+e^{\\phi_2}` are learned; for
    :math:`p\\le 2` the potential is :math:`(p-1)`-strongly convex in :math:`\\|\\cdot\\|_p`. All parameters are one vector.
    At coordinates that are exactly 0, where a power has no derivative, derivatives with respect to the parameters are set to 0.

    Args:
        shapes: names and shapes of the parameters.
        lr: initial :math:`\\eta`, in units of parameter / gradient.
        p: initial exponent, larger than 1.

    Raises:
        ValueError: for an ``lr`` that is not positive or a ``p`` that is not larger than 1, or numbers that are not finite.

    >>> rule = PNormMirror({"w": (2,)}, lr=0.5, p=2.0)
    >>> rule({"w": torch.tensor([[4.0, -8.0]])}, {}, {"w": torch.ones(1, 2)})[0]["w"].tolist()
    [[-2.0, 4.0]]
    """

    joint = True

    def __init__(self, shapes: Mapping[str, Sequence[int]], lr: float = 0.1, p: float = 1.5) -> None:
        super().__init__()
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if not (p > 1 and math.isfinite(p)):
            raise ValueError(f"p must be finite and larger than 1, got {p}")
        self.layout = Layout.of(shapes)
        self.log_lr = nn.Parameter(torch.tensor(math.log(lr)))
        self.log_excess = nn.Parameter(torch.tensor(math.log(p - 1)))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.layout.shapes)

    @property
    def config(self) -> dict[str, Any]:
        return {"shapes": dict(self.layout.shapes)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        excess = self.log_excess.exp()  # p - 1; that of q is its inverse
        here = self.layout.flatten(params)
        dual = _gradient(here, excess) - self.log_lr.exp() * self.layout.flatten(grads)
        return self.layout.unflatten(_gradient(dual, 1 / excess) - here), state

    def divergence(self, x: Tree, y: Tree) -> Tensor:
        """:math:`\\phi(x) - \\phi(y) - \\langle\\nabla\\phi(y), x-y\\rangle` of every problem, shape ``(B,)``."""
        excess = self.log_excess.exp()
        first, second = self.layout.flatten(x), self.layout.flatten(y)
        linear = (_gradient(second, excess) * (first - second)).sum(1)
        return (_norm(first, 1 + excess).square() - _norm(second, 1 + excess).square()).squeeze(1) / 2 - linear

    def describe(self) -> dict[str, float]:
        return {"lr": float(self.log_lr.detach().exp()), "p": 1 + float(self.log_excess.detach().exp())}


def _gradient(x: Tensor, excess: Tensor) -> Tensor:
    # Of |x|_p^2 / 2 with p = 1 + excess, (B, n), as |x| sign(x) (|x_i| / |x|)^(p-1): no power of anything larger than 1.
    length = _norm(x, 1 + excess)
    return length * x.sign() * _power(x.abs() / torch.where(length > 0, length, torch.ones_like(length)), excess)


def _norm(x: Tensor, p: Tensor) -> Tensor:
    # (B, 1); divided by the largest entry first, so that no power overflows.
    largest = x.detach().abs().amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    return unit * _power(_power(x.abs() / unit, p).sum(1, keepdim=True), 1 / p)


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    # base ** exponent for base >= 0; 0 with derivatives 0 at 0.
    zero = base == 0
    return torch.where(zero, torch.zeros_like(base), torch.where(zero, torch.ones_like(base), base) ** exponent)
