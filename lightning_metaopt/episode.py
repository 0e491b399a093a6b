"""Episodes and the only inner loop of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.task import Task
from lightning_metaopt.tree import Tree, cat, detach, select, tree_map

__all__ = ["Episode", "Order", "differentiable_attention", "full_precision", "start", "step", "unroll"]

Order = Literal["none", "first", "second", "forward", "local"]
"""What the inner loop keeps for differentiation: nothing; the updates, with inner gradients held constant; everything,
so that inner gradients are differentiated too; no graph, but the tangents of forward mode; or only each inner gradient's own
graph, from the iterate that it was taken at, for rules that put the rest together themselves (``Rule.tape``)."""


@dataclass(frozen=True)
class Episode:
    """A batch of inner problems in mid-flight. Immutable: a step returns a new one.

    Attributes:
        task: the problems.
        params: current iterates, leaves ``(B, *shape)``.
        buffers: the problems' own buffers (running statistics), leaves ``(B, ...)``.
        state: the rule's state.
        step: number of inner steps taken.
        origin: the iterates at step 0.
        history: whatever a meta-gradient needs from the past, as slots of trees.
    """

    task: Task
    params: Tree
    buffers: Tree
    state: State
    step: int = 0
    origin: Tree = field(default_factory=dict)
    history: State = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of problems ``B``."""
        return self.task.size

    def detach(self) -> Episode:
        """The same episode, cut from the autograd graph: where truncated differentiation restarts."""
        return replace(
            self,
            params=detach(self.params),
            buffers=detach(self.buffers),
            state={slot: detach(tree) for slot, tree in self.state.items()},
        )

    def select(self, part: slice) -> Episode:
        """The problems ``part``."""
        return replace(
            self,
            task=self.task.select(part),
            params=select(self.params, part),
            buffers=select(self.buffers, part),
            state={slot: select(tree, part) for slot, tree in self.state.items()},
            origin=select(self.origin, part),
            history={slot: select(tree, part) for slot, tree in self.history.items()},
        )

    @staticmethod
    def join(episodes: Sequence[Episode]) -> Episode:
        """Episodes at the same step as one larger batch; the inverse of :meth:`select`.

        Raises:
            ValueError: if the episodes are not at the same step.
        """
        first = episodes[0]
        if any(e.step != first.step for e in episodes):
            raise ValueError(f"only episodes at the same step can be joined, got steps {sorted({e.step for e in episodes})}")
        if len(episodes) == 1:
            return first
        return replace(
            first,
            task=type(first.task).join([e.task for e in episodes]),
            params=cat([e.params for e in episodes]),
            buffers=cat([e.buffers for e in episodes]),
            state={slot: cat([e.state[slot] for e in episodes]) for slot in first.state},
            origin=cat([e.origin for e in episodes]),
            history={slot: cat([e.history[slot] for e in episodes]) for slot in first.history},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the task, in plain containers; a task is drawn again from its family and seed."""
        return {
            "params": detach(self.params),
            "buffers": detach(self.buffers),
            "state": {slot: detach(tree) for slot, tree in self.state.items()},
            "step": self.step,
            "origin": detach(self.origin),
            "history": {slot: detach(tree) for slot, tree in self.history.items()},
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], task: Task) -> Episode:
        """Continue ``task`` where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the state was taken from another number of problems than ``task`` has.
        """
        for name, leaf in state["params"].items():
            if len(leaf) != task.size:
                raise ValueError(
                    f"the saved episode has {len(leaf)} problems (parameter {name!r}), the task has {task.size}; draw the task "
                    "with the seed and size that it was saved with"
                )
        return Episode(task=task, **state)


def start(rule: Rule, task: Task, generator: torch.Generator | None = None, phi: Mapping[str, Tensor] | None = None) -> Episode:
    """Begin an episode: draw the starting point from the task and initialise the rule's state."""
    params, buffers = task.init(generator or torch.Generator().manual_seed(0))
    return Episode(task, params, buffers, under(rule, phi, lambda bound: bound.init(params)), origin=params)


def differentiable_attention(order: Order) -> AbstractContextManager[None]:
    """Where attention has to be computed by the plain kernel: the fused ones have neither second nor forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH) if order in ("second", "forward", "local") else nullcontext()


def full_precision(params: Tree) -> AbstractContextManager[None]:
    """Where a rule computes, in the precision of the parameters: bf16 matrix products would blur the meta-gradient."""
    device = next(iter(params.values())).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _leaf(value: Tensor, order: Order) -> Tensor:
    # What the inner gradient is taken with respect to.
    return value if order == "second" and value.requires_grad else value.detach().requires_grad_()


def step(rule: Rule, episode: Episode, order: Order = "none", alone: bool = False) -> tuple[Episode, Tensor]:
    """One inner step: gradient of the task's loss, update of the rule, new iterates.

    With ``alone``, the leaves of ``episode.params`` and ``episode.state`` are those of one problem, without the axis.

    Returns:
        The next episode, and the losses ``(B,)`` at the iterates **before** the step. With ``order="first"`` the
        gradients are constants; the losses still have their exact derivative with respect to the iterates. Buffers are
        constants in every order.
    """
    params = tree_map(lambda leaf: _leaf(leaf, order), episode.params)
    buffers = tree_map(lambda leaf: leaf.detach().clone(), episode.buffers)
    # At an iterate that depends on nothing (the first of an unroll) gradients and losses are constants.
    twice = order == "second" and any(leaf.requires_grad for leaf in episode.params.values())
    with torch.enable_grad():
        batch = episode.task.batch(episode.step)
        task = episode.task
        loss = task.loss_alone(params, buffers, batch) if alone else task.loss(params, buffers, batch)
        graph = twice or order in ("forward", "local")
        found = torch.autograd.grad(
            loss if alone else loss.sum(), list(params.values()), create_graph=graph, allow_unused=True, materialize_grads=True
        )
        loss = loss.unsqueeze(0) if alone else loss
    grads = dict(zip(params, found, strict=True))
    values = loss if twice else loss.detach()
    if order == "forward":
        grads, values = _with_tangents(grads, values, params, episode.params)
    params = params if twice or order == "local" else episode.params
    if order == "first":
        values = _attach_gradient(values, grads, params)
    with torch.set_grad_enabled(order in ("first", "second")), full_precision(params):
        updates, state = rule(grads, episode.state, params, values)
        params = tree_map(torch.add, params, updates)
    return replace(episode, params=params, buffers=detach(buffers), state=state, step=episode.step + 1), values


def _with_tangents(grads: Tree, values: Tensor, params: Tree, iterates: Tree) -> tuple[Tree, Tensor]:
    # Forward mode through the task, by a product with its Hessian: a task needs no forward derivatives, which many
    # operations lack, but only what the unrolled gradient needs as well.
    known = {name: forward_ad.unpack_dual(leaf).tangent for name, leaf in iterates.items()}
    tangents = {name: tangent.detach() for name, tangent in known.items() if tangent is not None}
    constants = detach(grads)
    if not tangents:
        return constants, values
    slopes = torch.stack([(constants[name] * tangent).reshape(len(values), -1).sum(1) for name, tangent in tangents.items()])
    outputs = [name for name in tangents if grads[name].requires_grad]  # the others are constant
    changes = tree_map(torch.zeros_like, params)
    if outputs:
        found = torch.autograd.grad(
            [grads[name] for name in outputs],
            list(params.values()),
            [tangents[name] for name in outputs],
            allow_unused=True,
            materialize_grads=True,
        )
        changes = detach(dict(zip(params, found, strict=True)))
    return tree_map(forward_ad.make_dual, constants, changes), forward_ad.make_dual(values, slopes.sum(0))


def _attach_gradient(values: Tensor, grads: Tree, params: Tree) -> Tensor:
    # The losses as a first-order function of the iterates: same value, and the gradient that is already known,
    # without keeping the task's graph alive.
    for name, leaf in params.items():
        if leaf.requires_grad:
            values = values + (grads[name] * (leaf - leaf.detach())).reshape(len(values), -1).sum(1)
    return values


def _each_leaf(episode: Episode, change: Callable[[Tensor], Tensor]) -> Episode:
    state = {slot: tree_map(change, tree) for slot, tree in episode.state.items()}
    return replace(episode, params=tree_map(change, episode.params), state=state)


def unroll(
    rule: Rule, episode: Episode, steps: int, phi: Mapping[str, Tensor] | None = None, order: Order = "none"
) -> tuple[Episode, Tensor]:
    """Run ``steps`` inner steps: **the only inner loop in the package**.

    Args:
        rule: the update rule.
        episode: where to start.
        steps: number of steps ``T``, at least 0.
        phi: meta-parameters by name to use instead of the rule's own (perturbed, adapted, dual).
        order: what to keep for differentiation, see :data:`Order`.

    Returns:
        The episode after the steps, and the losses ``(T, B)`` before each step.

    >>> import lightning_metaopt as lmo
    >>> family = lmo.tasks.LeastSquares(dim=3, rows=5)
    >>> rule = lmo.rules.GradientDescent(lr=0.01)
    >>> end, losses = unroll(rule, start(rule, family.draw(seed=0, size=2)), steps=10)
    >>> losses.shape, bool((losses[-1] < losses[0]).all())
    (torch.Size([10, 2]), True)
    """
    # Dropping the axis of a problem that is alone and adding it again costs four operations for each parameter and step.
    alone = episode.size == 1 and rule.elementwise and type(episode.task).loss_alone is not Task.loss_alone

    def run(bound: Rule) -> tuple[Episode, Tensor]:
        if not steps:
            return episode, next(iter(episode.params.values())).new_zeros(0, episode.size)
        current = _each_leaf(episode, lambda leaf: leaf.squeeze(0)) if alone else episode
        losses = []
        with bound.holding():
            for _ in range(steps):
                current, loss = step(bound, current, order, alone)
                losses.append(loss)
        return _each_leaf(current, lambda leaf: leaf.unsqueeze(0)) if alone else current, torch.stack(losses)

    with differentiable_attention(order):
        return under(rule, phi, run)
