"""Reverse mode through the unrolled inner loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, Order, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.metagrads.taped import taped_window
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State
from lightning_metaopt.tree import Tree, detach, tree_map

__all__ = ["Unrolled"]

Part = tuple[float, Tensor, Tree, Episode]
"""A share of the mean: its weight, loss, gradient, and the episode after it."""


@final
class Unrolled(MetaGradient):
    """Back-propagation through ``steps`` inner steps (DCO, Algorithm 1; truncated when the episode goes on after them).

    Buffers (running statistics) are constants, as PyTorch has them.

    Args:
        steps: inner steps of one estimate, ``T``.
        window: cut the graph every ``window`` steps; the meta-loss is then the mean over windows of each window's
            objective, and iterates at the start of a window are constants. Default: one window of all steps.
        first_order: hold inner gradients constant: no second derivatives, about half the time. The gradient that
            flows from the update rule alone.
        checkpoint: keep only every ``checkpoint``-th iterate and recompute the steps between them on the way back:
            memory of about ``T / checkpoint + checkpoint`` steps for one more forward pass. The same gradient.
        chunk: problems to differentiate at a time, each chunk with its own backward pass; ``"auto"`` asks the task,
            which knows whether its problems run faster together.

    Raises:
        ValueError: for a window or checkpoint interval that does not divide what it splits.

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientDescent(lr=0.01)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=4))
    >>> estimate = Unrolled(steps=5)(rule, episode, lmo.objectives.FinalLoss())
    >>> bool(estimate.grads["log_lr"] < 0), estimate.episode.step  # a larger step would have been better
    (True, 5)
    """

    def __init__(
        self,
        steps: int = 1,
        window: int | None = None,
        first_order: bool = False,
        checkpoint: int | None = None,
        chunk: int | str | None = "auto",
    ) -> None:
        window = steps if window is None else window
        if steps < 1 or window < 1:
            raise ValueError(f"steps and window must be at least 1, got steps={steps}, window={window}")
        if steps % window:
            raise ValueError(f"window must divide steps: {steps} steps do not split into windows of {window}")
        if checkpoint is not None and (checkpoint < 1 or window % checkpoint):
            raise ValueError(f"checkpoint must divide the window: {window} steps do not split into segments of {checkpoint}")
        if not (chunk is None or chunk == "auto" or (isinstance(chunk, int) and chunk >= 1)):
            raise ValueError(f'chunk must be a positive number, None or "auto", got {chunk!r}')
        self.steps = steps
        self.window = window
        self.first_order = first_order
        self.checkpoint = checkpoint
        self.chunk = chunk

    @property
    def exact_of(self) -> str:
        what = "the objective" if self.window == self.steps else f"the mean objective of windows of {self.window} steps"
        return f"{what} over {self.steps} steps" + (" with inner gradients held constant" if self.first_order else "")

    @property
    def inner_steps(self) -> int:
        return self.steps

    @property
    def gradient_evaluations(self) -> int:
        forward = self.steps * (2 if self.checkpoint else 1)
        return forward + self.steps // self.window + (0 if self.first_order else 2 * self.steps)

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        preferred = episode.task.preferred_chunk if self.chunk == "auto" else self.chunk
        chunk = min(preferred, episode.size) if isinstance(preferred, int) else episode.size
        loss, grads, ends = _mean(self._chunks(rule, episode, objective, chunk))
        if len(ends) > 1:  # task and starting point are those that came in: a joined copy of them would stay in memory
            joined = Episode.join([replace(end, origin={}) for end in ends])
            ends = [replace(joined, task=episode.task, origin=episode.origin)]
        return Estimate(loss, grads, ends[0], {"chunk": float(chunk)})

    def _chunks(self, rule: Rule, episode: Episode, objective: Objective, chunk: int) -> Iterator[Part]:
        for begin in range(0, episode.size, chunk):
            part = episode if chunk == episode.size else episode.select(slice(begin, begin + chunk))
            loss, grads, ends = _mean(self._windows(rule, part.detach(), objective))
            yield part.size / episode.size, loss, grads, ends[-1]

    def _windows(self, rule: Rule, episode: Episode, objective: Objective) -> Iterator[Part]:
        differentiate = self._plain if self.checkpoint is None else self._checkpointed
        for _ in range(self.steps // self.window):
            value, found, episode = differentiate(rule, episode, objective)
            yield self.window / self.steps, value, found, episode

    @property
    def _order(self) -> Order:
        return "first" if self.first_order else "second"

    def _plain(self, rule: Rule, episode: Episode, objective: Objective) -> tuple[Tensor, Tree, Episode]:
        second = not self.first_order
        tape = rule.tape(episode.state, second)
        if tape is not None:
            return taped_window(rule, tape, episode, objective, self.window, second)
        end, losses = unroll(rule, episode, self.window, order=self._order)
        with torch.enable_grad():
            value = objective(rule, episode, end, losses).mean()
        return value.detach(), _gradient(value, rule), end.detach()

    def _checkpointed(self, rule: Rule, episode: Episode, objective: Objective) -> tuple[Tensor, Tree, Episode]:
        # Forward without a graph, keeping the start of every segment.
        segment = self.checkpoint or self.window
        starts, losses = [], []
        current = episode
        for _ in range(self.window // segment):
            starts.append(current)
            current, segment_losses = unroll(rule, current, segment)
            losses.append(segment_losses)
        # The objective's derivative with respect to what the last segment leaves behind and to the losses on the way.
        end = _as_leaves(current)
        values = torch.cat(losses).requires_grad_()
        with torch.enable_grad():
            value = objective(rule, episode, end, values).mean()
        grads = _gradient(value, rule, retain_graph=True)
        adjoint = _pull(value, [*_floating(end), values])
        loss_adjoint = adjoint.pop().split(segment)
        for index in reversed(range(len(starts))):
            found, adjoint = self._segment(rule, starts[index], adjoint, loss_adjoint[index])
            grads = {name: grad + found[name] for name, grad in grads.items()}
        return value.detach(), grads, current.detach()

    def _segment(self, rule: Rule, start: Episode, adjoint: Sequence[Tensor], loss_adjoint: Tensor) -> tuple[Tree, list[Tensor]]:
        # Recompute a segment with its graph and push the adjoint through it; the graph ends with this function.
        begin = _as_leaves(start)
        after, losses = unroll(rule, begin, len(loss_adjoint), order=self._order)
        outputs = zip([*_floating(after), losses], [*adjoint, loss_adjoint], strict=True)
        inner = torch.stack([(out * vector).sum() for out, vector in outputs]).sum()
        return _gradient(inner, rule, retain_graph=True), _pull(inner, _floating(begin))


def _mean(parts: Iterator[Part]) -> tuple[Tensor, Tree, list[Episode]]:
    # Weighted means of losses and gradients, added up in the memory of the first part's.
    weight, loss, grads, end = next(parts)
    ends = [end]
    if weight != 1:
        loss, grads = weight * loss, tree_map(lambda grad: weight * grad, grads)
    for weight, value, found, end in parts:
        loss = loss + weight * value
        for name, grad in grads.items():
            grad.add_(found[name], alpha=weight)
        ends.append(end)
    return loss, grads, ends


def _gradient(value: Tensor, rule: Rule, retain_graph: bool = False) -> Tree:
    names, parameters = zip(*rule.named_parameters(), strict=True)
    if not value.requires_grad:  # nothing that the rule did reached the objective
        return {name: torch.zeros_like(parameter) for name, parameter in rule.named_parameters()}
    found = torch.autograd.grad(value, parameters, retain_graph=retain_graph, allow_unused=True, materialize_grads=True)
    return detach(dict(zip(names, found, strict=True)))  # torch 2.6 materialises zeros that require a gradient


def _pull(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return [found.detach() for found in torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


def _as_leaves(episode: Episode) -> Episode:
    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    state: State = {slot: tree_map(leaf, tree) for slot, tree in episode.state.items()}
    return replace(episode, params=tree_map(leaf, episode.params), state=state)


def _floating(episode: Episode) -> list[Tensor]:
    everything = [*episode.params.values(), *(leaf for tree in episode.state.values() for leaf in tree.values())]
    return [leaf for leaf in everything if leaf.is_floating_point()]
