"""Forward mode through the inner loop: memory that does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.tree import Tree, tree_map

__all__ = ["ForwardMode"]

PREFIX = "tangents/"  # of the slots of Episode.history that hold the tangents


@final
class ForwardMode(MetaGradient):
    """Forward-mode differentiation of the inner loop, exact over the *whole* trajectory and not only over this window.

    With :math:`s_t` all that a step carries (iterates and the rule's state) and :math:`s_{t+1} = F_t(s_t, \\phi)`, the
    derivative :math:`Z_t = ds_t/d\\phi` follows the trajectory,

    .. math:: Z_{t+1} = \\partial_s F_t\\, Z_t + \\partial_\\phi F_t , \\qquad Z_0 = 0,

    one column for each of the :math:`K` entries of :math:`\\phi` (real-time recurrent learning). The columns travel with
    the episode, in ``episode.history`` as leaves ``(B, K, *shape)``, so that memory is :math:`K` times the size of the
    episode however many steps it has made, and short windows see the long horizon. Time is about :math:`K` unrolls with
    products, so this is for rules with a handful of meta-parameters.

    While :math:`\\phi` stays as it is, the estimate is the exact gradient of the window's objective through every step
    since the episode began. When :math:`\\phi` moves between windows, it is the exact derivative with respect to one
    common shift of every :math:`\\phi` that was used on the way.

    Args:
        steps: inner steps of one estimate, ``T``.
        max_bytes: the most that the columns of one episode may take. (While an estimate runs, the columns before and
            after the window both exist.)
        carry: keep the columns from one call to the next; otherwise each window starts anew, with the same gradient as
            :class:`~lightning_metaopt.Unrolled`.

    Raises:
        ValueError: before anything is computed, if the columns would exceed ``max_bytes``, or if the episode carries
            the columns of another rule.
        NotImplementedError: if an operation in the rule has no forward derivative in PyTorch. (The task needs none: its
            part is a product with the inner Hessian.)

    >>> import lightning_metaopt as lmo
    >>> family, rule = lmo.tasks.LeastSquares(dim=3, rows=5), lmo.rules.GradientDescent(lr=0.01)
    >>> episode = lmo.episode.start(rule, family.draw(seed=0, size=4))
    >>> forward, reverse = lmo.ForwardMode(steps=5), lmo.Unrolled(steps=5)
    >>> slopes = [how(rule, episode, lmo.objectives.FinalLoss()).grads["log_lr"] for how in (forward, reverse)]
    >>> torch.allclose(*slopes)
    True
    """

    def __init__(self, steps: int = 1, max_bytes: int = 2**30, carry: bool = True) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.max_bytes = max_bytes
        self.carry = carry
        self._columns = 1

    @property
    def exact_of(self) -> str:
        through = "all steps since the episode began" if self.carry else "these steps"
        return f"the objective over {self.steps} steps, through {through}"

    @property
    def inner_steps(self) -> int:
        return self.steps

    @property
    def gradient_evaluations(self) -> int:
        """For the rule of the latest call (before the first: for one meta-parameter): an unroll, and for each column another
        one in which every gradient comes with a Hessian product.
        """
        return self.steps + 1 + 3 * self.steps * self._columns

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        phi = {name: value.detach() for name, value in rule.named_parameters()}
        columns = sum(value.numel() for value in phi.values())
        episode = episode.detach()
        size = self._check_size(episode, columns)
        self._columns = columns
        before = _carried(episode, columns) if self.carry else {}
        end, losses = unroll(rule, episode, self.steps)
        value, adjoint = _pull_back(objective, rule, phi, episode, end, losses)
        grads = {name: adjoint.phi[name].clone() for name in phi}
        after: State = {}
        column = 0
        for name, parameter in phi.items():
            for entry in range(parameter.numel()):
                direction = torch.zeros_like(parameter)
                direction.view(-1)[entry] = 1.0
                with _explained(), forward_ad.dual_level(), torch.no_grad():
                    dual_phi = {**phi, name: forward_ad.make_dual(parameter, direction)}
                    begin = _with_tangents(episode, before, column)
                    reached, passed = unroll(rule, begin, self.steps, dual_phi, order="forward")
                    slope = adjoint.along(begin, reached, passed)
                    if self.carry:
                        _store(reached, after, column, columns)
                grads[name].view(-1)[entry] += slope
                column += 1
        history = {slot: tree for slot, tree in episode.history.items() if not slot.startswith(PREFIX)}
        info = {"columns": float(columns), "tangent_bytes": float(size)}
        return Estimate(value, grads, replace(end, history={**history, **after}), info)

    def _check_size(self, episode: Episode, columns: int) -> int:
        carried = [leaf for _, _, leaf in _carriers(episode)]
        numbers = sum(leaf.numel() for leaf in carried)
        size = columns * sum(leaf.numel() * leaf.element_size() for leaf in carried)
        if size > self.max_bytes:
            raise ValueError(
                f"forward mode stores K x n numbers: K = {columns} meta-parameters times n = {numbers} numbers in the episode "
                f"({episode.size} problems, iterates and state) are {size:,} bytes, more than max_bytes = {self.max_bytes:,}. "
                "Use Unrolled (reverse mode), a rule with fewer meta-parameters or fewer problems at once, or raise max_bytes"
            )
        return size


def _carriers(episode: Episode) -> Iterator[tuple[str, str, Tensor]]:
    # What a step hands to the next one and may depend on phi: (slot of the tangents, name, value).
    for name, leaf in episode.params.items():
        yield PREFIX + "params", name, leaf
    for slot, tree in episode.state.items():
        for name, leaf in tree.items():
            if leaf.is_floating_point():
                yield f"{PREFIX}state/{slot}", name, leaf


def _carried(episode: Episode, columns: int) -> State:
    tangents = {slot: tree for slot, tree in episode.history.items() if slot.startswith(PREFIX)}
    if not tangents and episode.step == 0:
        return {}
    if not tangents:
        raise ValueError(
            f"the episode has made {episode.step} steps without its tangents, so the gradient through them is lost; start a new "
            "episode, or pass carry=False to differentiate from here on"
        )
    for slot, name, leaf in _carriers(episode):
        found = tangents.get(slot, {}).get(name)
        if found is None or found.shape != (leaf.shape[0], columns, *leaf.shape[1:]):
            raise ValueError(
                f"the episode carries the tangents of another rule ({slot}: {name!r} does not fit {columns} meta-parameters); "
                "start a new episode for this rule"
            )
    return tangents


def _with_tangents(episode: Episode, tangents: State, column: int) -> Episode:
    if not tangents:
        return episode

    def dual(slot: str, tree: Tree) -> Tree:
        known = tangents.get(PREFIX + slot, {})
        return {
            name: forward_ad.make_dual(leaf, known[name][:, column].contiguous()) if name in known else leaf
            for name, leaf in tree.items()
        }

    state = {slot: dual(f"state/{slot}", tree) for slot, tree in episode.state.items()}
    return replace(episode, params=dual("params", episode.params), state=state)


def _store(episode: Episode, tangents: State, column: int, columns: int) -> None:
    for slot, name, leaf in _carriers(episode):
        primal, tangent = forward_ad.unpack_dual(leaf)
        tree = tangents.setdefault(slot, {})
        if name not in tree:
            tree[name] = primal.new_zeros(primal.shape[0], columns, *primal.shape[1:])
        if tangent is not None:
            tree[name][:, column] = tangent


@dataclass(frozen=True)
class _Adjoint:
    # The objective's derivatives with respect to all that it depends on.
    phi: Tree
    start: list[Tensor]
    end: list[Tensor]
    losses: Tensor

    def along(self, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        total = self.losses.new_zeros(())
        values = [*(leaf for _, _, leaf in _carriers(start)), *(leaf for _, _, leaf in _carriers(end)), losses]
        for vector, value in zip([*self.start, *self.end, self.losses], values, strict=True):
            tangent = forward_ad.unpack_dual(value).tangent
            if tangent is not None:
                total = total + (vector * tangent).sum()
        return total


def _pull_back(
    objective: Objective, rule: Rule, phi: Tree, start: Episode, end: Episode, losses: Tensor
) -> tuple[Tensor, _Adjoint]:
    # In reverse mode, once for all columns.
    leaf = {name: value.clone().requires_grad_() for name, value in phi.items()}
    begin, reached, passed = _as_leaves(start), _as_leaves(end), losses.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = under(rule, leaf, lambda bound: objective(bound, begin, reached, passed)).mean()
    ends = [[value for _, _, value in _carriers(episode)] for episode in (begin, reached)]
    inputs = [*leaf.values(), *ends[0], *ends[1], passed]
    if value.requires_grad:
        found = [grad.detach() for grad in torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]
    else:
        found = [torch.zeros_like(tensor) for tensor in inputs]
    own, first, last = len(leaf), len(ends[0]), len(ends[1])
    adjoint = _Adjoint(
        dict(zip(leaf, found[:own], strict=True)), found[own : own + first], found[own + first : own + first + last], found[-1]
    )
    return value.detach(), adjoint


def _as_leaves(episode: Episode) -> Episode:
    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    state: State = {slot: tree_map(leaf, tree) for slot, tree in episode.state.items()}
    return replace(episode, params=tree_map(leaf, episode.params), state=state)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "jvp" not in str(error):
            raise
        raise NotImplementedError(
            f"forward mode is not possible with this rule: {str(error).splitlines()[0]} Use Unrolled (reverse mode), or write "
            "the operation with others that have a forward derivative"
        ) from error
