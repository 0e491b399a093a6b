"""Bootstrapped meta-gradients as an optimizer (Algorithm 3)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_metaopt.online.base import Bounds, OnlineOptimizer
from lightning_metaopt.online.clock import Clock, Weights
from lightning_metaopt.online.target import Mu, check_target, pull_of_target
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["BootstrappedMetaGrad"]


@final
class BootstrappedMetaGrad(OnlineOptimizer):
    """Bootstrapped meta-gradients: the meta-parameters of a rule move so that its step comes closer to a target (Algorithm 3).

    .. math:: x_t &= x_{t-1} + \\varphi(x_{t-1}, w_t), \\qquad
              z_t = y_K - \\eta\\nabla f(y_K), \\quad y_0 = x_t,\\; y_{k+1} = y_k + \\varphi(y_k, w_t), \\\\
              w_{t+1} &= \\mathrm{Proj}_{\\mathcal W}\\bigl(w_t - \\beta\\, D\\varphi(x_{t-1}, w_t)^\\top
                        (\\nabla\\mu(x_t) - \\nabla\\mu(z_t))\\bigr) \\qquad\\text{(Eq. 10)} .

    ``step`` needs a closure and calls it once, and then :math:`K` times more for the target (:math:`K+1` for ``mu="loss"``), as
    ``torch.optim.LBFGS`` does. The first step applies the rule as it is.

    Args:
        params: parameters, named parameters or param groups with equal options.
        lr: :math:`\\beta`.
        rule: the update rule :math:`\\varphi` (it is copied), or the name or file of a saved one; the copy learns in :attr:`rule`.
        lookahead: :math:`K`, at least 1.
        target_lr: :math:`\\eta`, the last step to the target (the paper takes 1).
        mu: ``"euclidean"`` for :math:`\\mu = \\tfrac12\\|\\cdot\\|^2`, which is optimistic: with :math:`K = 1, \\eta = 1` the
            difference in Eq. 10 is :math:`-\\varphi(x_t, w_t) + \\nabla f(y_1)`, the next step and the gradient after it.
            ``"loss"`` for :math:`\\mu = f`, which is AO-FTRL with the hint :math:`-D\\varphi^\\top\\nabla f(z_t)` (section 6
            prints the opposite sign): correct calculus, but not optimistic.
        averaging: move to the average of Eq. 2 as in Algorithm 4; the paper's Algorithm 3 does not.
        weights: :math:`\\alpha_t = t^p` of that average, or ``"fista"``.
        bounds: :math:`\\mathcal W` as ``(low, high)``, ``None`` for no bound.

    :attr:`target` holds the last target by parameter name. By Theorem 3
    (:func:`~lightning_metaopt.online.hints_from_targets`) an :class:`~lightning_metaopt.OptimisticFTRL` takes the same steps.

    Raises:
        ValueError: for an option out of range, or a rule sized for other parameters.
        RuntimeError: for a step without closure.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        rule: Rule | str | os.PathLike[str],
        *,
        lookahead: int = 1,
        target_lr: float = 1.0,
        mu: Mu = "euclidean",
        averaging: bool = False,
        weights: Weights = 1.0,
        bounds: Bounds | None = None,
    ) -> None:
        if rule is None:
            raise ValueError("bootstrapped meta-gradients need an update rule, such as rules.MetaSGD.for_module(net)")
        self.target: Tree = {}
        options = {"lr": lr, "lookahead": lookahead, "target_lr": target_lr, "mu": mu, "averaging": averaging, "weights": weights}
        super().__init__(params, rule, bounds, options)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        check_target(group["lookahead"], group["mu"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the first call of ``closure``, which computes loss and gradients, returned."""
        if closure is None:
            raise RuntimeError("the target is found by further gradients: call step(closure), as with torch.optim.LBFGS")
        with torch.enable_grad():
            loss = closure()
        active = self._active()
        if not active:
            return loss
        with torch.autocast(next(iter(active.values())).device.type, enabled=False):
            rule, group = self._place(active), self.param_groups[0]
            following = Clock.first() if self._clock is None else self._clock.next(group["weights"])
            if self._clock is not None:
                slopes = self._slopes(rule, active, group, closure)
                if self._finite(slopes):
                    for name, value in rule.named_parameters():
                        value.sub_(slopes[name], alpha=self._lr)
                self._project_()
            self._clock = following
            self._move(active, following.share if group["averaging"] else 1.0)
        return loss

    def _slopes(self, rule: Rule, active: Mapping[str, Tensor], group: Mapping[str, Any], closure: Callable[[], Any]) -> Tree:
        # D phi(x_{t-1}, w_t)^T (grad mu(x_t) - grad mu(z_t)); parameters and gradients are put back.
        points = {name: param.detach().clone() for name, param in active.items()}
        kept = {name: param.grad.clone() for name, param in active.items() if param.grad is not None}
        grads, state, views = self._here(active)
        here = {name: leaf.clone() for name, leaf in views.items()}

        def advance(point: Tree, slopes: Tree) -> Tree:
            nonlocal state
            updates, state = rule(slopes, state, point)
            return {name: leaf + updates[name] for name, leaf in point.items()}

        options = {key: group[key] for key in ("lookahead", "target_lr", "mu")}
        try:
            found, target = pull_of_target(here, grads, advance, lambda at: self._gradients(active, at, closure), **options)
            self.target = {name: target[self._partners[name]].squeeze(0) for name in active}
            pull = {name: found[self._partners[name]].squeeze(0) for name in active}
        finally:
            for name, param in active.items():
                param.copy_(points[name])
                param.grad = kept[name]
        return self.pullback({name: vector for name, vector in pull.items() if "grad" in self.state[active[name]]})

    def _gradients(self, active: Mapping[str, Tensor], at: Tree, closure: Callable[[], Any]) -> Tree:
        for name, param in active.items():
            param.copy_(at[self._partners[name]].squeeze(0))
            param.grad = None
        with torch.enable_grad():
            closure()
        return {
            self._partners[name]: (torch.zeros_like(param) if param.grad is None else self._wide(param.grad)).unsqueeze(0)
            for name, param in active.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "target": self.target}
