"""How parameters become the columns of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["Columns"]


@final
class Columns:
    """How leaves ``(B, k, *shape)`` of parameters ``(B, *shape)`` become the columns of one matrix ``(k, N)``, and back.

    With replicas the matrix is ``(R, k, N / R)``, and problems come replica by replica.
    """

    def __init__(self, shapes: Sequence[torch.Size], replicas: int | None = None) -> None:
        self.shapes, self.replicas = shapes, replicas
        self._split = (-1,) if replicas is None else (replicas, -1)
        self._sizes = [shape.numel() // (replicas or 1) for shape in shapes]

    def columns(self, leaves: Sequence[Tensor]) -> Tensor:
        """Of one slot, with a leaf for each parameter; without a copy where the last step left it so."""
        found = [leaf.transpose(0, 1).reshape(leaf.shape[1], *self._split) for leaf in leaves]
        joined = found[0] if len(found) == 1 else torch.cat(found, -1)
        return joined if self.replicas is None else joined.transpose(0, 1)

    def leaves(self, columns: Tensor) -> list[Tensor]:
        """The inverse."""
        columns = columns if self.replicas is None else columns.transpose(0, 1)
        pieces = self._pieces(columns)
        return [piece.reshape(len(columns), *shape).transpose(0, 1) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def row(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves ``(B, *shape)`` of one number for each coordinate as ``(N,)``, or ``(R, N / R)``."""
        found = [leaf.reshape(self._split) for leaf in leaves]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def rows(self, leaves: Sequence[Tensor]) -> Tensor:
        """The same of many steps: ``(S, B, *shape)`` as ``(S, N)``."""
        found = [leaf.reshape(len(leaf), *self._split) for leaf in leaves]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def unrow(self, row: Tensor) -> list[Tensor]:
        """The inverse of :meth:`row`."""
        return [piece.reshape(shape) for piece, shape in zip(self._pieces(row), self.shapes, strict=True)]

    def _pieces(self, columns: Tensor) -> Sequence[Tensor]:
        return columns.split(self._sizes, -1) if len(self._sizes) > 1 else [columns]
