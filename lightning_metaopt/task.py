"""Tasks: batches of inner problems, and the families that they are drawn from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_metaopt.tree import Tree, cat, select, tree_map

__all__ = ["Task", "TaskFamily"]


class Task(ABC):
    """A batch of ``B`` inner problems of the same form.

    A problem is: minimise ``loss(theta)`` over ``theta``, judged by ``val_loss(theta)`` (DCO, section III: the pair
    :math:`(l_i, l_i^{val})`). All ``B`` problems are held in tensors with a leading axis of problems.

    Args:
        data: what differs between the problems; every leaf has shape ``(B, ...)``.
        shared: what all problems have in common (a data set, a fixed design matrix).

    A task draws nothing at random after it was made: ``batch(step)`` is a function of ``step``, so that an episode can
    be resumed bit by bit.
    """

    def __init__(self, data: Tree, shared: Tree | None = None) -> None:
        sizes = {leaf.shape[0] for leaf in data.values()}
        if len(sizes) != 1:
            raise ValueError(f"all leaves of a task's data need the same leading axis B, got {sorted(sizes)}")
        self.data = data
        self.shared: Tree = shared or {}

    @property
    def size(self) -> int:
        """Number of problems ``B``."""
        return next(iter(self.data.values())).shape[0]

    @property
    def preferred_chunk(self) -> int | None:
        """How many problems to differentiate at a time: ``None`` for all at once (see :class:`~lightning_metaopt.Unrolled`)."""
        return None

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Tree, Tree]:
        """Starting point ``(params, buffers)`` of every problem: leaves ``(B, *shape)``, float parameters only."""

    @abstractmethod
    def loss(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        """Training losses, shape ``(B,)``; problem ``b`` may depend on slice ``b`` of ``params`` only.

        ``buffers`` may be changed in place; the inner loop hands in copies.
        """

    def loss_alone(self, params: Tree, buffers: Tree, batch: Any) -> Tensor:
        """The loss of a task with one problem, shape ``()``, for ``params`` without the axis of problems, ``(*shape)``.

        Override it where a problem alone needs no such axis: the inner loop then leaves it out for rules that act element
        by element, which saves their many small operations. ``buffers`` and ``batch`` keep theirs.
        """
        return self.loss(tree_map(lambda leaf: leaf.unsqueeze(0), params), buffers, batch).squeeze(0)

    def batch(self, step: int) -> Any:
        """The data of inner step ``step`` (0-based); by default the whole of :attr:`data`."""
        return self.data

    def val_loss(self, params: Tree, buffers: Tree) -> Tensor:
        """Validation losses :math:`l_i^{val}`, shape ``(B,)``; by default the training loss on the first batch."""
        return self.loss(params, buffers, self.batch(0))

    def to(self, device: torch.device | str) -> Task:
        """The same problems on another device (a copy; ``self`` stays)."""
        other = copy.copy(self)
        other.data = tree_map(lambda leaf: leaf.to(device), self.data)
        other.shared = {name: leaf.to(device) for name, leaf in self.shared.items()}
        return other

    def select(self, part: slice) -> Task:
        """The problems ``part``; shared tensors are not copied."""
        other = copy.copy(self)
        other.data = select(self.data, part)
        return other

    @classmethod
    def join(cls, tasks: Sequence[Task]) -> Task:
        """Tasks of the same kind as one larger batch; the inverse of :meth:`select`."""
        other = copy.copy(tasks[0])
        other.data = cat([task.data for task in tasks])
        return other


class TaskFamily(ABC):
    """A distribution over problems (DCO, section III: :math:`\\mathcal D`). Options are constructor arguments, so that
    recipes can name them.
    """

    @abstractmethod
    def sample(self, generator: torch.Generator, size: int) -> Task:
        """Draw ``size`` problems as one :class:`Task`; everything random comes from ``generator``."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of one problem's parameters, for rules that are sized per parameter."""

    def draw(self, seed: int, size: int) -> Task:
        """:meth:`sample` with a fresh generator: the same seed gives the same problems on every machine and device."""
        return self.sample(torch.Generator().manual_seed(seed), size)
