"""Several rules of one kind as one: meta-seeds that are trained at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lightning_metaopt.rule import Rule, State, Tape
from lightning_metaopt.rules.l2o_base import CoordinatewiseLSTM
from lightning_metaopt.rules.lstm_tape import LSTMTape
from lightning_metaopt.rules.nested import made, spec
from lightning_metaopt.tree import Tree, escape, unescape

__all__ = ["Stacked"]


@final
class Stacked(Rule):
    """``R`` replicas of a rule with meta-parameters of their own, stacked: each leaf of phi is ``(R, *shape)``.

    A batch of problems is dealt out in R equal parts, the first to replica 0, the next to replica 1, and so on. What they compute
    is what each computes alone, in one pass: small rules are bound by the number of operations as much as by their size.

    For replicas that differ in nothing but their start, wrap the family in :class:`~lightning_metaopt.tasks.Repeated`: all meet the
    same problems then (in one process, and with ``Unrolled(chunk=None)`` where a task prefers chunks). To make a meta-step of
    all what it is for each alone, wrap the objective in :class:`~lightning_metaopt.objectives.PerReplica`: otherwise
    meta-gradients are R times smaller, which Adam forgives (but for its eps) and others do not. Clipping by norm, validation and
    the guard of a :class:`~lightning_metaopt.MetaLearner` look at all replicas together.

    Args:
        rules: of one class and configuration. They are copied. In a file they stand as ``{"class": name, "init": arguments}``.

    Raises:
        ValueError: for no rules, or rules of different kinds; in a step, for a number of problems that R does not divide.

    >>> import lightning_metaopt as lmo
    >>> rule = Stacked([lmo.rules.RNNprop(hidden=4, seed=seed) for seed in range(3)])
    >>> family = lmo.tasks.Repeated(lmo.tasks.Lasso(), 3)
    >>> end, losses = lmo.episode.unroll(rule, lmo.episode.start(rule, family.draw(seed=0, size=6)), 5)
    >>> losses.shape, [type(one).__name__ for one in rule.replicas()]
    (torch.Size([5, 6]), ['RNNprop', 'RNNprop', 'RNNprop'])
    """

    def __init__(self, rules: Sequence[Rule | Mapping[str, Any]]) -> None:
        super().__init__()
        built = [made(one) for one in rules]
        if not built:
            raise ValueError("there is nothing to stack: pass at least one rule")
        kinds = {(type(one), str(one.config)) for one in built}
        if len(kinds) > 1:
            raise ValueError(
                f"only rules of one class and configuration can be stacked, got {sorted(f'{k.__name__} {c}' for k, c in kinds)}"
            )
        self.count = len(built)
        self.joint = built[0].joint
        self._kind = [copy.deepcopy(built[0]).requires_grad_(False)]  # in a list: its own values are no meta-parameters
        values, buffers = stack_module_state(built)
        if buffers:
            raise ValueError(f"{type(built[0]).__name__} has buffers and cannot be stacked")
        if isinstance(self._kind[0], CoordinatewiseLSTM):
            self._kind[0].replicas = self.count  # it does them all at once itself
        self.values = nn.ParameterDict({escape(name): nn.Parameter(value.detach()) for name, value in values.items()})

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        return self._kind[0].shapes

    @property
    def config(self) -> dict[str, Any]:
        return {"rules": [spec(self._kind[0])] * self.count}

    def replicas(self) -> list[Rule]:
        """The rules one by one, as ordinary rules with copies of their values."""
        found = []
        for index in range(self.count):
            rule = copy.deepcopy(self._kind[0]).requires_grad_()
            if isinstance(rule, CoordinatewiseLSTM):
                rule.replicas = None
            for name, value in rule.named_parameters():
                value.data = self.values[escape(name)].detach()[index].clone()
            found.append(rule)
        return found

    def init(self, params: Tree) -> State:
        self._check(params)
        if isinstance(self._kind[0], CoordinatewiseLSTM):
            return self._kind[0].init(params)
        return self._joined(self._each(lambda rule, part: rule.init(part), self._split(params)))

    def forward(self, grads: Tree, state: State, params: Tree, loss: Tensor | None = None) -> tuple[Tree, State]:
        self._check(grads)
        if isinstance(self._kind[0], CoordinatewiseLSTM):
            found: tuple[Tree, State] = functional_call(self._kind[0], self._phi(), (grads, state, params, loss))
            return found
        split = {slot: self._split(tree) for slot, tree in state.items()}
        arguments = (self._split(grads), split, self._split(params))
        if loss is not None:
            arguments = (*arguments, self._split({"": loss})[""])  # type: ignore[assignment]  # one more
        updates, new = self._each(lambda rule, *given: rule(*given), *arguments)
        return self._joined({"": updates})[""], self._joined(new)

    def tape(self, state: State, second: bool) -> Tape | None:
        kind = self._kind[0]
        phi = self._phi()
        if not isinstance(kind, CoordinatewiseLSTM) or not kind.fits(state, phi):
            return None
        return LSTMTape(kind, phi, state, second, label=lambda name: f"values.{escape(name)}")

    def project_(self) -> None:
        rules = self.replicas()
        for index, rule in enumerate(rules):
            rule.project_()
            for name, value in rule.named_parameters():
                self.values[escape(name)].data[index] = value.detach()

    def describe(self) -> dict[str, float]:
        each = [rule.describe() for rule in self.replicas()]
        return {f"{name}_{index}": value for index, one in enumerate(each) for name, value in one.items()}

    def _each(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        kind = self._kind[0]

        def one(own: Tree, *given: Any) -> Any:
            return functional_call(_Call(kind, compute), {f"rule.{name}": value for name, value in own.items()}, given)

        return vmap(one, in_dims=0)(self._phi(), *arguments)

    def _phi(self) -> Tree:
        return {unescape(name): value for name, value in self.values.items()}

    def _check(self, tree: Tree) -> None:
        problems = len(next(iter(tree.values())))
        if problems % self.count:
            raise ValueError(f"{problems} problems cannot be dealt out to {self.count} replicas; take a multiple")

    def _split(self, tree: Tree) -> Tree:
        return {name: leaf.unflatten(0, (self.count, -1)) for name, leaf in tree.items()}

    def _joined(self, state: State) -> State:
        return {slot: {name: leaf.flatten(0, 1) for name, leaf in tree.items()} for slot, tree in state.items()}


class _Call(nn.Module):
    """Lets ``functional_call`` put values into a rule for any computation with it."""

    def __init__(self, rule: Rule, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.rule, self.compute = rule, compute

    def forward(self, *given: Any) -> Any:
        return self.compute(self.rule, *given)
