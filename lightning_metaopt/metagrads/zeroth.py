"""Evolution strategies: meta-gradients from forward passes only."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.tree import Tree, tree_map

__all__ = ["ZerothOrder"]

PREFIX = "particles/"  # of the slots of Episode.history that hold the particles


@final
class ZerothOrder(MetaGradient):
    """Antithetic evolution strategies over ``steps`` inner steps, and their persistent form for long unrolls.

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

    Args:
        steps: inner steps of one estimate, ``T``.
        pairs: number of antithetic pairs ``P``; 1 is the two-point estimate. The variance falls as ``1 / P`` and grows
            with the number of meta-parameters.
        sigma: standard deviation of the perturbations, in units of the meta-parameters.
        persistent: use persistent evolution strategies.
        seed: of the directions.

    Raises:
        ValueError: for a number of steps or pairs below 1 or a ``sigma`` that is not positive.

    The loss that is returned, and the episode that goes on, are those of the unperturbed rule.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientDescent(lr=0.01)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=4))
    >>> estimate = ZerothOrder(steps=5)(rule, episode, lmo.objectives.FinalLoss())
    >>> bool(estimate.grads["log_lr"] < 0), estimate.episode.step  # a larger step would have been better
    (True, 5)
    """

    def __init__(self, steps: int = 1, pairs: int = 8, sigma: float = 0.01, persistent: bool = False, seed: int = 0) -> None:
        if steps < 1 or pairs < 1:
            raise ValueError(f"steps and pairs must be at least 1, got {steps} and {pairs}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.steps = steps
        self.pairs = pairs
        self.sigma = sigma
        self.persistent = persistent
        self.seed = seed
        self._calls = 0

    @property
    def exact_of(self) -> str:
        through = "all windows since the episode began" if self.persistent else f"{self.steps} steps"
        return f"an unbiased estimate: the objective over {through}, smoothed by a Gaussian of width {self.sigma}"

    @property
    def inner_steps(self) -> int:
        return self.steps

    @property
    def gradient_evaluations(self) -> int:
        """Two unrolls for each pair and one of the unperturbed rule, each with the evaluation of its objective."""
        return (2 * self.pairs + 1) * (self.steps + 1)

    @torch.no_grad()
    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        phi = {name: parameter.detach() for name, parameter in rule.named_parameters()}
        particles = episode.history if self.persistent and episode.step > 0 else {}
        history = {slot: tree for slot, tree in episode.history.items() if not slot.startswith(PREFIX)}
        episode = replace(episode.detach(), history={})
        loss, end = self._run(rule, episode, objective, phi)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self._calls}").getrandbits(63))
        self._calls += 1
        grads = tree_map(torch.zeros_like, phi)
        for pair in range(self.pairs):
            direction = tree_map(lambda value: torch.randn(value.shape, generator=generator).to(value), phi)
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
            weight = (values[0] - values[1]) / (2 * self.sigma * self.pairs)
            grads = {name: grad + weight * total[name] for name, grad in grads.items()}
        return Estimate(loss, grads, replace(end, history=history), {"sigma": self.sigma, "particles": 2.0 * self.pairs})

    def _run(self, rule: Rule, begin: Episode, objective: Objective, phi: Tree) -> tuple[Tensor, Episode]:
        end, losses = unroll(rule, begin, self.steps, phi)
        return under(rule, phi, lambda bound: objective(bound, begin, end, losses)).mean(), end

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls = state["calls"]


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
