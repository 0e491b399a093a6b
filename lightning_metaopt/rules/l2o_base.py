"""Coordinatewise LSTMs: the network that learned optimizers share, in meta-training and deployed on large models."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules.lstm_cell import LSTMLayer, linear_map
from lightning_metaopt.tree import Tree, expand_to

__all__ = ["CoordinatewiseLSTM"]

Cells = list[tuple[Tensor, Tensor]]
"""``(h, c)`` of every layer, each ``(hidden, N)`` for N coordinates."""


class CoordinatewiseLSTM(Rule):
    """A rule that applies one small recurrent network to every coordinate, each with a state of its own.

    A subclass says which features of the gradient the network sees and how its output becomes an update. The state of a
    coordinate is ``2 * layers * hidden`` numbers beside what the features remember. Deployed, coordinates are worked through
    ``chunk`` at a time, so that nothing but the state grows with the model.

    Args:
        features: number of inputs of the first layer.
        layers: LSTM layers.
        hidden: units of each.
        scale: what the output is multiplied by, in units of the parameters.
        learn_scale: learn the scale as well, by its logarithm.
        bf16: keep the network's state in bfloat16 (half of the memory); computed is in the parameters' precision.
        chunk: coordinates at a time, deployed.
        generator: where the initial values come from.

    Raises:
        ValueError: for sizes below 1 or a scale that is not positive.
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int,
        hidden: int,
        scale: float,
        learn_scale: bool,
        bf16: bool,
        chunk: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        for what, value in (("layers", layers), ("hidden", hidden), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        if not scale > 0 or not math.isfinite(scale):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.hidden, self.scale, self.bf16, self.chunk = hidden, scale, bf16, chunk
        sizes = [features, *[hidden] * (layers - 1)]
        self.cells = nn.ModuleList(LSTMLayer(size, hidden, generator) for size in sizes)
        self.out_weight = linear_map(generator, 1, hidden)
        self.out_bias = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else None

    @property
    def sizes(self) -> dict[str, int | float | bool]:
        """The constructor arguments that all subclasses have."""
        learned = self.log_scale is not None
        common = {"scale": self.scale, "learn_scale": learned, "bf16": self.bf16, "chunk": self.chunk}
        return {"layers": len(self.cells), "hidden": self.hidden} | common

    @abstractmethod
    def memory(self, params: Tree) -> State:
        """The features' own state at the start, slots of leaves like the parameters'."""

    @abstractmethod
    def features(self, grad: Tensor, memory: Mapping[str, Tensor], count: Tensor) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Features, each of the gradient's shape, and the new memory; element by element, in the step number ``count`` (from 1)."""

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """What goes before the first layer, ``(number of features, N)`` to ``(features, N)``."""

    @abstractmethod
    def leave(self, out: Tensor) -> Tensor:
        """What comes after the last layer and before the scale, element by element."""

    def init(self, params: Tree) -> State:
        state = self.memory(params)
        state["step"] = {name: torch.zeros(len(leaf), dtype=torch.float32, device=leaf.device) for name, leaf in params.items()}
        for slot in self._slots():
            state[slot] = {name: self._zeros(leaf) for name, leaf in params.items()}
        return state

    def _zeros(self, leaf: Tensor) -> Tensor:
        # (B, hidden, *shape): one problem's states are the columns of a matrix without a copy.
        dtype = torch.bfloat16 if self.bf16 else leaf.dtype
        return torch.zeros(len(leaf), self.hidden, *leaf.shape[1:], dtype=dtype, device=leaf.device)

    def _slots(self) -> list[str]:
        return [f"{part}{index}" for index in range(len(self.cells)) for part in ("hidden", "cell")]

    def network(self, x: Tensor, cells: Cells) -> tuple[Tensor, Cells]:
        """Updates ``(N,)`` and new states from the columns ``x`` of features: **the one definition of the step**."""
        x = self.enter(x)
        new: Cells = []
        for layer, (hidden, cell) in zip(self.cells, cells, strict=True):
            new.append(layer(x, hidden, cell))
            x = new[-1][0]
        scale = self.scale if self.log_scale is None else self.log_scale.exp()
        out = torch.addmm(self.out_bias.unsqueeze(1), self.out_weight, x)
        return (scale * self.leave(out)).squeeze(0), new

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        slots, kept = self._slots(), [slot for slot in state if slot not in (*self._slots(), "step")]
        new: State = {slot: {} for slot in state}
        columns = []
        for name, grad in grads.items():
            count = new["step"][name] = state["step"][name] + 1
            found, memory = self.features(grad, {slot: state[slot][name] for slot in kept}, expand_to(count, grad))
            columns.append(torch.stack([feature.reshape(-1) for feature in found]))
            for slot in kept:
                new[slot][name] = memory[slot]
        # All coordinates of all parameters and problems at once: a few large matrix products.
        held = [_beside([_columns(state[slot][name]) for name in grads]).to(columns[0].dtype) for slot in slots]
        out, cells = self.network(_beside(columns), list(zip(held[::2], held[1::2], strict=True)))
        sizes = [grad.numel() for grad in grads.values()]
        for slot, value in zip(slots, (part for pair in cells for part in pair), strict=True):
            for (name, grad), piece in zip(grads.items(), value.split(sizes, 1), strict=True):
                new[slot][name] = piece.view(-1, *grad.shape).movedim(0, 1).to(state[slot][name].dtype)
        return {name: part.view_as(grad) for (name, grad), part in zip(grads.items(), out.split(sizes), strict=True)}, new

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        slots, kept = self._slots(), [slot for slot in state if slot not in (*self._slots(), "step")]
        for name, grad in grads.items():
            state["step"][name].add_(1)
            for index in range(len(grad)):
                leaves = {slot: state[slot][name][index] for slot in (*kept, *slots)}
                flat = {slot: leaf.reshape(self.hidden if slot in slots else 1, -1) for slot, leaf in leaves.items()}
                update = self._advance_(grad[index].reshape(-1), flat, slots, kept, state["step"][name][index])
                params[name][index].add_(update.view_as(grad[index]), alpha=scale[name] if scale else 1.0)
                for slot, leaf in leaves.items():
                    if flat[slot].data_ptr() != leaf.data_ptr():  # it lies in memory in another order
                        leaf.copy_(flat[slot].view_as(leaf))

    def _advance_(self, grad: Tensor, flat: Tree, slots: list[str], kept: list[str], count: Tensor) -> Tensor:
        update = torch.empty_like(grad)
        for begin in range(0, len(grad), self.chunk):
            part = slice(begin, begin + self.chunk)
            found, memory = self.features(grad[part], {slot: flat[slot][0, part] for slot in kept}, count)
            held = [flat[slot][:, part].to(grad.dtype) for slot in slots]
            update[part], cells = self.network(torch.stack(list(found)), list(zip(held[::2], held[1::2], strict=True)))
            for slot in kept:
                flat[slot][0, part] = memory[slot]
            for slot, value in zip(slots, (tensor for pair in cells for tensor in pair), strict=True):
                flat[slot][:, part] = value
        return update


def _columns(leaf: Tensor) -> Tensor:
    # (B, hidden, *shape) to (hidden, N), without a copy where the last step left it so.
    return leaf.movedim(1, 0).reshape(leaf.shape[1], -1)


def _beside(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), 1)
