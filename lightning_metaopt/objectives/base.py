"""What all objectives have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_metaopt.episode import Episode
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["Objective", "displacement"]


def displacement(episode: Episode) -> Tree:
    """How far the iterates have come since the episode began, :math:`\\theta_t - \\theta_0`."""
    if not episode.origin:
        raise ValueError("the episode does not know where it began; start it with lightning_metaopt.episode.start")
    return {name: leaf - episode.origin[name] for name, leaf in episode.params.items()}


class Objective(ABC):
    """A number for each problem, computed from an unrolled window."""

    @abstractmethod
    def __call__(self, rule: Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        """Value of the objective, shape ``(B,)``.

        Args:
            rule: the rule that made the steps (some objectives use its geometry).
            start: the episode before the window.
            end: the episode after it.
            losses: training losses ``(T, B)`` before each of the ``T`` steps.
        """

    def grouped(self, groups: int) -> Objective:
        """The same where problems come in so many equal groups, one after the other, that know nothing of each other."""
        return self  # each problem has a value of its own
