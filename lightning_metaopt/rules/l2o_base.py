"""Coordinatewise LSTMs: the network that learned optimizers share, in meta-training and deployed on large models."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules.lstm_cell import LSTMLayer, affine, linear_map
from lightning_metaopt.rules.lstm_step import Columns, lstm_backward, lstm_forward, lstm_step
from lightning_metaopt.tree import Tree, expand_to

__all__ = ["CoordinatewiseLSTM"]


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

    replicas: int | None = None
    """Set by :class:`~lightning_metaopt.rules.Stacked`: meta-parameters have an axis of so many replicas in front."""

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
    def enter_backward(self, phi: Tree, x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tree, Tensor]:
        """Of :meth:`enter` at ``x``, where its value is ``y``: derivatives by name of the meta-parameter, and that of ``x``."""

    @abstractmethod
    def leave(self, out: Tensor) -> Tensor:
        """What comes after the last layer and before the scale, element by element."""

    @abstractmethod
    def leave_backward(self, left: Tensor, grad: Tensor) -> Tensor:
        """The derivative of :meth:`leave` where its value is ``left``."""

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

    def factor(self) -> Tensor | float:
        """What the last layer is multiplied by."""
        return self.scale if self.log_scale is None else self.factor_of(self.log_scale)

    def factor_of(self, log_scale: Tensor) -> Tensor:
        """:meth:`factor` from its logarithm; with an axis of replicas, so that it fits their columns."""
        return log_scale.exp()[..., None, None]

    def plain(self, x: Tensor, state: Sequence[Tensor], layout: Columns) -> tuple[Tensor, list[Tensor]]:
        """Updates ``(N,)`` and new state from the columns ``x`` of features: **the definition of the step**."""
        count = len(state) // (2 * len(self.cells))
        held = [layout.columns(state[begin : begin + count]).to(x.dtype) for begin in range(0, len(state), count)]
        x = self.enter(x)
        after: list[Tensor] = []
        for layer, hidden, cell in zip(self.cells, held[::2], held[1::2], strict=True):
            after += layer(x, hidden, cell)
            x = after[-2]
        out = self.leave(affine(self.out_bias, self.out_weight, x))
        return (self.factor() * out).squeeze(-2), [leaf.to(state[0].dtype) for slot in after for leaf in layout.leaves(slot)]

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        x, new, layout = self._seen(grads, state)
        leaves = [state[slot][name] for slot in self._slots() for name in grads]
        return self._named(grads, new, layout, *lstm_step(self, x, leaves, layout))

    @torch.no_grad()
    def trace(self, grads: Tree, state: State) -> tuple[Tree, State, Any]:
        """See :class:`~lightning_metaopt.rule.Traced`."""
        x, new, layout = self._seen(grads, state)
        leaves = [state[slot][name] for slot in self._slots() for name in grads]
        out, after, kept = lstm_forward(self, x, leaves, layout)
        return *self._named(grads, new, layout, out, after), (layout, x, leaves, kept)

    @torch.no_grad()
    def pull(self, tape: Any, updates: Tree, state: State) -> tuple[Tree, State]:
        """See :class:`~lightning_metaopt.rule.Traced`."""
        layout, x, leaves, kept = tape
        row = layout.columns([leaf.unsqueeze(1) for leaf in updates.values()]).squeeze(-2)
        coming = [state[slot][name] if slot in state else None for slot in self._slots() for name in updates]
        found, _, before = lstm_backward(self, layout, dict(self.named_parameters()), x, leaves, kept, row, coming)
        return found, self._slotted(updates, before)

    def _seen(self, grads: Tree, state: State) -> tuple[Tensor, State, Columns]:
        # Features as columns, and the new state but for the network's part: all coordinates of all parameters and problems at
        # once, for a few large matrix products.
        new: State = {slot: {} for slot in state}
        kept = [slot for slot in state if slot not in (*self._slots(), "step")]
        seen = []
        for name, grad in grads.items():
            count = new["step"][name] = state["step"][name] + 1
            found, memory = self.features(grad, {slot: state[slot][name] for slot in kept}, expand_to(count, grad))
            seen.append(torch.stack(list(found), 1))
            for slot in kept:
                new[slot][name] = memory[slot]
        layout = Columns([grad.shape for grad in grads.values()], self.replicas)
        return layout.columns(seen), new, layout

    def _named(self, grads: Tree, new: State, layout: Columns, out: Tensor, after: list[Tensor]) -> tuple[Tree, State]:
        updates = {name: part.squeeze(1) for name, part in zip(grads, layout.leaves(out.unsqueeze(-2)), strict=True)}
        return updates, new | self._slotted(grads, after)

    def _slotted(self, grads: Tree, leaves: list[Tensor]) -> State:
        return {slot: dict(zip(grads, leaves[index * len(grads) :], strict=False)) for index, slot in enumerate(self._slots())}

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

    @torch.no_grad()
    def _advance_(self, grad: Tensor, flat: Tree, slots: list[str], kept: list[str], count: Tensor) -> Tensor:
        update = torch.empty_like(grad)
        layout = Columns([])
        for begin in range(0, len(grad), self.chunk):
            part = slice(begin, begin + self.chunk)
            found, memory = self.features(grad[part], {slot: flat[slot][0, part] for slot in kept}, count)
            held = [flat[slot][:, part] for slot in slots]
            update[part], after, _ = lstm_forward(self, torch.stack(list(found)), held, layout, in_place=True)
            for slot in kept:
                flat[slot][0, part] = memory[slot]
            for old, value in zip(held, after, strict=True):
                if old.data_ptr() != value.data_ptr():
                    old.copy_(value)
        return update
