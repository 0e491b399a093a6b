"""What the tests of LearnedOptimizer share: rules, their twins in torch.optim, parameters and gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree

SHAPES = [(3, 2), (4,), ()]


class Remembering(Rule):
    """Keeps its arguments themselves as state, as a pure rule may: u = -0.1 (g + g_last) + 0.01 (start - theta) - 0.001 loss."""

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def init(self, params: Tree) -> State:
        return {"start": params, "last": {name: torch.zeros_like(leaf) for name, leaf in params.items()}}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        shift = 0.0 if loss is None else 0.001 * float(loss)
        updates = {
            name: -0.1 * (grad + state["last"][name]) + 0.01 * (state["start"][name] - params[name]) - shift
            for name, grad in grads.items()
        }
        return updates, {"start": state["start"], "last": grads}


class Pure(Rule):
    """Another rule without its in-place form."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.inner = rule

    @property
    def config(self) -> dict[str, Any]:
        return self.inner.config

    def init(self, params: Tree) -> State:
        return self.inner.init(params)

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        return self.inner(grads, state, params, loss)


RULES = {
    "sgd": (lambda: lmo.rules.GradientDescent(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": (lambda: lmo.rules.HeavyBall(0.05, 0.8), lambda p: torch.optim.SGD(p, 0.05, momentum=0.8)),
    "nesterov": (
        lambda: lmo.rules.HeavyBall(0.05, 0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    ),
    "adam": (lambda: lmo.rules.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "rmsprop": (lambda: lmo.rules.RMSprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
}


def exact_phi(name: str) -> list[float]:
    def logit(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).logit())

    def log(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).log())

    return {
        "sgd": [log(0.05)],
        "momentum": [log(0.05), logit(0.8)],
        "nesterov": [log(0.05), logit(0.8)],
        "adam": [log(0.01), logit(0.9), logit(0.999)],
        "rmsprop": [log(0.01), logit(0.99)],
    }[name]


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
