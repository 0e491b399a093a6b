"""Which parameters share a piece, step after step and from checkpoint to checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_metaopt.callbacks.hooks import Move
from lightning_metaopt.callbacks.pieces import Piece, pack, place

__all__ = ["Part", "Parts", "copied"]


@final
@dataclass(eq=False)
class Part:
    """A piece in one step: parameters and gradients in rows, and what the optimizer did with the first of them."""

    piece: Piece
    moves: list[Move]

    def __post_init__(self) -> None:
        first = self.moves[0]
        self.lr, self.base_lr, self.momentum = first.lr, first.base_lr, first.momentum
        self.param = self.piece.here()
        self.grad = self.piece.row([move.grad for move in self.moves])


@final
class Parts:
    """All pieces of an optimizer.

    Args:
        scope: whose factors they hold, see :class:`~lightning_metaopt.callbacks.step_sizes.StepSizes`.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.pieces: dict[Tensor, Piece] = {}
        # Of the last step: the parameters of all groups, whether each was followed, and which of the moves are in which piece.
        self._last: list[tuple[Tensor, bool]] = []
        self._arranged: list[tuple[Piece, list[int]]] = []
        self._same = False  # whether this step began with the parameters of the last one
        self._olds: dict[Tensor, Tensor] = {}  # the snapshots, which the hooks fill
        self._waiting: dict[int, dict[str, Any]] = {}  # loaded, for parameters that are lazy or not there yet

    def arrange(self, moves: list[Move], groups: list[dict[str, Any]], olds: dict[Tensor, Tensor]) -> list[Part]:
        """The pieces that take part in a step. Their snapshots replace those in ``olds``, to be filled before the next steps."""
        if self._same and len(moves) == sum(len(numbers) for _, numbers in self._arranged):
            found = [(piece, [moves[number] for number in numbers]) for piece, numbers in self._arranged]
            if all(_fits(piece, own) for piece, own in found):
                return [Part(piece, own) for piece, own in found]
        new = []
        for move in moves:
            if move.param not in self.pieces:
                new.append(move)
            elif move.old is not self._olds[move.param]:  # the parameter has got another shape, type or device
                self._break(self.pieces[move.param], olds)
                piece = self.pieces[move.param]
                past, slots = piece.past, piece.slots
                if move.old.shape == piece.olds[0].shape:
                    past = None if past is None else piece.shaped(past)[0]
                    slots = {name: piece.shaped(row)[0] for name, row in slots.items()}
                    self._keep([place(move.param, move.old, past, slots, piece.count, self.scope == "element")], olds)
                else:
                    self._keep([place(move.param, move.old, None, {}, 0)], olds)
        if new:
            self._add([(move.param, move.old) for move in new], groups, olds)
        grouped = self._grouped(moves)
        for piece, own in grouped.items():
            if not _fits(piece, own):
                self._break(piece, olds)
        grouped = self._grouped(moves)
        place_of = {move.param: number for number, move in enumerate(moves)}
        self._arranged = [(piece, [place_of[move.param] for move in own]) for piece, own in grouped.items()]
        self._last = [(param, param in place_of) for group in groups for param in group["params"]]
        return [Part(piece, own) for piece, own in grouped.items()]

    def snapshot(self, groups: list[dict[str, Any]]) -> bool:
        """Fill the snapshots of the last step's pieces, if the parameters are still the same; else ``False``.

        So it is where one of them had no gradient in the last step, which may have one now.
        """
        self._same, last = False, iter(self._last)
        for group in groups:
            for param in group["params"]:
                known = next(last, None)
                if known is None or param is not known[0] or param.requires_grad != known[1]:
                    return False
        self._same = bool(self._last) and all(piece.snapshot() for piece, _ in self._arranged)
        return self._same

    def release(self) -> None:
        """Let go of the parameters' memory; what was learned stays."""
        for piece in self.pieces.values():
            piece.release()

    def _grouped(self, moves: list[Move]) -> dict[Piece, list[Move]]:
        found: dict[Piece, list[Move]] = {}
        for move in moves:
            found.setdefault(self.pieces[move.param], []).append(move)
        return found

    def _break(self, piece: Piece, olds: dict[Tensor, Tensor]) -> None:
        if len(piece.params) > 1:
            self._keep(piece.singles(), olds)

    def _keep(self, pieces: list[Piece], olds: dict[Tensor, Tensor]) -> None:
        for piece in pieces:
            for param, old in zip(piece.params, piece.olds, strict=True):
                self.pieces[param] = piece
                self._olds[param] = old
                olds[param] = old

    def _add(self, pairs: list[tuple[Tensor, Tensor]], groups: list[dict[str, Any]], olds: dict[Tensor, Tensor]) -> None:
        place_of = {param: number for number, param in enumerate(param for group in groups for param in group["params"])}
        group_of = {param: number for number, group in enumerate(groups) for param in group["params"]}
        made = []
        for param, old in pairs:
            saved = self._waiting.pop(place_of[param], {})
            if any(leaf.shape != (old.shape if self.scope == "element" else ()) for leaf in saved.get("slots", {}).values()) or (
                "past" in saved and saved["past"].shape != old.shape
            ):
                raise ValueError(
                    "the state of the step sizes belongs to parameters of other shapes; start without it, for instance from the "
                    "weights alone, with load_from_checkpoint"
                )
            state = saved.get("past"), dict(saved.get("slots", {})), saved.get("count", 0)
            key = (group_of[param], saved.get("piece"))
            made.append((key, place(param, old, *state, elementwise=self.scope == "element")))
        self._keep([piece for _, piece in made] if self.scope == "tensor" else pack(made), olds)

    def states(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """What was learned for each parameter, as copies, and which of them share a piece."""
        numbers: dict[Piece, int] = {}
        rows: dict[Tensor, dict[str, Any]] = {}
        for param in params:
            if param in self.pieces:
                piece = self.pieces[param]
                if piece not in numbers:
                    numbers[piece] = len(numbers)
                    rows.update(zip(piece.params, piece.states(), strict=True))
        found = []
        for number in range(max([len(params) - 1, *self._waiting]) + 1):
            known = [param for param in params[number : number + 1] if param in self.pieces]
            state = {**rows[known[0]], "piece": numbers[self.pieces[known[0]]]} if known else self._waiting.get(number, {})
            found.append(copied(state))
        return found

    def load(self, states: list[dict[str, Any]], groups: list[dict[str, Any]], olds: dict[Tensor, Tensor]) -> None:
        """Continue from :meth:`states`; those of parameters that are lazy or not there yet wait for them."""
        self.pieces, self._olds, self._last = {}, {}, []
        self._waiting = {number: copied(saved) for number, saved in enumerate(states) if saved}
        params = [param for group in groups for param in group["params"]]
        known = [(param, torch.empty_like(param)) for param in params if not is_lazy(param)]
        self._add([(param, old.detach()) for param, old in known], groups, olds)


def _fits(piece: Piece, moves: list[Move]) -> bool:
    # A group may have got another learning rate for a parameter that has moved into it, and some may have no gradient.
    rates = moves[0][3:]
    return len(moves) == len(piece.params) and all(move[3:] == rates for move in moves)


def copied(value: Any) -> Any:
    """A copy in plain containers."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {key: copied(leaf) for key, leaf in value.items()} if isinstance(value, dict) else value
