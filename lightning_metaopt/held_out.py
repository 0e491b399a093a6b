"""Held-out problems: how well a rule does on what it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.task_loader import draw, shard
from lightning_metaopt.tree import Tree

__all__ = ["HeldOut"]


class HeldOut:
    """Problems from their own stream of seeds, drawn once, run without gradients of the meta-parameters.

    Args:
        family: where they come from.
        seed: the learner's seed; the stream keeps them apart from the training problems.
        size: number of problems over all processes.
        steps: inner steps.
    """

    def __init__(self, family: TaskFamily, seed: int, size: int, steps: int) -> None:
        self.family, self.seed, self.size, self.steps = family, seed, size, steps
        self._drawn: dict[str, tuple[Task, Tree, Tree]] = {}
        self._part = slice(0, size)

    def place(self, rank: int, world_size: int) -> None:
        """Say which part of the problems this process runs; the parts may differ by one in size."""
        self._drawn.clear()
        self._part = slice(rank * self.size // world_size, (rank + 1) * self.size // world_size)

    def evaluate(
        self, rule: Rule, stream: str, device: torch.device, add_up: Callable[[Tensor], Tensor]
    ) -> tuple[float, list[float]]:
        """Mean validation loss after all steps, and the mean training losses at steps 0 to ``steps``.

        Args:
            rule: the rule to judge.
            stream: ``"validation"`` or ``"test"``.
            device: where to compute.
            add_up: sum of a tensor over processes.
        """
        # Lightning may call this in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.no_grad():
            if stream not in self._drawn:
                self._drawn[stream] = shard(draw(self.family, self.seed, stream, 0, self.size), self._part, device)
            task, params, buffers = self._drawn[stream]
            end, losses = unroll(rule, Episode(task, params, buffers, rule.init(params), origin=params), self.steps)
            copies = [{name: leaf.clone() for name, leaf in end.buffers.items()} for _ in range(2)]
            last = task.loss(end.params, copies[0], task.batch(end.step))
            final = task.val_loss(end.params, copies[1])
            sums = torch.cat([losses, last[None], final[None]]).sum(1)
            *curve, value = (add_up(sums) / self.size).tolist()
        return value, curve
