"""Memory that windows of meta-training hand on to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

__all__ = ["Room", "Shelf", "Split"]

Split = tuple[Tensor, Sequence[Tensor]]
"""A tensor and the blocks of rows that it consists of."""


@final
class Shelf:
    """Tensors of one shape that nobody needs, for the next who does.

    Args:
        like: of the type, on the device and with all sizes but that of the rows.
        rows: how many in each block.
        limit: how much to hold, in bytes; what goes beyond is freed.
    """

    def __init__(self, like: Tensor, rows: Sequence[int], limit: int) -> None:
        self.shape, self.rows = (*like.shape[:-2], sum(rows), like.shape[-1]), list(rows)
        self.like = like.new_empty(0)
        self.limit, self.free = limit, list[Split]()

    def take(self) -> Split:
        """A tensor with any values."""
        if self.free:
            return self.free.pop()
        whole = self.like.new_empty(self.shape)
        return whole, whole.split(self.rows, -2)

    def give(self, split: Split) -> None:
        """What came from :meth:`take` and nothing else refers to."""
        if (len(self.free) + 1) * split[0].nbytes <= self.limit:
            self.free.append(split)


@final
class Room:
    """Shelves by shape.

    The activations of a window are freed at its end, and from a few megabytes on the system takes the memory back. To get it again
    page by page costs a fifth of a window, to split it again a thirtieth. What a room holds is nothing: it is neither copied nor
    pickled.

    Args:
        limit: how much each shelf may hold, in bytes.
        shelves: how many there may be; one more, and the oldest goes.

    >>> import torch
    >>> shelf = Room().shelf(torch.zeros(2, 5), 1, 3)
    >>> whole, (top, bottom) = shelf.take()
    >>> whole.shape, bottom.shape
    (torch.Size([4, 5]), torch.Size([3, 5]))
    """

    def __init__(self, limit: int = 2**26, shelves: int = 6) -> None:
        self.limit, self.most = limit, shelves
        self._shelves: dict[tuple[Any, ...], Shelf] = {}

    def shelf(self, like: Tensor, *rows: int) -> Shelf:
        """For tensors with so many rows in each of their blocks, otherwise like ``like``."""
        key = rows, like.shape[:-2], like.shape[-1], like.dtype, like.device
        found = self._shelves.pop(key, None) or Shelf(like, rows, self.limit)
        self._shelves[key] = found  # the last one now
        if len(self._shelves) > self.most:
            del self._shelves[next(iter(self._shelves))]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        return Room(self.limit, self.most)

    def __reduce__(self) -> tuple[Any, ...]:
        return Room, (self.limit, self.most)
