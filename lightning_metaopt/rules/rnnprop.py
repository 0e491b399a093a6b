"""RNNprop: an LSTM that sees gradient and momentum in units of the gradient's root mean square.

Lv, Jiang, Li: *Learning Gradient Descent: Better Generalization and Longer Horizons*, ICML 2017 (arXiv:1703.03633); the optimizer
that M-L2O adapts (Yang et al.: *M-L2O: Towards Generalizable Learning-to-Optimize by Test-Time Fast Self-Adaptation*, ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import State
from lightning_metaopt.rules.l2o_base import CoordinatewiseLSTM, Seen
from lightning_metaopt.rules.lstm_cell import affine, linear_map
from lightning_metaopt.tree import Tree, safe_sqrt, tree_map

__all__ = ["RNNprop"]


@final
class RNNprop(CoordinatewiseLSTM):
    """:math:`u = \\alpha\\tanh(W_o\\,\\mathrm{LSTM}(\\mathrm{ELU}(W_i(\\tilde m, \\tilde g))))` for every coordinate.

    .. math:: \\tilde m = \\hat m/(\\sqrt{\\hat v} + \\epsilon), \\qquad \\tilde g = g/(\\sqrt{\\hat v} + \\epsilon),

    with Adam's bias-corrected averages :math:`\\hat m, \\hat v`. Both features are free of the scale of the loss. Neither the
    direction nor the sign of the step is given: all of it is learned, and **an untrained rule need not descend**.

    The paper of M-L2O describes one layer, its published code has two; both have 20 units and :math:`\\alpha = 0.01`. Such a step
    cannot move a coordinate by more than 0.01, which is little for a few dozen steps: ``learn_scale=True`` learns
    :math:`\\log\\alpha`.

    Args:
        layers: LSTM layers.
        hidden: units of each, also of the layer before them.
        scale: :math:`\\alpha`, in units of the parameters.
        learn_scale: make :math:`\\log\\alpha` a meta-parameter.
        beta1: averaging constant of the gradient, in [0, 1); not learned.
        beta2: the same for its square.
        eps: added to the root, in units of the gradient.
        bf16: keep the network's state in bfloat16.
        chunk: coordinates that are worked on at a time, deployed.
        seed: of the initial values.

    Raises:
        ValueError: for sizes below 1, a scale that is not positive, or averaging constants out of range.

    >>> rule = RNNprop()
    >>> params = {"w": torch.zeros(1, 3)}
    >>> small, _ = rule({"w": torch.tensor([[1.0, -2.0, 3.0]])}, rule.init(params), params)
    >>> large, _ = rule({"w": torch.tensor([[1e3, -2e3, 3e3]])}, rule.init(params), params)
    >>> torch.allclose(small["w"], large["w"])
    True
    """

    def __init__(
        self,
        layers: int = 1,
        hidden: int = 20,
        scale: float = 0.01,
        learn_scale: bool = False,
        beta1: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        bf16: bool = False,
        chunk: int = 3584,
        seed: int = 0,
    ) -> None:
        for what, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{what} must lie in [0, 1), got {value}")
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            hidden,
            layers=layers,
            hidden=hidden,
            scale=scale,
            learn_scale=learn_scale,
            bf16=bf16,
            chunk=chunk,
            generator=generator,
        )
        self.in_weight = linear_map(generator, hidden, 2)
        self.in_bias = nn.Parameter(torch.zeros(hidden))
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @property
    def config(self) -> dict[str, Any]:
        return self.sizes | {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}

    def memory(self, params: Tree) -> State:
        return {"mean": tree_map(torch.zeros_like, params), "square": tree_map(torch.zeros_like, params)}

    def features(self, grad: Tensor, memory: Mapping[str, Tensor], count: Tensor) -> Seen:
        mean = torch.lerp(grad, memory["mean"], self.beta1)
        square = torch.lerp(grad.square(), memory["square"], self.beta2)
        bias = _bias(self.beta2, count, grad)
        rms = safe_sqrt(square / bias)
        root = rms + self.eps
        other = bias if self.beta1 == self.beta2 else _bias(self.beta1, count, grad)
        return Seen((mean / other / root, grad / root), {"mean": mean, "square": square}, (rms, root, bias, other))

    def features_backward(
        self, grad: Tensor, seen: Seen, arriving: Sequence[Tensor], memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rms, root, bias, other = seen.kept
        to_mean, to_grad = (one / root for one in arriving)
        to_rms = torch.addcmul(to_mean * seen.features[0], to_grad, seen.features[1])
        # as in the forward pass, 0 instead of infinity where the gradient has always been 0
        square = torch.add(memory["square"], to_rms.div_(rms * bias).masked_fill_(rms == 0, 0), alpha=-0.5)
        mean = torch.addcdiv(memory["mean"], to_mean, other)
        to_grad.add_(mean, alpha=1 - self.beta1).addcmul_(grad, square, value=2 * (1 - self.beta2))
        return to_grad, {"mean": self.beta1 * mean, "square": self.beta2 * square}

    def enter(self, phi: Tree, x: Tensor, out: Tensor | None = None) -> Tensor:
        return nn.functional.elu(affine(phi["in_bias"].unsqueeze(-1), phi["in_weight"], x, out), inplace=True)

    def enter_backward(self, phi: Tree, x: Tensor, y: Tensor, grad: Tensor, through: bool = True) -> tuple[Tree, Tensor]:
        slopes = y.clamp(max=0).add_(1).mul_(grad)  # e^z = y + 1 below 0
        return {"in_weight": slopes @ x.mT, "in_bias": slopes.sum(-1)}, phi["in_weight"].mT @ slopes if through else x

    def leave(self, out: Tensor) -> Tensor:
        return out.tanh()

    def leave_backward(self, left: Tensor, grad: Tensor) -> Tensor:
        return torch.addcmul(grad, grad, left.square(), value=-1)


def _bias(beta: float, count: Tensor, grad: Tensor) -> Tensor:
    # 1 - beta^t without its cancellation
    return -torch.expm1(count.to(grad.dtype) * math.log(beta)) if beta else torch.ones_like(count)
