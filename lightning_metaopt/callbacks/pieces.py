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
        self.size = sum(self.sizes)
        self.old = self.row(self.olds)
        if len(self.olds) > 1:
            self.olds = self.shaped(self.old)
        self._views: list[Tensor] = []  # the parameters' memory in rows, and where it lies (None if a row is a copy)
        self._pointers: list[int | None] = []
        self._room: Tensor | None = None  # where several are put together, and its parts
        self._parts: list[Tensor] = []

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

    def here(self) -> Tensor:
        """The parameters in one row, to be read; see :meth:`row`."""
        for param, pointer in zip(self.params, self._pointers, strict=False):
            if param.data_ptr() != pointer:  # somebody has set its `data`
                self._views.clear()
                break
        if not self._views:
            self._views = [_row(param, order) for param, order in zip(self.params, self.orders, strict=True)]
            where = [(param.data_ptr(), view.data_ptr()) for param, view in zip(self.params, self._views, strict=True)]
            self._pointers = [one if one == two else None for one, two in where]
        if len(self._views) == 1:
            return self._views[0]
        if self._room is None:
            self._room = torch.cat(self._views)
            self._parts = list(self._room.split(self.sizes))
        else:
            torch.cat(self._views, out=self._room)
        return self._room

    def snapshot(self) -> bool:
        """Fill the snapshot; ``False`` where parameters are no longer what they were in the last step."""
        if not self._views:
            return False
        for param, old, pointer in zip(self.params, self.olds, self._pointers, strict=True):
            if param.data_ptr() != pointer or param.shape != old.shape:
                return False
        if len(self._views) == 1:
            self.old.copy_(self._views[0])
        else:
            torch.cat(self._views, out=self.old)
        return True

    def put(self, row: Tensor) -> None:
        """Write what :meth:`here` gave, and has been changed, into the parameters."""
        if row is not self._room:
            if self._pointers[0] is None:
                self.params[0].detach().copy_(self.shaped(row)[0])
        elif None in self._pointers:
            for param, values in zip(self.params, self.shaped(row), strict=True):
                param.detach().copy_(values)
        else:
            for view, part in zip(self._views, self._parts, strict=True):
                view.copy_(part)

    def release(self) -> None:
        """Let go of the parameters' memory."""
        self._views, self._pointers, self._room, self._parts = [], [], None, []

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
    return (tensor if order is None else tensor.permute(order)).detach().reshape(-1)
