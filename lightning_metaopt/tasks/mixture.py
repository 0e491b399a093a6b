"""Problems of several families, for rules that are to be general."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch

from lightning_metaopt.task import Task, TaskFamily

__all__ = ["Mixture"]


@final
class Mixture(TaskFamily):
    """All problems that are drawn together come from one of several families, each with the same probability.

    Their parameters may have other names and shapes from draw to draw, so this is for rules that fit any network. Problems that
    are held out for validation are drawn together as well, and are thus of one of the families.

    Args:
        families: what to draw from.

    Raises:
        ValueError: for none.

    >>> import lightning_metaopt as lmo
    >>> family = Mixture([lmo.tasks.Rosenbrock(), lmo.tasks.Lasso()])
    >>> sorted({type(family.draw(seed, size=2)).__name__ for seed in range(9)})
    ['LassoTask', 'RosenbrockTask']
    """

    def __init__(self, families: Sequence[TaskFamily]) -> None:
        if not families:
            raise ValueError("a mixture needs at least one family")
        self.families = list(families)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those of the first family."""
        return self.families[0].shapes

    def sample(self, generator: torch.Generator, size: int) -> Task:
        which = int(torch.randint(len(self.families), (), generator=generator))
        return self.families[which].sample(generator, size)
