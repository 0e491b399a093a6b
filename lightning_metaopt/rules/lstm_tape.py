"""A window of steps of a coordinatewise LSTM, and the way back, in as few operations as it takes.

Small rules are bound by the number of operations. Between steps states stay columns; a hidden state is written where the next
step's matrix product reads it; derivatives go where the gates were; and windows hand their memory on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_metaopt.rule import State, Tape
from lightning_metaopt.rules.lstm_cell import affine, cell_backward, cell_forward, unjoined
from lightning_metaopt.rules.lstm_columns import Columns
from lightning_metaopt.rules.lstm_pools import Split
from lightning_metaopt.rules.lstm_step import layer_names, layers_of, pools_of
from lightning_metaopt.tree import Tree, detach, tree_map

__all__ = ["LSTMTape"]


_Layer = tuple[Split, Split, Split, Tensor]
"""A layer's part in a step: input and old hidden state in one, the gates, the old cell state, the new hidden state."""
_Step = tuple[Tree, Tree, dict[str, Any], Tensor, list[_Layer], Tensor]
"""Parameters and their gradients (in second order with graphs from the one to the other), what features were made with, their
columns, the layers, the output."""


@final
class LSTMTape(Tape):
    """See :class:`~lightning_metaopt.rule.Tape`.

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
        held = [self.layout.columns(list(state[slot].values())) for slot in self.slots]
        self.pools = pools_of(rule.pools, self.layers, held[0])
        self.joints = [pool.take() for pool, _, _ in self.pools]
        for (_, (_, bottom)), hidden in zip(self.joints, held[::2], strict=True):
            bottom.copy_(hidden)
        self.cells: list[Split] = [(cell, ()) for cell in held[1::2]]
        self.tape: list[_Step] = []
        self.total: Tree = {}
        self.out_bias = self.phi["out_bias"].unsqueeze(-1)

    def step(self, grads: Tree, params: Tree) -> Tree:
        constants = detach(grads) if self.second else grads
        self.count = {name: count + 1 for name, count in self.count.items()}
        x, seen = self.rule.see(constants, self.memory, self.count, self.layout)
        self.memory = {slot: {name: one.memory[slot] for name, one in seen.items()} for slot in self.memory}
        layers, below = [], None
        for index, layer in enumerate(self.layers):
            joint, cell = self.joints[index], self.cells[index]
            coming, gates, after = (pool.take() for pool in self.pools[index])
            if below is None:
                self.rule.enter(self.phi, x, out=joint[1][0])
            else:
                joint[1][0].copy_(below)
            below, _, _ = cell_forward(layer, joint[0], cell[0], gates=gates, hidden=coming[1][1], out=after[0])
            layers.append((joint, gates, cell, below))
            self.joints[index], self.cells[index] = coming, after
        assert below is not None
        out = self.rule.leave(affine(self.out_bias, self.phi["out_weight"], below))
        self.tape.append((params, grads, seen, x, layers, out))
        row = (self.rule.factor(self.phi) * out).squeeze(-2)
        return dict(zip(grads, self.layout.unrow(row), strict=True))

    @property
    def state(self) -> State:
        # copies: what comes from a pool goes back there
        pairs = ((joint[1][1], cell[0]) for joint, cell in zip(self.joints, self.cells, strict=True))
        held = [part.clone() for pair in pairs for part in pair]
        names = list(self.count)
        found = {slot: dict(zip(names, self.layout.leaves(part), strict=True)) for slot, part in zip(self.slots, held, strict=True)}
        return self.memory | {"step": self.count} | found

    def begin_backward(self, state: State) -> None:
        arriving = []
        for slot, (cell, _) in zip(self.slots, (cell for cell in self.cells for _ in range(2)), strict=True):
            columns = self.layout.columns(list(state[slot].values())) if slot in state else None
            arriving.append(torch.zeros_like(cell) if columns is None else columns.clone(memory_format=torch.contiguous_format))
        self.hidden, self.cell = arriving[::2], arriving[1::2]
        self.remembered = {slot: state.get(slot) or tree_map(torch.zeros_like, tree) for slot, tree in self.memory.items()}
        self.sums = [(torch.zeros_like(layer.back), layer.bias.new_zeros(layer.bias.shape[:-1])) for layer in self.layers]

    def backward(self, updates: Tree) -> Tree:
        rows = self._output_back(self.layout.rows(list(updates.values())))
        for row in rows.unbind()[::-1]:
            params, grads, seen, x, layers, _ = self.tape.pop()
            through = self.second and bool(self.tape)  # what comes to the first step's parameters is not asked for
            grad_x = self._layers_back(row, x, layers, through)
            if through:
                return self._through(params, grads, seen, grad_x)
        return {}

    def _output_back(self, rows: Tensor) -> Tensor:
        # From updates to what the last layer's weights put out, of many steps at once.
        out, rows = torch.stack([step[-1] for step in self.tape[-len(rows) :]]), rows.unsqueeze(-2)
        factor = self.rule.factor(self.phi)
        scaled = factor * rows
        if "log_scale" in self.phi:
            self._add("log_scale", (scaled * out).sum((0, -2, -1)))
        rows = self.rule.leave_backward(out, scaled)
        self._add("out_bias", rows.sum((0, -1)))
        return rows

    def _layers_back(self, row: Tensor, x: Tensor, layers: list[_Layer], through: bool) -> Tensor:
        weight = self.phi["out_weight"]
        self._add("out_weight", row @ layers[-1][3].mT)
        self.hidden[-1].addcmul_(weight.mT, row)
        for index in reversed(range(len(self.layers))):
            (joint, gates, before, after), (weight, bias), hidden = layers[index], self.sums[index], self.hidden[index]
            self.cell[index], into = cell_backward(self.layers[index], gates, before[0], after, hidden, self.cell[index])
            (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(joint[0], gates[0].mT)
            bias.add_(gates[0].sum(-1))
            rows = into.shape[-2] - hidden.shape[-2]  # ``split`` takes three times as long
            below, self.hidden[index] = into.narrow(-2, 0, rows), into.narrow(-2, rows, hidden.shape[-2])
            if index:
                self.hidden[index - 1].add_(below)
            # nobody needs this step's gates and new states any more; the hidden one is in the next step's input
            for pool, split in zip(self.pools[index], (self.joints[index], gates, self.cells[index]), strict=True):
                pool.give(split)
            self.joints[index], self.cells[index] = joint, before
        grad_x: Tensor
        own, grad_x = self.rule.enter_backward(self.phi, x, joint[1][0], below, through)
        for name, grad in own.items():
            self._add(name, grad)
        return grad_x

    def _add(self, name: str, grad: Tensor) -> None:
        self.total[name] = self.total[name].add_(grad) if name in self.total else grad

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
            products = [(grads[name] * vector[name]).sum() for name in moving]
            product = products[0] if len(products) == 1 else torch.stack(products).sum()
        found = torch.autograd.grad(product, list(params.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(params, found, strict=True))

    def grads(self) -> Tree:
        found = dict(self.total)
        for pools, joint in zip(self.pools, self.joints, strict=True):
            pools[0].give(joint)  # of the first step
        for index, (weight, bias) in enumerate(self.sums):
            found |= dict(zip(layer_names(index), unjoined(weight, bias), strict=True))
        return {self.label(name): grad for name, grad in found.items()}
