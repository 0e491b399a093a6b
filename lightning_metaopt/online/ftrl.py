"""Adaptive-optimistic Follow-The-Regularised-Leader as an optimizer (Algorithms 1, 2 and 4)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_metaopt.online.base import Bounds, OnlineOptimizer
from lightning_metaopt.online.clock import Clock, Hint, Weights, hint_factor
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["OptimisticFTRL"]


@final
class OptimisticFTRL(OnlineOptimizer):
    """Optimistic FTRL on the parameters, or on the meta-parameters of an update rule (Algorithms 1, 2 and 4).

    The parameters hold the average :math:`\\bar x_t` of Eq. 2, which is where gradients are taken. One step is

    .. math:: g_t &= D\\varphi(\\bar x_{t-1}, w_t)^\\top \\nabla f(\\bar x_t), \\qquad
              v_t = \\alpha_{t+1}\\tilde g_{t+1} + \\sum_{s\\le t}\\alpha_s g_s, \\\\
              w_{t+1} &= \\arg\\min_{w\\in\\mathcal W}\\; \\langle v_t, w\\rangle + \\tfrac1{2\\beta_t}\\|w - w_1\\|^2
                       = \\mathrm{Proj}_{\\mathcal W}(w_1 - \\beta_t v_t), \\\\
              \\bar x_{t+1} &= (1-\\rho_{t+1})\\,\\bar x_t + \\rho_{t+1}\\, x_{t+1}, \\qquad
              x_{t+1} = \\varphi(\\bar x_t, w_{t+1}), \\quad \\rho_t = \\alpha_t/\\alpha_{1:t} .

    Without ``rule``, :math:`\\varphi(x, w) = w` starts at :math:`w_1 = \\bar x_1`, the parameters as they are given. Then

    - ``hint="none"`` is Heavy Ball with momentum :math:`(t-2)/(t+1)` and step :math:`(t-1)\\,2\\beta/(t+1)` (section 4);
    - ``hint="gradient"`` has Nesterov's rate (Corollary 1) but is not exactly one of his methods;
    - ``hint="coupling"`` is Nesterov's method with three sequences and step :math:`2\\beta`;
    - ``weights="fista", hint="coupling", coupling=1`` is FISTA, or Nesterov's method with two sequences, with step :math:`\\beta`.

    With ``rule``, :math:`x_{t+1} = \\bar x_t + \\varphi` where :math:`\\varphi` is the rule's update and :math:`w` are its
    parameters: ``ElementwiseScale`` for the paper's step sizes, ``MetaAdaGrad``, ``AdaGrad``, ``DCOGeneralDescent`` for a
    matrix, or any other (theory needs one that is affine in :math:`w`). A copy of the rule learns in :attr:`rule`. The first
    step applies the rule as it is; learning begins with the second. ``weights=0, averaging=False`` is Algorithm 1.

    Args:
        params: parameters, named parameters or param groups; with a rule, groups have equal options.
        lr: :math:`\\beta`, in units of (meta-)parameter / (meta-)gradient. On an :math:`L`-smooth convex function without rule,
            :math:`1/(2L)` (Corollary 1), and :math:`1/L` for FISTA. FTRL keeps the sum of all gradients, so a scheduler
            that changes ``lr`` rescales the whole distance :math:`w - w_1`.
        rule: an update rule (it is copied), or the name or file of a saved one. ``None`` for :math:`\\varphi(x, w) = w`.
        weights: :math:`\\alpha_t = t^p` for a number :math:`p`, or ``"fista"``.
        hint: :math:`\\tilde g_{t+1}`: ``"none"``; ``"gradient"`` for :math:`g_t` (Corollary 1); ``"coupling"`` for
            :math:`c\\,\\alpha_{1:t}/\\alpha_{t+1}^2\\, g_t`; ``"current"`` for :math:`D\\varphi(\\bar x_t, w_t)^\\top\\nabla
            f(\\bar x_t)` (section 7.2; with the rule taken at the current point, which is known where the rule is affine; the same
            as ``"gradient"`` without a rule).
        coupling: :math:`c` of ``hint="coupling"``.
        correction: take the last hint off the sum when its gradient is known. Without it hints accumulate, as in the
            original bootstrapped meta-gradients (section 6).
        averaging: average the iterates (Eq. 2), else :math:`\\bar x_t = x_t`.
        ramp: :math:`\\beta_t = \\mathrm{lr}\\, t/(t+1)`, the schedule of Corollary 1, instead of ``lr``.
        adaptive: AdaGrad's norm in the regulariser (end of "Algorithm" in section 2): :math:`\\beta_t` becomes, element by element,
            :math:`\\mathrm{lr}/(\\epsilon + \\sqrt{\\sum_{s\\le t}\\alpha_s^2(g_s-\\tilde g_s)^2})`.
        eps: :math:`\\epsilon` there.
        bounds: :math:`\\mathcal W` as ``(low, high)`` for all elements of :math:`w`, ``None`` for no bound; beside it the rule's
            own ``project_`` holds.
        greedy: project at every step and go on from there, as in section 7.2, instead of projecting the sum.

    Where we differ from the print, each difference held by a test: the regulariser is centred at :math:`w_1` (printed: at 0,
    which forgets the initialisation); the hint of Eq. 9 is inside the inner product; rules give updates with a minus sign
    (:math:`-w\\odot\\nabla f`); Heavy Ball's step (section 4 prints :math:`t/(4(t+1)L)`); the factor :math:`1/L` in Corollary 1's
    :math:`\\beta_t`, whose index is that of :math:`w_{t+1}`.

    State: two tensors a parameter without rule, with a rule its last gradient, last point and twice the rule's state, and two
    tensors a meta-parameter; at least float32. A step with a gradient that is not finite is left out and counted.

    Raises:
        ValueError: for an option out of range, a rule sized for other parameters, groups that differ under a rule.
        TypeError: for parameters that are not real, or a ``rule`` that is none.

    >>> x = torch.nn.Parameter(torch.tensor([4.0, 4.0]))
    >>> optimizer = OptimisticFTRL([x], lr=0.5 / 10)  # L = 10
    >>> for _ in range(100):
    ...     loss = 0.5 * (x.square() * torch.tensor([10.0, 1.0])).sum()
    ...     x.grad, = torch.autograd.grad(loss, x)
    ...     optimizer.step()
    >>> bool(loss < 1e-3)
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        rule: Rule | str | os.PathLike[str] | None = None,
        *,
        weights: Weights = 1.0,
        hint: Hint = "gradient",
        coupling: float = 2.0,
        correction: bool = True,
        averaging: bool = True,
        ramp: bool = False,
        adaptive: bool = False,
        eps: float = 1e-10,
        bounds: Bounds | None = None,
        greedy: bool = False,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "weights": weights, "hint": hint, "coupling": coupling, "correction": correction}
        options |= {"averaging": averaging, "ramp": ramp, "adaptive": adaptive, "eps": eps, "greedy": greedy}
        super().__init__(params, rule, bounds, options)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if group["hint"] not in ("none", "gradient", "coupling", "current"):
            raise ValueError(f"hint must be 'none', 'gradient', 'coupling' or 'current', got {group['hint']!r}")
        if not group["coupling"] >= 0 or not group["eps"] >= 0:
            raise ValueError(f"coupling and eps must be at least 0, got {group['coupling']} and {group['eps']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, hint: Mapping[str, Tensor] | None = None) -> Any:
        """One step. Returns what ``closure`` returned.

        Args:
            closure: computes the loss and its gradients.
            hint: :math:`\\tilde g_{t+1}` by name of parameter, or of meta-parameter where there is a rule, instead of that of
                the option ``hint``; names that are missing get none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active()
        if active:
            with torch.autocast(next(iter(active.values())).device.type, enabled=False):  # manual optimisation
                if self.rule is None:
                    self._step_parameters(active, hint)
                else:
                    self._step_rule(active, hint)
        return loss

    def clock(self, name: str | None = None) -> Clock:
        """The round :math:`t` of the current point: of a parameter, or of the rule's meta-parameters."""
        if self.rule is not None:
            return self._clock or Clock(0, 0.0, 0.0)
        param = next(param for param, label in self._names.items() if name in (None, label))
        return Clock(*self.state[param]["clock"]) if param in self.state else Clock.first()

    def _step_parameters(self, active: Mapping[str, Tensor], hint: Mapping[str, Tensor] | None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                name = self._names[param]
                if name not in active:
                    continue
                leaf, grad = self.state[param], self._wide(param.grad)
                if not leaf:
                    leaf.update(_fresh(param, group), clock=tuple(Clock.first()))
                now = Clock(*leaf["clock"])
                following = now.next(group["weights"])
                w, beta, bonus = _follow(leaf, grad, _bonus(name, grad, grad, hint, now, following, group), now, group)
                if self.bounds != (None, None):
                    w.clamp_(*self.bounds)
                _settle_(leaf, w, beta, bonus, group)
                leaf["clock"] = tuple(following)
                param.copy_(torch.lerp(self._wide(param), w, following.share) if group["averaging"] else w)

    def _step_rule(self, active: Mapping[str, Tensor], hint: Mapping[str, Tensor] | None) -> None:
        rule, group, lr = self._place(active), self.param_groups[0], self._lr
        if self._clock is None:
            following = Clock.first()
            self._leaves = {name: _fresh(value, group) for name, value in rule.named_parameters()}
        else:
            following = self._clock.next(group["weights"])
            grads = {name: self._wide(param.grad) for name, param in active.items() if param.grad is not None}
            slopes = self.pullback({name: grad for name, grad in grads.items() if "grad" in self.state[active[name]]})
            ahead: Tree = self._derivative(grads, self._here(active)) if group["hint"] == "current" and hint is None else slopes
            if not self._finite({**slopes, **ahead}):
                slopes = ahead = {name: torch.zeros_like(value) for name, value in rule.named_parameters()}
            chosen = {}
            for name, value in rule.named_parameters():
                bonus = _bonus(name, slopes[name], ahead[name], hint, self._clock, following, group)
                w, beta, bonus = _follow(self._leaves[name], slopes[name], bonus, self._clock, {**group, "lr": lr})
                chosen[name] = beta, bonus
                value.copy_(w)
            self._project_()
            for name, value in rule.named_parameters():
                _settle_(self._leaves[name], value, *chosen[name], group)
        self._clock = following
        self._move(active, following.share if group["averaging"] else 1.0)


def _fresh(value: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    wide = OnlineOptimizer._wide(value).clone()
    leaf = {"start": wide, "dual": torch.zeros_like(wide)}
    if group["adaptive"]:
        leaf |= {"square": torch.zeros_like(wide), "hint": torch.zeros_like(wide)}
    return leaf


def _bonus(
    name: str,
    slope: Tensor,
    ahead: Tensor,
    given: Mapping[str, Tensor] | None,
    now: Clock,
    following: Clock,
    group: Mapping[str, Any],
) -> Tensor | None:
    # alpha_{t+1} times the hint.
    if given is not None:
        return given[name].to(slope) * following.alpha if name in given else None
    factor = hint_factor(group["hint"], now, following, group["coupling"])
    return None if factor == 0 else (ahead if group["hint"] == "current" else slope) * factor


def _follow(
    leaf: dict[str, Any], slope: Tensor, bonus: Tensor | None, now: Clock, group: Mapping[str, Any]
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    # w_1 - beta_t v_t, before projection; beta_t; and the part of v_t that is not in the sum.
    leaf["dual"].add_(slope, alpha=now.alpha)
    beta: Tensor | float = float(group["lr"]) * (now.step / (now.step + 1) if group["ramp"] else 1.0)
    if group["adaptive"]:
        surprise = now.alpha * slope - leaf["hint"]
        leaf["square"].addcmul_(surprise, surprise)
        leaf["hint"] = torch.zeros_like(slope) if bonus is None else bonus.clone()
        beta = beta / (leaf["square"].sqrt() + group["eps"])
    if bonus is not None and not group["correction"]:
        leaf["dual"].add_(bonus)
        bonus = None
    v = leaf["dual"] if bonus is None else leaf["dual"] + bonus
    return leaf["start"] - beta * v, beta, bonus


def _settle_(leaf: dict[str, Any], w: Tensor, beta: Tensor | float, bonus: Tensor | None, group: Mapping[str, Any]) -> None:
    # Greedy projection: as if the sum had led to w itself. A step of length 0 leaves the sum alone.
    if group["greedy"] and (isinstance(beta, Tensor) or beta > 0):
        dual = (leaf["start"] - w) / beta
        leaf["dual"] = dual if bonus is None else dual - bonus
