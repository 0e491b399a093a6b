"""Rules: update rules whose hyper-parameters can be learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_metaopt.tree import Tree, escape, unescape

__all__ = ["Rule", "State", "Tape", "per_parameter", "under"]

State = dict[str, Tree]
"""Slots of a rule (``"momentum"``, ``"step"``) to trees with one leaf ``(B, ...)`` for each parameter."""

T = TypeVar("T")


class Rule(nn.Module, ABC):
    """An update rule :math:`\\theta_{t+1} = \\theta_t + u(g_t, s_t, \\theta_t; \\phi)`; **its parameters are the
    meta-parameters** :math:`\\phi`.

    One definition serves both uses: :func:`~lightning_metaopt.episode.unroll` differentiates through :meth:`forward`,
    :class:`~lightning_metaopt.LearnedOptimizer` runs it in place.

    A subclass is final. It implements :meth:`forward`, :attr:`config`, and, if it has state, :meth:`init`; it may
    override :meth:`forward_`, :meth:`project_` and :meth:`describe`.
    """

    joint: bool = False
    """True (of a class, or of one rule) if the update of one parameter needs the gradients of all others, recorded in
    :attr:`shapes` (a full matrix). An optimizer then fills in zeros for missing gradients instead of leaving the parameter out."""

    elementwise: bool = False
    """True (of a class, or of one rule) if a coordinate's update depends on that coordinate alone and every leaf of the state
    has the shape of its parameter. The inner loop hands such a rule a problem that is alone without the axis of problems."""

    _held: dict[str, Tree] | None = None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """Names and shapes of the parameters that the rule was sized for; ``None`` if it fits any network."""
        return None

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> Self:
        """A rule sized for the trainable parameters of ``module`` (only for rules that take ``shapes``)."""
        return cls(shapes={name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}, **options)

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild a rule of the same size (the values of phi are stored apart)."""

    def init(self, params: Tree) -> State:
        """State before the first step, for parameters with leaves ``(B, *shape)``; by default none."""
        return {}

    @abstractmethod
    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        """One step, pure: no argument and no attribute is changed.

        Args:
            grads: gradients, leaves ``(B, *shape)``.
            state: as returned by :meth:`init` or by the step before.
            params: current parameters, leaves ``(B, *shape)``.
            loss: losses at ``params``, shape ``(B,)``, where known.

        Returns:
            ``(updates, state)``: the updates are **added** to the parameters.
        """

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        """One step in place, for deployment: change ``params`` and ``state``, multiplying each update by ``scale[name]``.

        This default calls :meth:`forward`. A rule may override it with fused passes over memory; a contract test holds
        the two to 1e-6 relative. It runs without autograd. It must keep parameters and state finite whenever state and
        gradients are and the squares of the gradients sum to a finite number: an optimizer runs it in that case only, and
        does not look at its updates.
        """
        updates, new = self(grads, state, params, loss)
        for slot, tree in new.items():
            for name, leaf in tree.items():
                state[slot][name].copy_(leaf)
        for name, update in updates.items():
            params[name].add_(update, alpha=1.0 if scale is None else scale[name])

    def tape(self, state: State, second: bool) -> Tape | None:
        """Steps from ``state`` that know their derivative, or ``None`` (the default), if only autograd does.

        Args:
            state: before the first step.
            second: differentiate gradients too, as functions of the iterates; otherwise they are constants.
        """
        return None

    def once(self, key: str, compute: Callable[[], Tree]) -> Tree:
        """``compute()``, for quantities of phi alone such as :math:`1/\\Lambda^2`: within an unroll they are computed, and
        differentiated, one time instead of at every step. ``key`` names them within the rule.
        """
        if self._held is None:
            return compute()
        if key not in self._held:
            self._held[key] = compute()
        return self._held[key]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, phi does not change: what :meth:`once` computes is kept, by this rule and by those that it wraps."""
        rules = [part for part in self.modules() if isinstance(part, Rule)]
        before = [rule._held for rule in rules]
        for rule in rules:
            rule._held = {}
        try:
            yield
        finally:
            for rule, held in zip(rules, before, strict=True):
                rule._held = held

    def project_(self) -> None:
        """Bring phi back into its domain; called after every meta-step. By default nothing."""

    def describe(self) -> dict[str, float]:
        """What the rule has learned, in the field's units (step sizes, momentum), for logs. By default the mean of
        every meta-parameter.
        """
        return {unescape(name): float(value.detach().float().mean()) for name, value in self.named_parameters()}


class Tape(ABC):
    """Steps of a rule whose derivative is written by hand: a window of them is differentiated without a graph, or with
    one of no more than each gradient. Updates must not depend on the parameters or the loss but through gradients.
    """

    @abstractmethod
    def step(self, grads: Tree, params: Tree) -> Tree:
        """Updates, as from :meth:`Rule.forward`; no autograd around it. In second order ``grads`` have a graph that begins at
        the leaves ``params``.
        """

    @property
    @abstractmethod
    def state(self) -> State:
        """The rule's state after the last step."""

    @abstractmethod
    def begin_backward(self, state: State) -> None:
        """From here on back, with the derivatives of a number with respect to :attr:`state`; slots that it does not depend on are
        missing.
        """

    @abstractmethod
    def backward(self, updates: Tree) -> Tree:
        """Over the last S steps that are left, from derivatives with respect to their updates, leaves ``(S, B, *shape)``, to what
        they add, by way of gradients, to those with respect to the parameters before them: nothing in first order. In second
        order S is 1: what is added there belongs to the updates of the step before.
        """

    @abstractmethod
    def grads(self) -> Tree:
        """Derivatives with respect to phi, by name, of all steps that :meth:`backward` went over."""


def per_parameter(shapes: Mapping[str, Sequence[int]], fill: float | Callable[[tuple[int, ...]], Tensor]) -> nn.ParameterDict:
    """One meta-parameter tensor for each parameter of the network, under its escaped name.

    >>> per_parameter({"net.weight": (2, 2)}, 0.5)["net|weight"].shape
    torch.Size([2, 2])
    """
    if not shapes:
        raise ValueError("a rule that is sized per parameter needs at least one parameter; pass shapes={name: shape}")
    make = fill if callable(fill) else lambda shape: torch.full(shape, float(fill))
    return nn.ParameterDict({escape(name): nn.Parameter(make(tuple(shape))) for name, shape in shapes.items()})


class _Bound(nn.Module):
    """Lets ``functional_call`` replace the rule's parameters for a whole computation rather than for one call."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, compute: Callable[[Rule], Any]) -> Any:
        return compute(self.rule)


def under(rule: Rule, phi: Mapping[str, Tensor] | None, compute: Callable[[Rule], T]) -> T:
    """``compute(rule)`` with the meta-parameters ``phi`` (by name) in place of the rule's own; ``None`` keeps those."""
    if phi is None:
        return compute(rule)
    result: T = functional_call(_Bound(rule), {f"rule.{name}": value for name, value in phi.items()}, (compute,))
    return result
