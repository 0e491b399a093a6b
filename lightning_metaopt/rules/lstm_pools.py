"""Memory that windows of meta-training hand on to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

__all__ = ["Pool", "Pools", "Split"]

Split = tuple[Tensor, Sequence[Tensor]]
"""A tensor and the blocks of rows that it consists of."""


@final
class Pool:
    """Buffers of one shape, for whoever needs one next.

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
class Pools:
    """Pools of buffers by shape.

    The activations of a window are freed at its end, and from a few megabytes on the system takes the memory back. To get it again
    page by page costs a fifth of a window, to split it again a thirtieth. What they hold is neither copied nor
    pickled.

    Args:
        limit: how much each pool may hold, in bytes; ``limit * pools`` is the most that a rule keeps between windows.
        pools: how many there may be; one more, and the oldest goes.

    >>> import torch
    >>> pool = Pools().of(torch.zeros(2, 5), 1, 3)
    >>> whole, (top, bottom) = pool.take()
    >>> whole.shape, bottom.shape
    (torch.Size([4, 5]), torch.Size([3, 5]))
    """

    def __init__(self, limit: int = 2**26, pools: int = 6) -> None:
        self.limit, self.most = limit, pools
        self._pools: dict[tuple[Any, ...], Pool] = {}

    def of(self, like: Tensor, *rows: int) -> Pool:
        """For tensors with so many rows in each of their blocks, otherwise like ``like``."""
        key = rows, like.shape[:-2], like.shape[-1], like.dtype, like.device
        found = self._pools.pop(key, None) or Pool(like, rows, self.limit)
        self._pools[key] = found  # the last one now
        if len(self._pools) > self.most:
            del self._pools[next(iter(self._pools))]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Pools:
        return Pools(self.limit, self.most)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pools, (self.limit, self.most)
