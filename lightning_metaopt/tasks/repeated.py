"""The same problems several times over, for replicas of a rule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import final

import torch

from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import tree_map

__all__ = ["Repeated"]


@final
class Repeated(TaskFamily):
    """All problems of ``family`` ``copies`` times over, for the replicas of a :class:`~lightning_metaopt.rules.Stacked`.

    Args:
        family: any whose problems carry all that is random in their data (starting points too).
        copies: how often each problem comes; it must divide the numbers of problems that are asked for.

    Raises:
        ValueError: for a number below 1, or one that does not divide.

    >>> import lightning_metaopt as lmo
    >>> Repeated(lmo.tasks.Rosenbrock(), 2).draw(seed=0, size=4).data["start"][:, 0].unique().numel()
    2
    """

    def __init__(self, family: TaskFamily, copies: int) -> None:
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        self.family, self.copies = family, copies

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.family.shapes

    def sample(self, generator: torch.Generator, size: int) -> Task:
        if size % self.copies:
            raise ValueError(f"{size} problems are not a multiple of {self.copies} copies")
        task = copy.copy(self.family.sample(generator, size // self.copies))
        task.data = tree_map(lambda leaf: torch.cat([leaf] * self.copies), task.data)
        return task
