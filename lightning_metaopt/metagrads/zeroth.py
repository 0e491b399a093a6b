"""Evolution strategies and bandit feedback: meta-gradients from forward passes only."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.tree import Tree, norm, tree_map

__all__ = ["ZerothOrder"]

PREFIX = "particles/"  # of the slots of Episode.history that hold the particles
DIRECTION = "direction/"  # of those that hold the latest directions of bandit feedback, 0 the newest


@final
class ZerothOrder(MetaGradient):
    """Antithetic evolution strategies over ``steps`` inner steps, their persistent form for long unrolls, and bandit feedback.

    With the objective :math:`L` of a window and ``pairs`` directions :math:`\\epsilon_i \\sim N(0, I)`,

    .. math:: \\hat g = \\frac1P \\sum_{i} \\frac{L(\\phi+\\sigma\\epsilon_i) - L(\\phi-\\sigma\\epsilon_i)}{2\\sigma}\\,\\xi_i .

    Evolution strategies take :math:`\\xi_i = \\epsilon_i`: an unbiased estimate of the gradient of the smoothed objective
    :math:`E\\,L(\\phi + \\sigma\\epsilon)` of *this window*, which treats the iterates at its start as constants.
    Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021, Algorithm 2) run an own episode for each
    perturbed :math:`\\phi` from window to window, and take for :math:`\\xi_i` the sum of all directions since that episode
    began: unbiased for the smoothed sum of the objectives of *all* windows, without the bias of truncation.

    The particles travel with the episode, in ``episode.history``: leaves ``(B, ...)``, ``2 * pairs`` times the memory of
    the episode; the sums :math:`\\xi_i` are the same for all problems and expanded along their axis. They start anew when
    the episode does. Every process draws the same directions, so the estimate does not depend on the number of processes.

    With ``pairs=0`` the **perturbed rule itself is played**, once, and one number is all that is learned from it (*Nonconvex
    Meta-optimization for Deep Learning*, Algorithm 6; Gradu, Hallman, Hazan 2020):

    .. math:: \\hat g_t = \\frac{d}{\\sigma}\\, \\bigl(L_t - b\\bigr) \\sum_{i=0}^{m-1} u_{t-i}, \\qquad
              \\phi_{t+1} = \\Pi\\,[\\phi_t - \\eta_t\\,\\hat g_{t-\\tau}]

    with :math:`d` meta-parameters and directions :math:`u` on the unit sphere (or, without the factor :math:`d`, normal ones):
    the loss remembers the last :math:`m` directions, so that their sum is what it is an estimate for. The estimate is 0 until the
    episode has had :math:`m`. Algorithm 6 is ``memory=L, delay=L-1, noise="sphere"``, with the projection in the rule's
    ``project_``. Algorithm 5 is the same with a rule that controls (``rules.DisturbanceFeedback``). It prints
    :math:`\\sum_{l=1}^L \\epsilon_{s-l}` for the loss *before* the step of :math:`\\epsilon_s`, which is the sum over the last
    :math:`L` directions after a step, and updates with :math:`g_{s-L}`: in our order ``delay=L+1``, where the theory of Algorithm
    6 asks for :math:`L-1` only.

    Args:
        steps: inner steps of one estimate, ``T``.
        pairs: number of antithetic pairs ``P``; 1 is the two-point estimate, 0 the one-point estimate of bandit feedback. The
            variance falls as ``1 / P`` and grows with the number of meta-parameters.
        sigma: size of the perturbations, in units of the meta-parameters: the standard deviation of normal ones, the radius on the
            sphere.
        persistent: use persistent evolution strategies.
        seed: of the directions.
        noise: ``"normal"``, or ``"sphere"`` for directions on the unit sphere of all meta-parameters together.
        memory: bandit feedback only: for how many estimates a direction counts, :math:`m`.
        delay: how many estimates later each is handed out, :math:`\\tau`; the first ones are 0.
        baseline: bandit feedback only: subtract :math:`b`, a running mean of the objective at the same step of earlier episodes,
            with this weight on the past (0.9, say). The expectation stays as it is; the first episode only fills the mean.
            ``None`` as in the paper.

    Raises:
        ValueError: for numbers out of range, and for options of bandit feedback with pairs or persistent without.

    The loss that is returned, and the episode that goes on, are those of the unperturbed rule; with bandit feedback, where it is
    never run, of the perturbed one. Estimates that wait and running means are part of ``state_dict``, directions of the episode.
    Each process waits for its own; a checkpoint holds those of the first.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientDescent(lr=0.01)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=4))
    >>> estimate = ZerothOrder(steps=5)(rule, episode, lmo.objectives.FinalLoss())
    >>> bool(estimate.grads["log_lr"] < 0), estimate.episode.step  # a larger step would have been better
    (True, 5)
    """

    def __init__(
        self,
        steps: int = 1,
        pairs: int = 8,
        sigma: float = 0.01,
        persistent: bool = False,
        seed: int = 0,
        noise: Literal["normal", "sphere"] = "normal",
        memory: int = 1,
        delay: int = 0,
        baseline: float | None = None,
    ) -> None:
        if steps < 1 or pairs < 0 or memory < 1 or delay < 0:
            raise ValueError(
                f"steps and memory must be at least 1, pairs and delay at least 0, got {steps}, {memory}, {pairs} and {delay}"
            )
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if noise not in ("normal", "sphere"):
            raise ValueError(f"noise must be 'normal' or 'sphere', got {noise!r}")
        if pairs and (memory > 1 or baseline is not None):
            raise ValueError("memory and baseline belong to bandit feedback: pass pairs=0, or leave them out")
        if persistent and not pairs:
            raise ValueError("persistent needs pairs of at least 1; bandit feedback (pairs=0) has memory=... instead")
        if baseline is not None and not 0 <= baseline < 1:
            raise ValueError(f"baseline must be a weight in [0, 1), got {baseline}")
        self.steps = steps
        self.pairs = pairs
        self.sigma = sigma
        self.persistent = persistent
        self.seed = seed
        self.noise = noise
        self.memory = memory
        self.delay = delay
        self.baseline = baseline
        self._calls = 0
        self._waiting: list[Tree] = []  # the oldest first
        self._means: dict[int, float] = {}  # of the objective, by step of the episode

    @property
    def exact_of(self) -> str:
        through = "all windows since the episode began" if self.persistent else f"{self.steps} steps"
        if not self.pairs:
            through = f"the last {self.memory} windows of {self.steps} steps"
        shape = "a Gaussian of width" if self.noise == "normal" else "a ball of radius"
        late = f", {self.delay} estimates ago" if self.delay else ""
        return f"an unbiased estimate: the objective over {through}, smoothed by {shape} {self.sigma}{late}"

    @property
    def inner_steps(self) -> int:
        return self.steps

    @property
    def gradient_evaluations(self) -> int:
        """Two unrolls for each pair and one of the unperturbed rule, or the one that is played, each with its objective."""
        return (2 * self.pairs + 1) * (self.steps + 1)

    @torch.no_grad()
    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        phi = {name: parameter.detach() for name, parameter in rule.named_parameters()}
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self._calls}").getrandbits(63))
        self._calls += 1
        found = (self._pairs if self.pairs else self._played)(rule, episode, objective, phi, generator)
        self._waiting.append(found.grads)
        grads = self._waiting.pop(0) if len(self._waiting) > self.delay else tree_map(torch.zeros_like, phi)
        return replace(found, grads={name: grad.to(phi[name]) for name, grad in grads.items()})

    def _pairs(self, rule: Rule, episode: Episode, objective: Objective, phi: Tree, generator: torch.Generator) -> Estimate:
        particles = episode.history if self.persistent and episode.step > 0 else {}
        history = {slot: tree for slot, tree in episode.history.items() if not slot.startswith(PREFIX)}
        episode = replace(episode.detach(), history={})
        loss, end = self._run(rule, episode, objective, phi)
        grads = tree_map(torch.zeros_like, phi)
        for pair in range(self.pairs):
            direction = self._direction(phi, generator)
            values = []
            for sign in (1, -1):
                slot = f"{PREFIX}{pair}{sign:+d}/"
                begin = _unpack(particles, slot, episode)
                shifted = {name: value + sign * self.sigma * direction[name] for name, value in phi.items()}
                value, reached = self._run(rule, begin, objective, shifted)
                values.append(value)
                if self.persistent:
                    history.update(_pack(reached, slot))
            slot = f"{PREFIX}{pair}/sum"
            total = {name: value + particles[slot][name][0] for name, value in direction.items()} if particles else direction
            if self.persistent:
                history[slot] = {name: value.expand(episode.size, *value.shape) for name, value in total.items()}
            weight = self._dimension(phi) * (values[0] - values[1]) / (2 * self.sigma * self.pairs)
            grads = {name: grad + weight * total[name] for name, grad in grads.items()}
        return Estimate(loss, grads, replace(end, history=history), {"sigma": self.sigma, "particles": 2.0 * self.pairs})

    def _played(self, rule: Rule, episode: Episode, objective: Objective, phi: Tree, generator: torch.Generator) -> Estimate:
        history = {slot: tree for slot, tree in episode.history.items() if not slot.startswith(DIRECTION)}
        direction = self._direction(phi, generator)
        earlier = [episode.history[f"{DIRECTION}{age}"] for age in range(self.memory) if f"{DIRECTION}{age}" in episode.history]
        directions = [{name: value.expand(episode.size, *value.shape) for name, value in direction.items()}, *earlier][
            : self.memory
        ]
        history.update({f"{DIRECTION}{age}": tree for age, tree in enumerate(directions)})
        begin = replace(episode.detach(), history={})
        shifted = {name: value + self.sigma * direction[name] for name, value in phi.items()}
        loss, end = self._run(rule, begin, objective, shifted)
        weight = self._dimension(phi) / self.sigma * (loss - self._expected(end.step, float(loss)))
        weight = weight if len(directions) == self.memory else torch.zeros_like(weight)
        grads = {name: weight * torch.stack([tree[name][0] for tree in directions]).sum(0) for name in phi}
        return Estimate(loss, grads, replace(end, history=history), {"sigma": self.sigma, "particles": 1.0})

    def _expected(self, step: int, value: float) -> float:
        # The baseline, which must not know the direction that it is compared under: the mean before this value.
        if self.baseline is None:
            return 0.0
        mean = self._means.get(step, value)
        self._means[step] = self.baseline * mean + (1 - self.baseline) * value
        return mean

    def _direction(self, phi: Tree, generator: torch.Generator) -> Tree:
        drawn = tree_map(lambda value: torch.randn(value.shape, generator=generator).to(value), phi)
        if self.noise == "normal":
            return drawn
        length = norm({name: value.reshape(1, -1) for name, value in drawn.items()})[0]
        return tree_map(lambda value: value / length, drawn)

    def _dimension(self, phi: Tree) -> float:
        # What makes the second moment of a direction the identity.
        return float(sum(value.numel() for value in phi.values())) if self.noise == "sphere" else 1.0

    def _run(self, rule: Rule, begin: Episode, objective: Objective, phi: Tree) -> tuple[Tensor, Episode]:
        end, losses = unroll(rule, begin, self.steps, phi)
        return under(rule, phi, lambda bound: objective(bound, begin, end, losses)).mean(), end

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls, "waiting": [dict(tree) for tree in self._waiting], "means": dict(self._means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls = state["calls"]
        self._waiting = [dict(tree) for tree in state["waiting"]]
        self._means = dict(state["means"])


def _pack(episode: Episode, slot: str) -> State:
    # Empty trees too, so that slots do not come and go.
    trees = {"params": episode.params, "buffers": episode.buffers}
    trees.update({f"state/{name}": tree for name, tree in episode.state.items()})
    return {slot + name: tree for name, tree in trees.items()}


def _unpack(particles: Mapping[str, Tree], slot: str, like: Episode) -> Episode:
    if not particles:
        return like
    if slot + "params" not in particles:
        raise ValueError(
            f"the running episode holds no particle {slot!r}: it was run with fewer pairs or another meta-gradient. "
            "Start the episode afresh, or use the same ZerothOrder(pairs=..., persistent=True)"
        )
    state = {name: particles[f"{slot}state/{name}"] for name in like.state}
    return replace(like, params=particles[slot + "params"], buffers=particles[slot + "buffers"], state=state)
