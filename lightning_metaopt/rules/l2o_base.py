"""Coordinatewise LSTMs: the network that learned optimizers share, in meta-training and deployed on large models."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_metaopt.rule import Rule, State
from lightning_metaopt.rules.lstm_cell import LSTMLayer, affine, linear_map
from lightning_metaopt.rules.lstm_columns import Columns
from lightning_metaopt.rules.lstm_pools import Pools
from lightning_metaopt.rules.lstm_step import layers_of, lstm_forward, lstm_step, pools_of
from lightning_metaopt.rules.lstm_tape import LSTMTape
from lightning_metaopt.tree import Tree, expand_to

__all__ = ["CoordinatewiseLSTM", "Seen"]


class Seen(NamedTuple):
    """What a rule's features make of a gradient."""

    features: Sequence[Tensor]
    """Each of the gradient's shape."""
    memory: dict[str, Tensor]
    """The features' own state after the step."""
    kept: Sequence[Tensor] = ()
    """What :meth:`CoordinatewiseLSTM.features_backward` needs besides."""


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
        self.pools = Pools()

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
    def features(self, grad: Tensor, memory: Mapping[str, Tensor], count: Tensor) -> Seen:
        """Features and the new memory, element by element, in the step number ``count`` (from 1)."""

    @abstractmethod
    def features_backward(
        self, grad: Tensor, seen: Seen, arriving: Sequence[Tensor], memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """From derivatives with respect to the features (``arriving``) and to the new memory to those with respect to the gradient
        and to the old memory; without autograd.
        """

    @abstractmethod
    def enter(self, phi: Tree, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What goes before the first layer, ``(number of features, N)`` to ``(features, N)``, with ``out`` written there."""

    @abstractmethod
    def enter_backward(self, phi: Tree, x: Tensor, y: Tensor, grad: Tensor, through: bool = True) -> tuple[Tree, Tensor]:
        """Of :meth:`enter` at ``x``, where its value is ``y``: derivatives by name of the meta-parameter, and that of ``x``,
        which is not looked at without ``through``.
        """

    @abstractmethod
    def leave(self, out: Tensor) -> Tensor:
        """What comes after the last layer and before the scale, element by element."""

    @abstractmethod
    def leave_backward(self, left: Tensor, grad: Tensor) -> Tensor:
        """The derivative of :meth:`leave` where its value is ``left``."""

    def init(self, params: Tree) -> State:
        state = self.memory(params)
        state["step"] = {name: torch.zeros(len(leaf), dtype=torch.float32, device=leaf.device) for name, leaf in params.items()}
        for slot in self.slots():
            state[slot] = {name: self._zeros(leaf) for name, leaf in params.items()}
        return state

    def _zeros(self, leaf: Tensor) -> Tensor:
        # (B, hidden, *shape): one problem's states are the columns of a matrix without a copy.
        dtype = torch.bfloat16 if self.bf16 else leaf.dtype
        return torch.zeros(len(leaf), self.hidden, *leaf.shape[1:], dtype=dtype, device=leaf.device)

    def slots(self) -> list[str]:
        """The network's own: hidden and cell state by layer."""
        return [f"{part}{index}" for index in range(len(self.cells)) for part in ("hidden", "cell")]

    def factor(self, phi: Tree) -> Tensor | float:
        """What the last layer is multiplied by; learned ones have axes that fit columns, also those of replicas."""
        return phi["log_scale"].exp()[..., None, None] if "log_scale" in phi else self.scale

    def plain(self, x: Tensor, state: Sequence[Tensor], layout: Columns) -> tuple[Tensor, list[Tensor]]:
        """Updates ``(N,)`` and new state from the columns ``x`` of features: **the definition of the step**."""
        phi, count = self.phi(), len(state) // (2 * len(self.cells))
        held = [layout.columns(state[begin : begin + count]).to(x.dtype) for begin in range(0, len(state), count)]
        x = self.enter(phi, x)
        after: list[Tensor] = []
        for layer, hidden, cell in zip(self.cells, held[::2], held[1::2], strict=True):
            after += layer(x, hidden, cell)
            x = after[-2]
        out = self.leave(affine(self.out_bias.unsqueeze(-1), self.out_weight, x))
        return (self.factor(phi) * out).squeeze(-2), [leaf.to(state[0].dtype) for slot in after for leaf in layout.leaves(slot)]

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        slots = self.slots()
        layout = Columns([grad.shape for grad in grads.values()], self.replicas)
        memory = {slot: tree for slot, tree in state.items() if slot not in (*slots, "step")}
        count = {name: state["step"][name] + 1 for name in grads}
        x, seen = self.see(grads, memory, count, layout)
        row, after = lstm_step(self, x, [state[slot][name] for slot in slots for name in grads], layout)
        found = {slot: dict(zip(grads, after[index * len(grads) :], strict=False)) for index, slot in enumerate(slots)}
        new = {slot: {name: one.memory[slot] for name, one in seen.items()} for slot in memory}
        return dict(zip(grads, layout.unrow(row), strict=True)), new | {"step": count} | found

    def see(self, grads: Tree, memory: State, count: Tree, layout: Columns) -> tuple[Tensor, dict[str, Seen]]:
        """Features as columns, all coordinates of all parameters and problems at once for a few large matrix products, and what
        they are, by name of the parameter. ``count`` is the step's.
        """
        seen = {}
        for name, grad in grads.items():
            seen[name] = self.features(grad, {slot: tree[name] for slot, tree in memory.items()}, expand_to(count[name], grad))
        rows = zip(*(one.features for one in seen.values()), strict=True)
        return torch.stack([layout.row(row) for row in rows], -2), seen

    def tape(self, state: State, second: bool) -> LSTMTape | None:
        phi = self.phi()
        return LSTMTape(self, phi, state, second) if self.fits(state, phi) else None

    def fits(self, state: State, phi: Tree) -> bool:
        """Whether the state is of the precision of phi; another is rounded between steps, which a tape does not do."""
        return {leaf.dtype for slot in self.slots() for leaf in state[slot].values()} == {phi["out_weight"].dtype}

    def phi(self) -> Tree:
        """The meta-parameters by name."""
        return dict(self.named_parameters())

    def forward_(
        self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None, scale: Mapping[str, float] | None = None
    ) -> None:
        slots, kept = self.slots(), [slot for slot in state if slot not in (*self.slots(), "step")]
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
        phi = self.phi()
        layers = layers_of(phi)
        for begin in range(0, len(grad), self.chunk):
            part = slice(begin, begin + self.chunk)
            seen = self.features(grad[part], {slot: flat[slot][0, part] for slot in kept}, count)
            x, held = torch.stack(list(seen.features)), [flat[slot][:, part] for slot in slots]
            if not begin or len(x[0]) < self.chunk:
                buffers = [(joint.take(), gates.take()) for joint, gates, _ in pools_of(Pools(), layers, x)]
            update[part], after, _ = lstm_forward(self, phi, layers, x, held, buffers)
            for slot in kept:
                flat[slot][0, part] = seen.memory[slot]
            for old, value in zip(held, after, strict=True):
                if old.data_ptr() != value.data_ptr():
                    old.copy_(value)
        return update
