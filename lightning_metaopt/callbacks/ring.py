"""The last disturbances of all parameters, in one buffer that every step passes twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.rules.control import CHUNK, mixed, row_weights

__all__ = ["Ring"]


@final
class Ring:
    """``rows`` vectors of ``n`` numbers; the next one takes the place of the oldest.

    Args:
        rows: how many are kept.
        like: a vector of ``n`` numbers, of the type and on the device in which is computed.
        bf16: keep them in bfloat16.

    >>> ring = Ring(2, torch.zeros(3))
    >>> for number in (1.0, 2.0, 3.0):
    ...     ring.write(torch.full((3,), number))
    >>> ring.mixtures(torch.tensor([1.0, 0.5]), 1)  # 3 + 2 / 2
    tensor([[4., 4., 4.]])
    """

    def __init__(self, rows: int, like: Tensor, bf16: bool = False) -> None:
        self.values = like.new_zeros(rows, like.numel(), dtype=torch.bfloat16 if bf16 else None)
        self.squares = like.new_zeros(rows)  # of their norms
        self.count = 0
        # Results as long as the parameters have their own memory: new pages in each step would cost as much as a third of a pass.
        self._room: dict[str, Tensor] = {}

    def write(self, vector: Tensor, square: Tensor | None = None) -> None:
        """Append a vector, whose squared norm may be known."""
        place = self.count % len(self.values)
        self.values[place].copy_(vector)
        self.squares[place] = vector.dot(vector) if square is None else square
        self.count += 1

    def mixtures(self, coefficients: Tensor, count: int) -> Tensor:
        """:math:`\\sum_h M^h d_{s+1-h}` for the newest step :math:`s` and those before it, shape ``(count, n)``: good until the
        next call.

        Args:
            coefficients: :math:`M`, shape ``(H,)`` or ``(H, n)``.
            count: for so many steps; there have to be ``H + count - 1`` rows.
        """
        rows = len(self.values)
        if coefficients.dim() == 1:
            steps = torch.arange(self.count - 1, self.count - 1 - count, -1, device=self.values.device)
            room = self._place("mixtures", count, coefficients.dtype)
            return mixed(row_weights(coefficients, steps, rows), self.values, room)
        found = self._place("mixtures", count, coefficients.dtype).zero_()
        for ago in range(count):
            for lag, own in enumerate(coefficients):
                found[ago].addcmul_(own, self.values[(self.count - 1 - ago - lag) % rows].to(own.dtype))
        return found

    def products(self, vectors: Sequence[Tensor], uses: Sequence[tuple[int, float]], coefficients: Tensor) -> Tensor:
        """:math:`\\sum_s p_{s+1} \\cdot d_{s+1-h}` for each :math:`h`, of the shape of ``coefficients``: inner products, or, for
        ``(H, n)``, products of coordinates.

        Args:
            vectors: those that the :math:`p` are multiples of, each of shape ``(n,)``.
            uses: :math:`p` for the newest step :math:`s` and those before it: the number of a vector, and its factor.
            coefficients: :math:`M`.
        """
        rows, found = len(self.values), torch.zeros_like(coefficients)
        dots = self._dots(vectors) if coefficients.dim() == 1 else None
        for ago, (number, factor) in enumerate(uses):
            places = [(self.count - 1 - ago - lag) % rows for lag in range(len(coefficients))]
            if dots is not None:
                found.add_(dots[number, torch.tensor(places, device=dots.device)], alpha=factor)
            else:
                vector = vectors[number]
                for lag, place in enumerate(places):
                    found[lag].addcmul_(vector, self.values[place].to(vector.dtype), value=factor)
        return found

    def _dots(self, vectors: Sequence[Tensor]) -> Tensor:
        # Of each vector with each row, in one pass.
        if len(vectors) == 1:
            left = vectors[0].unsqueeze(0)
        else:
            left = torch.stack(list(vectors), out=self._place("vectors", len(vectors), vectors[0].dtype))
        if self.values.dtype == left.dtype:
            return left @ self.values.T
        dots = left.new_zeros(len(left), len(self.values))
        for own, right in zip(left.split(CHUNK, 1), self.values.split(CHUNK, 1), strict=True):
            dots += own @ right.to(own.dtype).T
        return dots

    def _place(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        known = self._room.get(name)
        if known is None or len(known) != count or known.dtype != dtype:
            known = self._room[name] = self.values.new_empty(count, self.values.shape[1], dtype=dtype)
        return known

    def resized(self, rows: int) -> Ring:
        """The newest ``rows`` vectors, or all and room for more."""
        other = Ring(rows, self.values[0], self.values.dtype == torch.bfloat16)
        other.values, other.squares = other.values.to(self.values.dtype), other.squares.to(self.squares)
        for number in range(max(0, self.count - min(rows, len(self.values))), self.count):
            other.values[number % rows] = self.values[number % len(self.values)]
            other.squares[number % rows] = self.squares[number % len(self.values)]
        other.count = self.count
        return other

    def state_dict(self) -> dict[str, Any]:
        """All of it, copied."""
        return {"values": self.values.clone(), "squares": self.squares.clone(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.values.copy_(state_dict["values"])
        self.squares.copy_(state_dict["squares"])
        self.count = state_dict["count"]
