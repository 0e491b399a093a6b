"""L2O: the first LSTM optimizer.

Andrychowicz et al.: *Learning to learn by gradient descent by gradient descent*, NeurIPS 2016 (arXiv:1606.04474).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.rule import State
from lightning_metaopt.rules.l2o_base import CoordinatewiseLSTM, Seen
from lightning_metaopt.tree import Tree

__all__ = ["L2O"]


@final
class L2O(CoordinatewiseLSTM):
    """:math:`u = \\alpha\\,W_o\\,\\mathrm{LSTM}(x(g))` for every coordinate.

    Its inputs are the logarithm and the sign of the gradient (their appendix A):

    .. math:: x(g) = (\\log|g|/p,\\ \\operatorname{sgn} g) \\text{ if } |g| \\ge e^{-p}, \\text{ else } (-1,\\ e^p g).

    As with :class:`RNNprop`, **an untrained rule need not descend**.

    Args:
        layers: LSTM layers.
        hidden: units of each.
        scale: :math:`\\alpha`, in units of the parameters.
        learn_scale: make :math:`\\log\\alpha` a meta-parameter.
        p: how small gradients may be before they count as zero, as the exponent in :math:`e^{-p}`; 10 in their paper.
        bf16: keep the network's state in bfloat16.
        chunk: coordinates that are worked on at a time, deployed.
        seed: of the initial values.

    Raises:
        ValueError: for sizes below 1, or a scale or ``p`` that is not positive.

    >>> seen = L2O().features(torch.tensor([math.e, -1.0, 0.0]), {}, torch.tensor(1.0))
    >>> [[round(value, 3) for value in feature.tolist()] for feature in seen.features]
    [[0.1, 0.0, -1.0], [1.0, -1.0, 0.0]]
    """

    def __init__(
        self,
        layers: int = 2,
        hidden: int = 20,
        scale: float = 0.01,
        learn_scale: bool = False,
        p: float = 10.0,
        bf16: bool = False,
        chunk: int = 3584,
        seed: int = 0,
    ) -> None:
        if not 0 < p <= 50:
            raise ValueError(f"p must lie between 0 and 50, got {p}")
        super().__init__(
            2,
            layers=layers,
            hidden=hidden,
            scale=scale,
            learn_scale=learn_scale,
            bf16=bf16,
            chunk=chunk,
            generator=torch.Generator().manual_seed(seed),
        )
        self.p = p

    @property
    def config(self) -> dict[str, Any]:
        return self.sizes | {"p": self.p}

    def memory(self, params: Tree) -> State:
        return {}

    def features(self, grad: Tensor, memory: Mapping[str, Tensor], count: Tensor) -> Seen:
        logarithm = grad.abs().clamp(min=math.exp(-self.p)).log() / self.p
        return Seen((logarithm, (math.exp(self.p) * grad).clamp(-1, 1)), {})

    def features_backward(
        self, grad: Tensor, seen: Seen, arriving: Sequence[Tensor], memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        large, small = arriving
        return torch.where(grad.abs() >= math.exp(-self.p), large / (self.p * grad), math.exp(self.p) * small), {}

    def enter(self, phi: Tree, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x if out is None else out.copy_(x)

    def enter_backward(self, phi: Tree, x: Tensor, y: Tensor, grad: Tensor, through: bool = True) -> tuple[Tree, Tensor]:
        return {}, grad

    def leave(self, out: Tensor) -> Tensor:
        return out

    def leave_backward(self, left: Tensor, grad: Tensor) -> Tensor:
        return grad
