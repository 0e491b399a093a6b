"""A learned rule under guard: where it does not keep what it promises, an ordinary optimizer takes the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules.nested import made, spec
from lightning_metaopt.tree import Tree, expand_to, norm, tree_map

__all__ = ["Safeguarded"]

# What is known of each problem: columns of the slot "guard".
SEEN, LAST, LEVEL, SPREAD, RULED, TRIED, MEAN, SQUARE, BASE, WAIT, PAUSE, TAKEN, RETURNS = range(13)


class _Verdict(NamedTuple):
    back: Tensor  # (B,): the rule's last step is taken back
    rule: Tensor  # (B,): the rule may take this step
    guard: Tensor  # (B, columns), but for which of the two takes the step


@final
class Safeguarded(Rule):
    """The steps of ``rule`` as long as they are worth it, else those of ``fallback``; decided at every step, for every problem.

    Both compute their update :math:`u^r_t, u^f_t` at every step, each with its own state. After a step of the rule the next
    gradient :math:`g` tells, at :math:`\\theta_{t+1} = \\theta_t + u^r_t`, where the fallback would have gone. For a convex loss

    .. math:: f(\\theta_t + u^f_t) - f(\\theta_t + u^r_t) \\ge \\langle g,\\, u^f_t - u^r_t\\rangle,

    so a product of at least 0 certifies that the fallback's step would have been no better. Three things end a trial of the rule:

    - **It jumps**: the loss at :math:`\\theta_{t+1}` (the gradient's norm, if no loss is known) is not finite, or lies above its
      running mean by more than ``jump`` running mean deviations; for a trial's first step it is enough that the loss has risen and
      the product is negative. The step is taken back and the fallback's is made in its place, :math:`\\theta_t + u^f_t`;
      both states stay as they were before the jump.
    - **It loses**: the cosines between :math:`g` and :math:`u^f_t - u^r_t` have a running mean that is below 0 by more than
      ``doubt`` standard errors: for some time already the fallback's steps would have been better, by the gradients of the
      batches that came after them. The fallback goes on from where the rule has led.
    - **It stalls**: over :math:`1/(1 - \\mathrm{memory})` steps the running mean of the loss, where it is known, has not fallen.

    Then the fallback takes 1 step before the rule is tried again, and 2, 4, ... up to ``pause`` after further failures; a rule that
    lasts for :math:`1/(1 - \\mathrm{memory})` steps starts from 1 again. A step more than ``reach`` times as long as the
    fallback's is never tried.

    This is the safeguard of Heaton et al. (accept the learned iterate if a residual stays below a running mean, else apply the
    ordinary operator), in two respects another: theirs computes the residual at a candidate before it accepts, here it is the
    gradient that the next step needs anyway which tells, and a step is taken back; and a test of the residual alone passes
    a rule that goes down more slowly than the fallback.

    What it guarantees: for a convex loss and exact gradients, a step of the rule with a cosine of at least 0 ends no higher than
    the fallback's own step would have; and of :math:`T` steps at most :math:`\\log_2 \\mathrm{pause} + 1 + T/\\mathrm{pause}`
    trials fail in a row, so that a useless rule costs that many steps, or a few times that where noise hides its failure.
    What it does not: whole runs are not compared, only steps from the same point, and momentum or noise can make the
    fallback alone (or the rule alone) the better one; with noise the tests are statistics; losses that are not convex have
    no certificate; without a loss, stalling is found by the gradients alone; and a fallback that diverges does so here.

    Costs: the fallback's update and state beside the rule's, another tensor of the size of the parameters, two more passes over
    them; deployed, for a moment, a copy of them. A step that is taken back costs one gradient.

    Args:
        rule: the learned rule, any.
        fallback: an ordinary optimizer, with a step size that is known to work. Its meta-parameters can be learned too.
        memory: of the running means, in [0, 1).
        jump: deviations, see above; positive.
        doubt: standard errors, see above; at least 0.
        pause: longest time between two trials of the rule, in steps.
        reach: longest step that is tried, in lengths of the fallback's; ``inf`` for any.

    Decisions have no gradient: in meta-training it is the steps taken that are differentiated.

    In a file, ``rule`` and ``fallback`` stand as ``{"class": name, "init": arguments}``.

    Raises:
        ValueError: for a value out of range, two rules sized for different parameters, or a class that is not of this package.

    >>> import lightning_metaopt as lmo
    >>> task = lmo.tasks.Lasso(std=200.0).draw(seed=0, size=8)
    >>> rule = Safeguarded(lmo.rules.RNNprop(), lmo.rules.Adam(lr=0.003))
    >>> end, losses = lmo.episode.unroll(rule, lmo.episode.start(rule, task), 100)
    >>> bool((losses[-1] < 0.2 * losses[0]).all()), bool(rule.usage(end.state)["returns"].sum() > 0)
    (True, True)

    References:
        Heaton, Chen, Wang, Yin: *Safeguarded Learned Convex Optimization*, AAAI 2023 (arXiv:2003.01880).
    """

    def __init__(
        self,
        rule: Rule | Mapping[str, Any],
        fallback: Rule | Mapping[str, Any],
        memory: float = 0.9,
        jump: float = 5.0,
        doubt: float = 1.5,
        pause: int = 64,
        reach: float = 100.0,
    ) -> None:
        super().__init__()
        if not 0 <= memory < 1:
            raise ValueError(f"memory must lie in [0, 1), got {memory}")
        if not jump > 0 or not reach > 0 or not doubt >= 0 or pause < 1:
            raise ValueError(
                f"jump and reach must be positive, doubt at least 0, pause at least 1; got {jump=}, {reach=}, {doubt=}, {pause=}"
            )
        self.rule, self.fallback = made(rule), made(fallback)
        sizes = self.rule.shapes, self.fallback.shapes
        if None not in sizes and dict(sizes[0] or {}) != dict(sizes[1] or {}):
            raise ValueError("rule and fallback are sized for different parameters; make both for the same network")
        self.memory, self.jump, self.doubt, self.pause, self.reach = memory, jump, doubt, pause, reach
        self.joint = self.rule.joint or self.fallback.joint

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        return self.fallback.shapes if self.rule.shapes is None else self.rule.shapes

    @property
    def config(self) -> dict[str, Any]:
        parts = {"rule": spec(self.rule), "fallback": spec(self.fallback)}
        reach = self.reach if self.reach < float("inf") else 1e300  # JSON has no infinity
        return parts | {"memory": self.memory, "jump": self.jump, "doubt": self.doubt, "pause": self.pause, "reach": reach}

    def init(self, params: Tree) -> State:
        state: State = {f"rule.{slot}": tree for slot, tree in self.rule.init(params).items()}
        state |= {f"fallback.{slot}": tree for slot, tree in self.fallback.init(params).items()}
        state["instead"] = tree_map(torch.zeros_like, params)  # the fallback's step less the rule's, where that was taken
        state["guard"] = tree_map(_fresh, params)
        return state

    def usage(self, state: State) -> Tree:
        """Of each problem, shape ``(B,)``: ``share`` of the steps that the rule took, and ``returns``: how many were taken back.

        Deployed, ``state`` is ``{"guard": {"": optimizer.state[parameter]["guard"][None]}}`` with any of the parameters.
        """
        guard = _latest(state["guard"])
        return {"share": (guard[:, TAKEN] - guard[:, RETURNS]) / guard[:, SEEN].clamp_min(1), "returns": guard[:, RETURNS]}

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        verdict = self._judge(grads, state, loss)
        back = {name: expand_to(verdict.back, grad) for name, grad in grads.items()}
        if bool(verdict.back.any()):  # what comes from a jump must reach neither state nor derivatives
            grads = {name: torch.where(back[name], torch.zeros_like(grad), grad) for name, grad in grads.items()}
            loss = None if loss is None else torch.where(verdict.back, torch.zeros_like(loss), loss)
        new: State = {}
        updates = []
        for part, rule in (("rule", self.rule), ("fallback", self.fallback)):
            own = _part(state, part)
            found, after = rule(grads, own, params, loss)
            updates.append(found)
            for slot, tree in after.items():
                new[f"{part}.{slot}"] = {
                    name: torch.where(expand_to(verdict.back, leaf), own[slot][name], leaf) for name, leaf in tree.items()
                }
        with torch.no_grad():
            taken = verdict.rule & self._reached(norm(updates[0]), norm(updates[1]))
        chosen, new["instead"] = {}, {}
        for name, (learned, ordinary) in {name: (updates[0][name], updates[1][name]) for name in grads}.items():
            use = expand_to(taken, learned)
            forth = torch.where(use, learned, ordinary)
            chosen[name] = torch.where(back[name], state["instead"][name], forth)
            new["instead"][name] = torch.where(use, ordinary - learned, torch.zeros_like(learned))
        guard = _decided(verdict.guard, taken, verdict.back)
        new["guard"] = dict.fromkeys(grads, guard)
        return chosen, new

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        verdict = self._judge(grads, state, loss)
        if len(verdict.back) > 1:  # problems that decide differently
            super().forward_(grads, state, params, loss, scale)
            return
        instead = {name: state["instead"][name] for name in grads}
        factor = {name: scale[name] if scale else 1.0 for name in grads}
        taken = torch.zeros_like(verdict.rule)
        if bool(verdict.back):
            for name, leaf in instead.items():
                params[name].add_(leaf, alpha=factor[name])
        else:
            moved = tree_map(torch.clone, {name: params[name] for name in grads})
            self.rule.forward_(grads, _part(state, "rule"), moved, loss)
            for name, leaf in instead.items():
                leaf.copy_(params[name])
            self.fallback.forward_(grads, _part(state, "fallback"), instead, loss)
            if bool(verdict.rule):
                lengths = [norm({name: tree[name] - params[name] for name in grads}) for tree in (moved, instead)]
                taken = self._reached(*lengths)
            for name, leaf in instead.items():
                goal = moved[name] if bool(taken) else leaf
                if factor[name] == 1:
                    params[name].copy_(goal)
                else:
                    params[name].add_(goal - params[name], alpha=factor[name])
                leaf.sub_(moved[name])
        if not bool(taken):
            for leaf in instead.values():
                leaf.zero_()
        guard = _decided(verdict.guard, taken, verdict.back)
        for name in grads:
            state["guard"][name].copy_(guard)

    def project_(self) -> None:
        self.rule.project_()
        self.fallback.project_()

    def describe(self) -> dict[str, float]:
        return self.rule.describe() | {f"fallback_{name}": value for name, value in self.fallback.describe().items()}

    @torch.no_grad()
    def _judge(self, grads: Tree, state: State, loss: Tensor | None) -> _Verdict:
        guard = _latest({name: state["guard"][name] for name in grads})
        length = norm(grads)
        level = (length if loss is None else loss).to(guard.dtype)
        # A parameter that sat out the last steps has an old difference, which must not count.
        kept = {
            name: state["instead"][name] * expand_to((state["guard"][name] == guard).all(1), grad) for name, grad in grads.items()
        }
        products = [(grad * kept[name]).reshape(len(guard), -1).sum(1) for name, grad in grads.items()]
        cosine = torch.stack(products).sum(0) / (length * norm(kept)).clamp_min(torch.finfo(length.dtype).tiny)
        seen, last, mean, spread, ruled, tried, trust, square, base, wait, pause, taken, returns = guard.unbind(1)

        on_trial, span = ruled > 0, math.ceil(1 / (1 - self.memory))
        slack = torch.maximum(self.jump * spread, 0.1 * mean.abs() / seen.clamp_min(1))
        tried = tried + ruled
        worse = (tried == 1) & (level > last) & (cosine < 0)
        back = on_trial & (worse | ~(level <= mean + slack))
        weight = (1 / tried.clamp_min(1)).clamp_min(1 - self.memory)
        cosine = torch.where(on_trial & ~back, cosine.to(guard.dtype), trust)
        trust, square = torch.lerp(trust, cosine, weight), torch.lerp(square, cosine.square(), weight)
        error = ((square - trust.square()).clamp_min(0) / ((2 / weight - 1).minimum(tried) - 1).clamp_min(1)).sqrt()
        losing = on_trial & ~back & (tried >= 2) & (trust < -self.doubt * error)

        usual = ~back & level.isfinite()
        rate = (1 / (seen + 1)).clamp_min(1 - self.memory)
        known = torch.where(seen > 0, (level - mean).abs(), torch.zeros_like(level))
        spread = torch.where(usual, torch.lerp(spread, known, rate), spread)
        mean = torch.where(usual, torch.lerp(mean, level, rate), mean)
        due = on_trial & (tried.remainder(span) == 0)
        if loss is not None:
            losing = losing | (due & ~back & (mean >= base))
        base = torch.where(due | ~on_trial, mean, base)

        over = back | losing
        wait = torch.where(over, pause, wait)
        pause = torch.where(over, (2 * pause).clamp_max(self.pause), torch.where(due, torch.ones_like(pause), pause))
        tried, trust, square = (torch.where(over, torch.zeros_like(value), value) for value in (tried, trust, square))
        last = torch.where(usual, level, last)
        columns = [seen + 1, last, mean, spread, ruled, tried, trust, square, base, wait, pause, taken, returns + back]
        return _Verdict(back, ~back & (wait <= 0), torch.stack(columns, 1))

    def _reached(self, learned: Tensor, ordinary: Tensor) -> Tensor:
        return learned.isfinite() & (learned <= self.reach * ordinary)


def _fresh(leaf: Tensor) -> Tensor:
    guard = leaf.new_zeros(len(leaf), RETURNS + 1, dtype=torch.promote_types(leaf.dtype, torch.float32))
    guard[:, PAUSE] = 1
    return guard


def _latest(guards: Tree) -> Tensor:
    # All parameters hold the same, except those that were left out for some steps.
    return max(guards.values(), key=lambda guard: float(guard[0, SEEN])).detach()


def _decided(guard: Tensor, taken: Tensor, back: Tensor) -> Tensor:
    guard = guard.clone()
    guard[:, WAIT] = torch.where(taken | back, guard[:, WAIT], (guard[:, WAIT] - 1).clamp_min(0))
    guard[:, RULED] = taken.to(guard.dtype)
    guard[:, TAKEN] += taken
    return guard


def _part(state: State, part: str) -> State:
    return {slot.removeprefix(f"{part}."): tree for slot, tree in state.items() if slot.startswith(f"{part}.")}
