"""The ordinary optimizers as rules with learnable rates: controls for every learned rule, and warm starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree, expand_to, safe_sqrt, tree_map

__all__ = ["Adam", "GradientDescent", "HeavyBall", "RMSprop"]


def _log(value: float, name: str) -> nn.Parameter:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return nn.Parameter(torch.tensor(math.log(value)))


def _logit(value: float, name: str) -> nn.Parameter:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")
    return nn.Parameter(torch.tensor(math.log(value / (1 - value))))


def _zeros(params: Tree) -> Tree:
    return tree_map(torch.zeros_like, params)


def _counter(params: Tree) -> Tree:
    # One count for each problem and parameter, so that batches can be split and joined; bfloat16 cannot count past 256.
    return tree_map(lambda leaf: leaf.new_zeros(leaf.shape[0], dtype=torch.promote_types(leaf.dtype, torch.float32)), params)


@final
class GradientDescent(Rule):
    """Gradient descent, :math:`u = -e^{\\phi} g`.

    Args:
        lr: initial step size, in units of parameter / gradient.

    >>> updates, _ = GradientDescent(lr=0.5)({"w": torch.ones(1, 2)}, {}, {"w": torch.zeros(1, 2)})
    >>> updates["w"].tolist()
    [[-0.5, -0.5]]
    """

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.log_lr = _log(lr, "lr")

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        rate = self.log_lr.exp()
        return tree_map(lambda g: -rate * g, grads), state

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        rate = float(self.log_lr.detach().exp())
        for name, grad in grads.items():
            params[name].add_(grad, alpha=-rate * (scale[name] if scale else 1.0))

    def describe(self) -> dict[str, float]:
        return {"lr": float(self.log_lr.detach().exp())}


@final
class HeavyBall(Rule):
    """Momentum in PyTorch's convention, :math:`v \\leftarrow \\mu v + g,\\; u = -\\eta v` (Polyak) or
    :math:`u = -\\eta (g + \\mu v)` (Nesterov), with :math:`\\eta = e^{\\phi_1}` and :math:`\\mu = \\sigma(\\phi_2)`.

    Args:
        lr: initial step size.
        momentum: initial :math:`\\mu`, strictly between 0 and 1.
        nesterov: use Nesterov's form.
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.9, nesterov: bool = False) -> None:
        super().__init__()
        self.log_lr = _log(lr, "lr")
        self.momentum_logit = _logit(momentum, "momentum")
        self.nesterov = nesterov

    @property
    def config(self) -> dict[str, Any]:
        return {"nesterov": self.nesterov}

    def init(self, params: Tree) -> State:
        return {"momentum": _zeros(params)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        rate, mu = self.log_lr.exp(), self.momentum_logit.sigmoid()
        velocity = {name: mu * state["momentum"][name] + grad for name, grad in grads.items()}
        look = {name: grads[name] + mu * v for name, v in velocity.items()} if self.nesterov else velocity
        return tree_map(lambda v: -rate * v, look), {"momentum": velocity}

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        rate, mu = float(self.log_lr.detach().exp()), float(self.momentum_logit.detach().sigmoid())
        for name, grad in grads.items():
            velocity = state["momentum"][name]
            torch.add(grad, velocity, alpha=mu, out=velocity)  # one pass, where mul_ and add_ would take two
            alpha = -rate * (scale[name] if scale else 1.0)
            if self.nesterov:
                params[name].add_(grad, alpha=alpha).add_(velocity, alpha=alpha * mu)
            else:
                params[name].add_(velocity, alpha=alpha)

    def describe(self) -> dict[str, float]:
        return {"lr": float(self.log_lr.detach().exp()), "momentum": float(self.momentum_logit.detach().sigmoid())}


@final
class RMSprop(Rule):
    """RMSprop in PyTorch's convention, :math:`v \\leftarrow \\alpha v + (1-\\alpha) g^2,\\; u = -\\eta g/(\\sqrt v + \\epsilon)`.

    Args:
        lr: initial step size, in units of the parameters.
        alpha: initial averaging constant, strictly between 0 and 1.
        eps: added to the root, in units of the gradient; not learned.
    """

    def __init__(self, lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__()
        self.log_lr = _log(lr, "lr")
        self.alpha_logit = _logit(alpha, "alpha")
        self.eps = eps

    @property
    def config(self) -> dict[str, Any]:
        return {"eps": self.eps}

    def init(self, params: Tree) -> State:
        return {"square": _zeros(params)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        rate, alpha = self.log_lr.exp(), self.alpha_logit.sigmoid()
        square = {name: alpha * state["square"][name] + (1 - alpha) * grad.square() for name, grad in grads.items()}
        return {name: -rate * grad / (safe_sqrt(square[name]) + self.eps) for name, grad in grads.items()}, {"square": square}

    def describe(self) -> dict[str, float]:
        return {"lr": float(self.log_lr.detach().exp()), "alpha": float(self.alpha_logit.detach().sigmoid())}


@final
class Adam(Rule):
    """Adam, :math:`u = -\\eta\\, \\hat m/(\\sqrt{\\hat v} + \\epsilon)`, with learnable :math:`\\eta, \\beta_1, \\beta_2`.

    Args:
        lr: initial step size, in units of the parameters.
        beta1: initial averaging constant of the gradient, strictly between 0 and 1.
        beta2: the same for its square.
        eps: added to the root, in units of the gradient; not learned.
    """

    def __init__(self, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.log_lr = _log(lr, "lr")
        self.beta1_logit = _logit(beta1, "beta1")
        self.beta2_logit = _logit(beta2, "beta2")
        self.eps = eps

    @property
    def config(self) -> dict[str, Any]:
        return {"eps": self.eps}

    def init(self, params: Tree) -> State:
        return {"mean": _zeros(params), "square": _zeros(params), "step": _counter(params)}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        rate, beta1, beta2 = self.log_lr.exp(), self.beta1_logit.sigmoid(), self.beta2_logit.sigmoid()
        mean = {name: torch.lerp(grad, state["mean"][name], beta1) for name, grad in grads.items()}
        square = {name: torch.lerp(grad.square(), state["square"][name], beta2) for name, grad in grads.items()}
        count = {name: state["step"][name] + 1 for name in grads}
        updates = {}
        for name in grads:
            t = expand_to(count[name], mean[name])
            bias1, bias2 = (1 - beta1**t).to(grads[name].dtype), (1 - beta2**t).to(grads[name].dtype)
            updates[name] = -rate * mean[name] / bias1 / (safe_sqrt(square[name] / bias2) + self.eps)
        return updates, {"mean": mean, "square": square, "step": count}

    def describe(self) -> dict[str, float]:
        return {
            "lr": float(self.log_lr.detach().exp()),
            "beta1": float(self.beta1_logit.detach().sigmoid()),
            "beta2": float(self.beta2_logit.detach().sigmoid()),
        }
