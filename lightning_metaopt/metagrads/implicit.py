"""Meta-gradients from a condition that holds at the end of the inner loop, without going back through its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.metagrads.solvers import Neumann, Solver
from lightning_metaopt.objectives import Mirror, Objective, displacement, mirror_of
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Tree, detach, norm, tree_map

__all__ = ["Displacement", "Implicit", "Regularised", "Stationarity"]


class Stationarity(ABC):
    """The function :math:`F(\\theta, \\phi)` whose derivative by :math:`\\theta` is taken to vanish where the inner loop ends."""

    @property
    @abstractmethod
    def hessian(self) -> str:
        """In words: whose Hessian is inverted."""

    def task(self, rule: Rule, episode: Episode) -> Task:
        """The problems that the inner loop works on; by default those of the episode."""
        return episode.task

    @abstractmethod
    def __call__(self, rule: Rule, end: Episode) -> Tensor:
        """:math:`F` at ``end.params``, shape ``(B,)``."""


@final
class Displacement(Stationarity):
    """:math:`F = B_{\\phi_M}(\\theta, \\theta_0)`, as MetaMD has it (Eq. 12 and 13): the Hessian that is inverted is :math:`M`.

    **A heuristic.** The paper argues that mirror descent ends in the solution nearest to its start, and drops the constraint
    from the condition for that. But :math:`\\nabla F = M(\\theta_T - \\theta_0)` does not vanish there, so the implicit function
    theorem does not apply; where the solution is unique or minimises F among the solutions, the true indirect term of Eq. 8
    is 0.
    """

    @property
    def hessian(self) -> str:
        return "the rule's matrix M"

    def __call__(self, rule: Rule, end: Episode) -> Tensor:
        return mirror_of(rule, "Implicit").divergence(displacement(end))


class _Proximal(Task):
    # The problems of another task, each held to its starting point by the rule's divergence.
    def __init__(self, task: Task, mirror: Mirror, origin: Tree, weight: float) -> None:
        super().__init__(task.data, task.shared)
        self.task, self.mirror, self.origin, self.weight = task, mirror, origin, weight

    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        return self.task.init(generator)

    def batch(self, step: int) -> Any:
        return self.task.batch(step)

    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        held = {name: leaf - self.origin[name] for name, leaf in params.items()}
        return self.task.loss(params, buffers, batch) + self.weight * self.mirror.divergence(held)


@final
class Regularised(Stationarity):
    """:math:`F = f(\\theta) + w\\,B_{\\phi_M}(\\theta, \\theta_0)`: the inner loop minimises the loss plus the rule's divergence
    from the start (as in implicit MAML, with a learned geometry), and the meta-gradient is exact where it has converged. The
    Hessian that is inverted is that of F, :math:`\\nabla^2 f + wM`.

    With minibatches F is taken on the one that the next step would use: exact only for tasks with a single batch.

    Args:
        weight: :math:`w`, positive, in units of loss / divergence.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0:
            raise ValueError(f"weight must be positive, got {weight}")
        self.weight = weight

    @property
    def hessian(self) -> str:
        return f"the loss plus {self.weight:g} times the rule's divergence from the start"

    def task(self, rule: Rule, episode: Episode) -> Task:
        if not episode.origin:
            raise ValueError("the episode does not know where it began; start it with lightning_metaopt.episode.start")
        return _Proximal(episode.task, mirror_of(rule, "Implicit"), episode.origin, self.weight)

    def __call__(self, rule: Rule, end: Episode) -> Tensor:
        buffers = {name: leaf.clone() for name, leaf in end.buffers.items()}
        return self.task(rule, end).loss(end.params, buffers, end.task.batch(end.step))


Terms = Literal["both", "direct", "indirect"]


@final
class Implicit(MetaGradient):
    """The implicit function theorem where the inner loop ends: memory and time of the meta-gradient do not grow with its steps.

    If :math:`\\nabla_\\theta F(\\theta_T, \\phi) = 0` defines where that is, the objective :math:`E(\\phi, \\theta_T)` has

    .. math:: \\frac{dE}{d\\phi} = \\frac{\\partial E}{\\partial\\phi} - \\frac{\\partial E}{\\partial\\theta}
              \\Big(\\frac{\\partial^2 F}{\\partial\\theta\\,\\partial\\theta}\\Big)^{-1}
              \\frac{\\partial^2 F}{\\partial\\theta\\,\\partial\\phi} .

    With :class:`Regularised` this is exact, up to how far the loop and the solver have converged. With :class:`Displacement`,
    MetaMD's choice, it is a heuristic, of which the paper has several forms that **differ in sign**. For a full matrix M and the
    divergence as the objective, with :math:`\\Delta = \\theta_T - \\theta_0`:

    ============================  =====================================  ===============================
    ``terms``, ``sign``           dE/dM                                  what it is
    ============================  =====================================  ===============================
    ``"both"``, ``-1``            :math:`-\\frac12\\Delta\\Delta^\\top`      the theorem, were it to apply
    ``"indirect"``, ``-1``        :math:`-\\Delta\\Delta^\\top`             Algorithm 2
    ``"indirect"``, ``+1``        :math:`+\\Delta\\Delta^\\top`             Eq. 13 as printed
    ``"direct"``                  :math:`+\\frac12\\Delta\\Delta^\\top`      exact if :math:`\\theta_T` does not depend on M
    ============================  =====================================  ===============================

    Descent on a negative one makes M larger along what was travelled, without end unless the objective holds M back
    (``MirrorBound(gamma=...)``, whose regulariser belongs to the direct term).

    The objective counts as a function of :math:`\\phi` and of where the loop ends; losses on the way are constants.

    Args:
        steps: inner steps before the condition is taken to hold.
        stationarity: :math:`F`.
        solver: of the linear system with its Hessian.
        terms: which of the two terms.
        sign: of the indirect term.

    Raises:
        ValueError: for other terms or signs.
        TypeError: when it is called with a rule that has no divergence.

    Reference: Lorraine, Vicol, Duvenaud. Optimizing millions of hyperparameters by implicit differentiation. AISTATS 2020.
    """

    def __init__(
        self,
        steps: int = 100,
        stationarity: Stationarity | None = None,
        solver: Solver | None = None,
        terms: Terms = "both",
        sign: int = -1,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if terms not in ("both", "direct", "indirect"):
            raise ValueError(f"terms must be 'both', 'direct' or 'indirect', got {terms!r}")
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1 (the implicit function theorem) or 1, got {sign}")
        self.steps, self.terms, self.sign = steps, terms, sign
        self.stationarity = stationarity or Displacement()
        self.solver = solver or Neumann()

    @property
    def exact_of(self) -> str:
        part = {"both": "", "direct": "the direct term of ", "indirect": "the indirect term of "}[self.terms]
        inverse = "" if self.terms == "direct" else f", by the inverse Hessian of {self.stationarity.hessian}"
        sign = " with the sign of its indirect term turned round" if self.sign > 0 and self.terms != "direct" else ""
        known = isinstance(self.stationarity, Regularised) and not sign
        return f"{part}the objective at the end of {self.steps} steps{inverse}{sign}" + ("" if known else " (a heuristic)")

    @property
    def inner_steps(self) -> int:
        return self.steps

    @property
    def gradient_evaluations(self) -> int:
        own = isinstance(self.stationarity, Displacement) or self.terms == "direct"  # F has no part of the loss
        return self.steps + 1 + (0 if own else 1 + 2 * self.solver.products)

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        episode = episode.detach()
        end, losses = unroll(rule, replace(episode, task=self.stationarity.task(rule, episode)), self.steps)
        end = replace(end, task=episode.task)
        leaves = tree_map(lambda leaf: leaf.detach().requires_grad_(), end.params)
        names, phi = zip(*rule.named_parameters(), strict=True)
        with torch.enable_grad():
            value = objective(rule, episode, replace(end, params=leaves), losses).mean()
        found = _grad(value, [*phi, *leaves.values()])
        direct = dict(zip(names, found[: len(phi)], strict=True))
        slope = dict(zip(leaves, found[len(phi) :], strict=True))
        info: dict[str, float] = {}
        grads = direct
        if self.terms != "direct":
            indirect, info = self._indirect(rule, replace(end, params=leaves), slope)
            grads = {n: self.sign * indirect[n] + (direct[n] if self.terms == "both" else 0) for n in names}
        return Estimate(value.detach(), grads, end.detach(), info)

    def _indirect(self, rule: Rule, end: Episode, slope: Tree) -> tuple[Tree, dict[str, float]]:
        names, phi = zip(*rule.named_parameters(), strict=True)
        leaves = end.params
        with torch.enable_grad():
            value = self.stationarity(rule, end).sum()
            first = dict(
                zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True), strict=True)
            )
            known = {name: grad for name, grad in first.items() if grad is not None and grad.requires_grad}

            def pull(vector: Tree, inputs: list[Tensor]) -> list[Tensor]:
                slopes = [(grad * vector[name].detach()).sum() for name, grad in known.items()]
                return _grad(torch.stack(slopes).sum() if slopes else torch.zeros(()), inputs, retain_graph=True)

            def product(vector: Tree) -> Tree:
                return dict(zip(leaves, pull(vector, list(leaves.values())), strict=True))

            solution = detach(self.solver(product, slope))
            mixed = dict(zip(names, pull(solution, list(phi)), strict=True))
            left = tree_map(torch.sub, product(solution), slope)
        gradient = {name: torch.zeros_like(leaf) if first[name] is None else first[name].detach() for name, leaf in leaves.items()}
        scale = norm(slope).clamp_min(torch.finfo(value.dtype).tiny)
        return mixed, {"residual": float((norm(left) / scale).max()), "stationarity": float(norm(gradient).max())}


def _grad(value: Tensor, inputs: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    found = torch.autograd.grad(value, inputs, retain_graph=retain_graph, allow_unused=True, materialize_grads=True)
    return [grad.detach() for grad in found]
