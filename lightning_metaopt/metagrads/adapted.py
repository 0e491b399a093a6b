"""Meta-gradients at adapted meta-parameters: learn a rule that a few meta-steps turn into a good one (M-L2O)."""

from __future__ import annotations

from collections.abc import Sequence
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

    Iterates at the start of a window are constants. The episode goes on by one window of the **unadapted** rule, unless
    ``advance="adapted"``; the loss is the adapted one's.

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
        only: names of the meta-parameters that adapt, such as ``["log_scale"]`` (ANIL, Raghu et al. 2020); all by default.
        every: adapt where an episode begins and at every so many estimates from there; those between add the last
            :math:`\\phi_K - \\phi` to the present :math:`\\phi`, which saves most of the time. For ``windows="start"``, first
            order and all problems together.
        advance: whose steps the episode goes on by, ``"unadapted"`` or ``"adapted"``: with the latter, later windows begin where
            the adapted rule gets to, as they do when it serves.

    Raises:
        ValueError: for steps below 1, an ``inner`` that cannot be differentiated, a family without ``windows="start"``, or
            ``every`` where it has no meaning; when called, for names in ``only`` that the rule does not have.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.Lasso(), lmo.rules.RNNprop(hidden=4)
    >>> metagrad = Adapted(lmo.Unrolled(5), lmo.rules.GradientDescent(0.001), windows="next")
    >>> estimate = metagrad(rule, lmo.episode.start(rule, family.draw(seed=0, size=4)), lmo.objectives.SumLoss())
    >>> estimate.episode.step
    5

    The form that imitates deployment: the output scale alone adapts, on new problems, at every fourth estimate:

    >>> rule = lmo.rules.RNNprop(hidden=4, learn_scale=True)
    >>> metagrad = Adapted(
    ...     lmo.Unrolled(5), lmo.rules.Adam(0.1), steps=3, windows="start", first_order=True, family=family, only=["log_scale"],
    ...     every=4, advance="adapted",
    ... )
    >>> estimate = metagrad(rule, lmo.episode.start(rule, family.draw(seed=0, size=4)), lmo.objectives.SumLoss())
    >>> estimate.grads["log_scale"].shape
    torch.Size([])
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
        only: Sequence[str] | None = None,
        every: int = 1,
        advance: Literal["unadapted", "adapted"] = "unadapted",
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
        if every < 1 or (every > 1 and not (windows == "start" and first_order and together is None)):
            raise ValueError(f"every={every} needs windows='start', first_order=True and together=None, and must be at least 1")
        if advance not in ("unadapted", "adapted") or (advance == "adapted" and windows == "next"):
            raise ValueError(f"advance must be 'unadapted' or, for other windows than 'next', 'adapted'; got {advance!r}")
        self.inner, self.optimizer, self.steps, self.windows = inner, optimizer, steps, windows
        self.first_order, self.family, self.together, self.seed = first_order, family, together, seed
        self.only, self.every, self.advance = None if only is None else tuple(only), every, advance
        self._drawn = self._calls = 0
        self._change: Tree = {}

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
        adaptation = once * self.steps * (1 if self.first_order else 3) // self.every
        return once + adaptation + self.inner.inner_steps * (self.advance == "unadapted")

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        episode = episode.detach()
        size = self.together or episode.size
        if episode.step == 0:  # other problems may begin here
            self._calls = 0
        again = self._calls % self.every == 0
        fresh = self._fresh(rule, episode) if again else None
        loss = next(iter(episode.params.values())).new_zeros(())
        total = {name: torch.zeros_like(value) for name, value in rule.named_parameters()}
        moved, ends = 0.0, []
        for begin in range(0, episode.size, size):
            part = slice(begin, begin + size)
            now, own = episode.select(part), None if fresh is None else fresh.select(part)
            found = self._differentiate(rule, now, own, objective) if again else self._held(rule, now, objective)
            loss = loss + found.loss * (now.size / episode.size)
            total = {name: leaf + found.grads[name] * (now.size / episode.size) for name, leaf in total.items()}
            moved = max(moved, found.info["adaptation"])
            ends.append(found.episode.detach())
        if self.advance == "unadapted":
            with torch.no_grad():
                ends = [unroll(rule, episode, self.inner_steps)[0].detach()]
        after = replace(Episode.join(ends), task=episode.task, origin=episode.origin)
        if fresh is not None and self.family is not None:
            self._drawn += 1
        self._calls = (self._calls + 1) % self.every
        return Estimate(loss, detach(total), after, {"adaptation": moved})

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

    def _differentiate(self, rule: Rule, episode: Episode, fresh: Episode | None, objective: Objective) -> Estimate:
        phi = {name: value.detach().requires_grad_() for name, value in rule.named_parameters()}
        current: Tree = dict(phi)
        moving = self._moving(phi)
        axis = {name: phi[name].detach().unsqueeze(0) for name in moving}
        state = _constants(self.optimizer.init(axis))
        window = episode if fresh is None else fresh
        with torch.enable_grad():
            for _ in range(self.steps):
                grads, end = self._gradient(rule, window, objective, current)
                batched = {name: grads[name].unsqueeze(0) for name in moving}
                values = {name: current[name].unsqueeze(0) for name in moving}
                updates, state = self.optimizer(batched, state, values)
                current = current | {name: current[name] + updates[name].squeeze(0) for name in moving}
                if self.first_order:
                    current, state = tree_map(lambda leaf: leaf.detach().requires_grad_(), current), _constants(state)
                if self.windows != "same":
                    window = end
            last = window if self.windows == "next" else episode
            change = {name: (current[name] - phi[name]).detach() for name in moving}
            if self.every > 1:
                self._change = change
            if self.first_order:
                return self._outer(rule, last, objective, current, change)
            value, end = self._value(rule, last, objective, current)
            return Estimate(value.detach(), detach(_derivative(value, phi, False)), end, {"adaptation": _length(change)})

    def _outer(self, rule: Rule, episode: Episode, objective: Objective, phi: Tree, change: Tree) -> Estimate:
        found = under(rule, phi, lambda bound: self.inner(bound, episode, objective))
        return replace(found, info={"adaptation": _length(change)})

    def _held(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        # The change of an earlier estimate, added to what the rule has become since.
        phi = {name: value.detach() for name, value in rule.named_parameters()}
        moved = phi | {name: phi[name] + change.to(phi[name].device) for name, change in self._change.items()}
        return self._outer(rule, episode, objective, tree_map(lambda leaf: leaf.clone().requires_grad_(), moved), self._change)

    def _moving(self, phi: Tree) -> Sequence[str]:
        unknown = [name for name in self.only or () if name not in phi]
        if unknown:
            raise ValueError(f"the rule has no meta-parameter {', '.join(unknown)} to adapt; it has {', '.join(phi)}")
        return list(phi) if self.only is None else self.only

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
        held = {"calls": self._calls, "change": dict(self._change)} if self.every > 1 else {}
        return ({"drawn": self._drawn} if self.family is not None else {}) | held | ({"inner": inner} if inner else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self._calls = int(state.get("drawn", 0)), int(state.get("calls", 0))
        self._change = dict(state.get("change", {}))
        self.inner.load_state_dict(state.get("inner", {}))


def _constants(state: State) -> State:
    return {slot: detach(tree) for slot, tree in state.items()}


def _length(change: Tree) -> float:
    return float(torch.stack([leaf.norm() for leaf in change.values()]).norm())


def _derivative(value: Tensor, phi: Tree, graph: bool) -> Tree:
    if not value.requires_grad:  # nothing that the rule did reached the objective
        return tree_map(torch.zeros_like, phi)
    found = torch.autograd.grad(value, list(phi.values()), create_graph=graph, allow_unused=True, materialize_grads=True)
    return dict(zip(phi, found, strict=True))
