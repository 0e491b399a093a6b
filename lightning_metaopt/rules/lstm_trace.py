"""A window of steps of a coordinatewise LSTM, and the way back, in as few operations as it takes.

Between steps states stay columns; hidden states are written where the next step's matrix product reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.rule import State, Trace
from lightning_metaopt.rules.lstm_cell import affine, cell_backward, cell_forward, unjoined
from lightning_metaopt.rules.lstm_columns import Columns
from lightning_metaopt.rules.lstm_step import layer_names, layers_of, output_backward
from lightning_metaopt.tree import Tree, detach

__all__ = ["LSTMTrace"]


_Layer = tuple[Tensor, Tensor, Tensor, Tensor]
"""A layer's part in a step: input and old hidden state in one, the gates, the old cell state, the new hidden state."""
_Step = tuple[Tree, Tree, dict[str, Any], Tensor, list[_Layer], Tensor]
"""Parameters and their gradients (in second order with graphs from the one to the other), what features were made with, their
columns, the layers, the output."""


@final
class LSTMTrace(Trace):
    """See :class:`~lightning_metaopt.rule.Trace`.

    Args:
        rule: a :class:`~lightning_metaopt.rules.l2o_base.CoordinatewiseLSTM`.
        phi: its meta-parameters by name.
        state: before the first step, in the precision of the parameters.
        second: differentiate gradients too.
        label: what the name of a meta-parameter is in :meth:`grads`.
    """

    def __init__(
        self, rule: Any, phi: Mapping[str, Tensor], state: State, second: bool, label: Callable[[str], str] = lambda name: name
    ) -> None:
        self.rule, self.second, self.label = rule, second, label
        self.phi = {name: value.detach() for name, value in phi.items()}
        self.layers = layers_of(self.phi)
        self.slots, self.count = rule.slots(), state["step"]
        self.memory = {slot: tree for slot, tree in state.items() if slot not in (*self.slots, "step")}
        self.layout = Columns([leaf[:, 0].shape for leaf in state[self.slots[0]].values()], rule.replicas)
        held = self._columns(state)
        self.joints = [self._room(layer.weight, hidden) for layer, hidden in zip(self.layers, held[::2], strict=True)]
        for (_, (_, bottom)), hidden in zip(self.joints, held[::2], strict=True):
            bottom.copy_(hidden)
        self.cells = held[1::2]
        self.tape: list[_Step] = []
        self.total: Tree = {}
        self.out_bias = self.phi["out_bias"].unsqueeze(-1)

    def _columns(self, state: State) -> list[Tensor]:
        return [self.layout.columns(list(state[slot].values())) for slot in self.slots]

    def _room(self, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        # A layer's joint input, and its two parts.
        size, rows = hidden.shape[-2], weight.shape[-1]
        joint = hidden.new_empty(*hidden.shape[:-2], rows, hidden.shape[-1])
        return joint, _halves(joint, size)

    def step(self, grads: Tree, params: Tree) -> Tree:
        constants = detach(grads) if self.second else grads
        self.count = {name: count + 1 for name, count in self.count.items()}
        x, seen = self.rule.see(constants, self.memory, self.count, self.layout)
        self.memory = {slot: {name: one.memory[slot] for name, one in seen.items()} for slot in self.memory}
        layers, below = [], None
        for index, layer in enumerate(self.layers):
            (joint, (top, bottom)), cell = self.joints[index], self.cells[index]
            if below is None:
                self.rule.enter(self.phi, x, out=top)
            else:
                top.copy_(below)
            self.joints[index] = coming = self._room(layer.weight, bottom)
            below, self.cells[index], gates = cell_forward(layer, joint, cell, hidden=coming[1][1])
            layers.append((joint, gates, cell, below))
        assert below is not None
        out = self.rule.leave(affine(self.out_bias, self.phi["out_weight"], below))
        self.tape.append((params, grads, seen, x, layers, out))
        row = (self.rule.factor(self.phi) * out).squeeze(-2)
        return dict(zip(grads, self.layout.unrow(row), strict=True))

    @property
    def state(self) -> State:
        held = [part for (_, (_, bottom)), cell in zip(self.joints, self.cells, strict=True) for part in (bottom.clone(), cell)]
        names = list(self.count)
        found = {slot: dict(zip(names, self.layout.leaves(part), strict=True)) for slot, part in zip(self.slots, held, strict=True)}
        return self.memory | {"step": self.count} | found

    def turn(self, state: State) -> None:
        held = [part.clone(memory_format=torch.contiguous_format) for part in self._columns(state)]
        self.hidden, self.cell = held[::2], held[1::2]
        self.remembered = {slot: state[slot] for slot in self.memory}
        self.sums = [(torch.zeros_like(layer.back), layer.bias.new_zeros(layer.bias.shape[:-1])) for layer in self.layers]

    def back(self, updates: Tree) -> Tree:
        params, grads, seen, x, layers, out = self.tape.pop()
        row = self.layout.row(list(updates.values()))
        found, row = output_backward(self.rule, self.phi, out, layers[-1][3], row)
        self.hidden[-1].addcmul_(self.phi["out_weight"].mT, row)
        for index in reversed(range(len(self.layers))):
            (joint, slopes, before, after), (weight, bias), hidden = layers[index], self.sums[index], self.hidden[index]
            self.cell[index], into = cell_backward(self.layers[index], slopes, before, after, hidden, self.cell[index])
            (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(joint, slopes.mT)
            bias.add_(slopes.sum(-1))
            below, self.hidden[index] = _halves(into, hidden.shape[-2])
            if index:
                self.hidden[index - 1].add_(below)
        through = self.second and bool(self.tape)  # what comes to the first step's parameters is not asked for
        y = joint.narrow(-2, 0, below.shape[-2])
        own, grad_x = self.rule.enter_backward(self.phi, x, y, below, through)
        for name, grad in (found | own).items():
            self.total[name] = self.total[name].add_(grad) if name in self.total else grad
        return self._through(params, grads, seen, grad_x) if through else {}

    def _through(self, params: Tree, grads: Tree, seen: dict[str, Any], grad_x: Tensor) -> Tree:
        arriving = [self.layout.unrow(row) for row in grad_x.unbind(-2)]
        vector: Tree = {}
        memory: State = {slot: {} for slot in self.memory}
        for index, (name, one) in enumerate(seen.items()):
            coming = {slot: tree[name] for slot, tree in self.remembered.items()}
            rows = [row[index] for row in arriving]
            vector[name], before = self.rule.features_backward(grads[name].detach(), one, rows, coming)
            for slot, tree in memory.items():
                tree[name] = before[slot]
        self.remembered = memory
        moving = [name for name, grad in grads.items() if grad.requires_grad]  # others are constants
        if not moving:
            return {}
        with torch.enable_grad():  # a number: autograd is slow to take vectors
            product = torch.stack([(grads[name] * vector[name]).sum() for name in moving]).sum()
        found = torch.autograd.grad(product, list(params.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(params, found, strict=True))

    def grads(self) -> Tree:
        found = dict(self.total)
        for index, (weight, bias) in enumerate(self.sums):
            found |= dict(zip(layer_names(index), unjoined(weight, bias), strict=True))
        return {self.label(name): grad for name, grad in found.items()}


def _halves(joint: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # ``joint.split`` takes three times as long
    rows = joint.shape[-2] - size
    return joint.narrow(-2, 0, rows), joint.narrow(-2, rows, size)
