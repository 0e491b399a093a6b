"""The ordinary optimizers as rules with learnable rates: controls for every learned rule, and warm starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

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


def _fusible(leaf: Tensor) -> bool:
    # What the one-pass kernel of torch takes: one problem in single precision, without gaps, on a CPU or a CUDA device.
    return len(leaf) == 1 and leaf.dtype == torch.float32 and leaf.is_contiguous() and leaf.device.type in ("cpu", "cuda")


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

    elementwise = True

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

    elementwise = True

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

    elementwise = True

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
        mean = {name: torch.lerp(grad, state["mean"][name], beta1.to(grad.dtype)) for name, grad in grads.items()}
        square = {name: torch.lerp(grad.square(), state["square"][name], beta2.to(grad.dtype)) for name, grad in grads.items()}
        count = {name: state["step"][name] + 1 for name in grads}
        updates = {}
        for name in grads:
            t = expand_to(count[name], mean[name])
            # 1 - beta^t, but without its cancellation (relative error 1e-5 in float32 for beta = 0.999)
            bias1, bias2 = (-torch.expm1(t * beta.log()).to(grads[name].dtype) for beta in (beta1, beta2))
            updates[name] = -rate * mean[name] / bias1 / (safe_sqrt(square[name] / bias2) + self.eps)
        return updates, {"mean": mean, "square": square, "step": count}

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        trees = (params, grads, state["mean"], state["square"])
        if not all(_fusible(tree[name]) for tree in trees for name in grads):
            super().forward_(grads, state, params, loss, scale)
            return
        rate, beta1, beta2 = (
            float(v.detach()) for v in (self.log_lr.exp(), self.beta1_logit.sigmoid(), self.beta2_logit.sigmoid())
        )
        factors = {name: scale[name] if scale else 1.0 for name in grads}
        for factor in sorted(set(factors.values())):
            names = [name for name in grads if factors[name] == factor]
            updated, slopes, means, squares = ([tree[name] for name in names] for tree in trees)
            adam(
                updated,
                slopes,
                means,
                squares,
                max_exp_avg_sqs=[],
                state_steps=[state["step"][name].view(()) for name in names],
                fused=True,
                lr=rate * factor,
                beta1=beta1,
                beta2=beta2,
                eps=self.eps,
                weight_decay=0.0,
                amsgrad=False,
                maximize=False,
            )

    def describe(self) -> dict[str, float]:
        return {
            "lr": float(self.log_lr.detach().exp()),
            "beta1": float(self.beta1_logit.detach().sigmoid()),
            "beta2": float(self.beta2_logit.detach().sigmoid()),
        }
