"""Parameters whose states lie one after the other in flat tensors, so that a step is a few passes over long rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Factors", "Piece", "pack", "place", "precise"]

_WIDE = (torch.float32, torch.float64)
SMALL = 16_384  # numbers; parameters up to this size share a piece, for there calls cost more than arithmetic


def precise(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype in _WIDE else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def order_of(tensor: Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost in memory; ``None`` if that is as usual."""
    return None if tensor.is_contiguous() else sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


@dataclass(eq=False)
class Factors:
    """State of factors: rows or, for one factor, tensors without dimensions; ``count`` is the number of meta-steps."""

    slots: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0


@final
@dataclass(eq=False)
class Piece(Factors):
    """One large parameter or several small ones of a param group, which have had the same meta-steps.

    Attributes:
        params: the parameters.
        olds: their values before the step, of their shapes; views of ``old``.
        old: the same in one row, in the order of memory.
        past: the last direction in one row; ``None`` if there is none to learn from.
    """

    params: list[Tensor] = field(default_factory=list)
    olds: list[Tensor] = field(default_factory=list)
    past: Tensor | None = None

    def __post_init__(self) -> None:
        self.olds = [old if _is_dense(old) else old.contiguous() for old in self.olds]
        self.orders = [order_of(old) for old in self.olds]
        self.sizes = [old.numel() for old in self.olds]
        self.old = self.row(self.olds)
        if len(self.olds) > 1:
            self.olds = self.shaped(self.old)

    def row(self, tensors: list[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes in one row: a view of a single one wherever that is possible."""
        rows = [_row(tensor, order) for tensor, order in zip(tensors, self.orders, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def shaped(self, row: Tensor) -> list[Tensor]:
        """Views of a row (or of one number) in the parameters' shapes."""
        if not row.dim():
            return [row for _ in self.params]
        found = []
        for part, old, order in zip(row.split(self.sizes), self.olds, self.orders, strict=True):
            if order is None:
                found.append(part.view(old.shape))
            else:
                inverse = sorted(range(old.dim()), key=order.__getitem__)
                found.append(part.view([old.shape[dim] for dim in order]).permute(inverse))
        return found

    def put(self, row: Tensor) -> None:
        """Write a row into the parameters, unless it is a view of the parameter."""
        if len(self.params) == 1 and row.data_ptr() == self.params[0].data_ptr():
            return
        for param, values in zip(self.params, self.shaped(row), strict=True):
            param.detach().copy_(values)

    def direction(self) -> Tensor:
        """The row of the last direction; zeros if there is none."""
        if self.past is None:
            self.past = torch.zeros_like(precise(self.old))
        return self.past

    def forget(self) -> None:
        """There is no last step to learn from."""
        self.past = None
        self.slots.pop("hint", None)

    def singles(self) -> list[Piece]:
        """A piece for each parameter, with its part of the state and of the snapshot."""
        pasts = [None] * len(self.params) if self.past is None else self.shaped(self.past)
        slots = {name: self.shaped(row) for name, row in self.slots.items()}
        elementwise = all(row.dim() for row in self.slots.values())
        found = []
        for number, (param, old) in enumerate(zip(self.params, self.olds, strict=True)):
            own = {name: values[number] for name, values in slots.items()}
            found.append(place(param, old, pasts[number], own, self.count, elementwise))
        return found

    def states(self) -> list[dict[str, Any]]:
        """For each parameter ``past``, ``slots`` and ``count``, as far as they exist."""
        pasts = [] if self.past is None else self.shaped(self.past)
        slots = {name: self.shaped(row) for name, row in self.slots.items()}
        found: list[dict[str, Any]] = []
        for number in range(len(self.params)):
            own: dict[str, Any] = {"past": pasts[number]} if pasts else {}
            if slots:
                own["slots"] = {name: values[number] for name, values in slots.items()}
            found.append(own | ({"count": self.count} if self.count else {}))
        return found


def place(param: Tensor, old: Tensor, past: Tensor | None, slots: dict[str, Tensor], count: int, elementwise: bool = True) -> Piece:
    """A piece of one parameter from a state in its shape; another device, type or order in memory does not matter."""
    piece = Piece(params=[param], olds=[old], count=count)
    like = precise(piece.old[:0])
    if past is not None:
        piece.past = piece.row([past.to(like)])
    for name, values in slots.items():
        piece.slots[name] = piece.row([values.to(like)]) if elementwise else values.to(like)
    return piece


def join(pieces: list[Piece]) -> Piece:
    """One piece of several that have had the same meta-steps; factors are element by element, or there are none."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    params, olds = [piece.params[0] for piece in pieces], [piece.olds[0] for piece in pieces]
    joined = Piece(params=params, olds=olds, count=first.count)
    if first.past is not None:
        joined.past = torch.cat([piece.past for piece in pieces if piece.past is not None])
    joined.slots = {name: torch.cat([piece.slots[name] for piece in pieces]) for name in first.slots}
    return joined


def pack(pieces: Sequence[tuple[object, Piece]]) -> list[Piece]:
    """Join small pieces with equal keys, device, type and history; a joined one has at most twice ``SMALL`` numbers."""
    packed: list[Piece] = []
    waiting: dict[tuple[object, ...], list[Piece]] = {}
    for key, piece in pieces:
        size = piece.old.numel()
        if size > SMALL:
            packed.append(piece)
            continue
        old, history = piece.old, (piece.count, piece.past is None, *sorted(piece.slots))
        together = waiting.setdefault((key, old.device, old.dtype, history), [])
        if sum(other.old.numel() for other in together) + size > 2 * SMALL:
            packed.append(join(together))
            together.clear()
        together.append(piece)
    return packed + [join(together) for together in waiting.values()]


def _is_dense(tensor: Tensor) -> bool:
    order = order_of(tensor)
    return order is None or tensor.permute(order).is_contiguous()


def _row(tensor: Tensor, order: list[int] | None) -> Tensor:
    tensor = tensor.detach()
    return (tensor if order is None else tensor.permute(order)).reshape(-1)
