"""Meta-gradients at adapted meta-parameters: learn a rule that a few meta-steps turn into a good one (M-L2O)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.metagrads.unrolled import Unrolled
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.tree import Tree, detach, tree_map

__all__ = ["Adapted"]


@final
class Adapted(MetaGradient):
    """The gradient of the meta-loss **after** ``steps`` meta-steps of adaptation (Yang et al.: *M-L2O*, ICLR 2023, Eq. 5).

    .. math:: \\nabla_\\phi\\, L'(\\phi_K(\\phi)), \\qquad \\phi_0 = \\phi,\\quad \\phi_{k+1} = \\phi_k + u(\\nabla L_k(\\phi_k)) .

    Each :math:`L_k` is the objective of one window of ``inner``. Which windows these are, and where :math:`L'` is taken:

    - ``"same"``: all of them are the episode's present window, as MAML has it;
    - ``"next"``: consecutive windows, with :math:`L'` on the one after them, as in the published code (there ``steps`` is 1);
    - ``"start"``: consecutive windows from a fresh start of the problems, or of new ones from ``family``; :math:`L'` is on the
      episode's present window. This is what is done with the rule later on: it adapts on the beginning of some
      problems and then serves on others.

    Iterates at the start of a window are constants. The episode goes on by one window of the **unadapted** rule; the loss is
    the adapted one's.

    With the paper's step size of 0.001 the inner step changes next to nothing: the estimate is then that of ``inner``, up to a
    small angle. Plain meta-training with ``inner`` is what the paper calls transfer learning.

    Args:
        inner: the meta-gradient of a window; with ``first_order=False`` an :class:`Unrolled` of one window with exact gradients.
        optimizer: makes the inner meta-steps, with fresh state: any rule that is not sized per parameter, such as
            ``rules.GradientDescent(0.001)``, as in the paper, or ``rules.Adam(0.001)``, which is what adapts later on.
        steps: meta-steps of adaptation :math:`K`.
        windows: see above.
        first_order: take the gradient at :math:`\\phi_K` as that of :math:`\\phi`: the adaptation's own derivative, which needs
            third derivatives of the problem in all, is left out. Works with any ``inner``.
        family: problems to adapt on, for ``"start"``: new ones at every estimate, as many as the episode has.
        together: problems that share one adapted :math:`\\phi_K`; all by default, 1 for each its own.
        seed: of the problems from ``family``.

    Raises:
        ValueError: for steps below 1, an ``inner`` that cannot be differentiated, or a family without ``windows="start"``.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.Lasso(), lmo.rules.RNNprop(hidden=4)
    >>> metagrad = Adapted(lmo.Unrolled(5), lmo.rules.GradientDescent(0.001), windows="next")
    >>> estimate = metagrad(rule, lmo.episode.start(rule, family.draw(seed=0, size=4)), lmo.objectives.SumLoss())
    >>> estimate.episode.step
    5
    """

    def __init__(
        self,
        inner: MetaGradient,
        optimizer: Rule,
        steps: int = 1,
        windows: Literal["same", "next", "start"] = "next",
        first_order: bool = False,
        family: TaskFamily | None = None,
        together: int | None = None,
        seed: int = 0,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; without adaptation use the inner meta-gradient itself")
        if windows not in ("same", "next", "start"):
            raise ValueError(f"windows must be 'same', 'next' or 'start', got {windows!r}")
        if family is not None and windows != "start":
            raise ValueError(f"problems of a family are adapted on from their start: pass windows='start', not {windows!r}")
        if together is not None and together < 1:
            raise ValueError(f"together must be at least 1, or None for all problems, got {together}")
        if optimizer.shapes is not None:
            raise ValueError(f"the optimizer must fit any meta-parameters; {type(optimizer).__name__} is sized per parameter")
        exact = isinstance(inner, Unrolled) and inner.window == inner.steps and not inner.first_order and inner.checkpoint is None
        if not first_order and not exact:
            raise ValueError(
                "the derivative of the adaptation needs inner=Unrolled(steps) with one window, without checkpoints, and exact; "
                "use that, or pass first_order=True"
            )
        self.inner, self.optimizer, self.steps, self.windows = inner, optimizer, steps, windows
        self.first_order, self.family, self.together, self.seed = first_order, family, together, seed
        self._drawn = 0

    @property
    def exact_of(self) -> str:
        held = ", the adaptation held constant" if self.first_order else ""
        return f"after {self.steps} meta-steps on windows {self.windows!r}{held}: {self.inner.exact_of}"

    @property
    def inner_steps(self) -> int:
        return self.inner.inner_steps

    @property
    def gradient_evaluations(self) -> int:
        # Each adaptation's gradient is differentiated once more, at about twice its cost.
        once = self.inner.gradient_evaluations
        return once * (1 + self.steps * (1 if self.first_order else 3)) + self.inner.inner_steps

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        episode = episode.detach()
        size = self.together or episode.size
        fresh = self._fresh(rule, episode)
        loss = next(iter(episode.params.values())).new_zeros(())
        total = {name: torch.zeros_like(value) for name, value in rule.named_parameters()}
        moved = 0.0
        for begin in range(0, episode.size, size):
            part = slice(begin, begin + size)
            now, own = episode.select(part), None if fresh is None else fresh.select(part)
            value, grads, change = self._differentiate(rule, now, own, objective)
            loss = loss + value * (now.size / episode.size)
            total = {name: leaf + grads[name] * (now.size / episode.size) for name, leaf in total.items()}
            moved = max(moved, change)
        with torch.no_grad():
            after = unroll(rule, episode, self.inner_steps)[0]
        if fresh is not None and self.family is not None:
            self._drawn += 1
        return Estimate(loss, detach(total), after.detach(), {"adaptation": moved})

    def _fresh(self, rule: Rule, episode: Episode) -> Episode | None:
        if self.windows != "start":
            return None
        if self.family is not None:
            device = next(iter(episode.params.values())).device
            return start(rule, self.family.draw(self.seed + self._drawn, episode.size).to(device))
        if not episode.origin:
            raise ValueError("the episode does not know where it began; start it with lightning_metaopt.episode.start")
        # The problems' own buffers at the start are not kept, so this is for problems without.
        if episode.buffers:
            raise ValueError("problems with buffers cannot be started again; pass family= for windows='start'")
        return replace(episode, params=episode.origin, state=rule.init(episode.origin), step=0, history={})

    def _differentiate(
        self, rule: Rule, episode: Episode, fresh: Episode | None, objective: Objective
    ) -> tuple[Tensor, Tree, float]:
        phi = {name: value.detach().requires_grad_() for name, value in rule.named_parameters()}
        current: Tree = dict(phi)
        axis = {name: value.detach().unsqueeze(0) for name, value in phi.items()}
        state = _constants(self.optimizer.init(axis))
        window = episode if fresh is None else fresh
        with torch.enable_grad():
            for _ in range(self.steps):
                grads, end = self._gradient(rule, window, objective, current)
                batched = {name: grad.unsqueeze(0) for name, grad in grads.items()}
                values = {name: value.unsqueeze(0) for name, value in current.items()}
                updates, state = self.optimizer(batched, state, values)
                current = {name: value + updates[name].squeeze(0) for name, value in current.items()}
                if self.first_order:
                    current, state = tree_map(lambda leaf: leaf.detach().requires_grad_(), current), _constants(state)
                if self.windows != "same":
                    window = end
            last = window if self.windows == "next" else episode
            change = torch.stack([(current[name] - value).detach().norm() for name, value in phi.items()]).norm()
            if self.first_order:
                found = under(rule, current, lambda bound: self.inner(bound, last, objective))
                return found.loss, found.grads, float(change)
            value, _ = self._value(rule, last, objective, current)
            return value.detach(), detach(_derivative(value, phi, False)), float(change)

    def _gradient(self, rule: Rule, window: Episode, objective: Objective, phi: Tree) -> tuple[Tree, Episode]:
        # Of one window's objective with respect to phi, and the episode after it.
        if self.first_order:
            found = under(rule, phi, lambda bound: self.inner(bound, window, objective))
            return detach(found.grads), found.episode.detach()
        value, end = self._value(rule, window, objective, phi)
        return _derivative(value, phi, True), end.detach()

    def _value(self, rule: Rule, window: Episode, objective: Objective, phi: Tree) -> tuple[Tensor, Episode]:
        end, losses = unroll(rule, window, self.inner_steps, phi, order="second")
        return under(rule, phi, lambda bound: objective(bound, window, end, losses)).mean(), end

    def state_dict(self) -> dict[str, Any]:
        inner = self.inner.state_dict()
        return ({"drawn": self._drawn} if self.family is not None else {}) | ({"inner": inner} if inner else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = int(state.get("drawn", 0))
        self.inner.load_state_dict(state.get("inner", {}))


def _constants(state: State) -> State:
    return {slot: detach(tree) for slot, tree in state.items()}


def _derivative(value: Tensor, phi: Tree, graph: bool) -> Tree:
    if not value.requires_grad:  # nothing that the rule did reached the objective
        return tree_map(torch.zeros_like, phi)
    found = torch.autograd.grad(value, list(phi.values()), create_graph=graph, allow_unused=True, materialize_grads=True)
    return dict(zip(phi, found, strict=True))
