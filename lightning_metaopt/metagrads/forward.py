"""Forward mode through the inner loop: memory that does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_metaopt.episode import Episode, differentiable_attention, unroll
from lightning_metaopt.metagrads.base import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective
from lightning_metaopt.rule import Rule, State, under
from lightning_metaopt.tree import Tree

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
        NotImplementedError: if an operation in the task's loss or in the rule has no forward derivative in PyTorch.

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
        """For the rule of the latest call (before the first: for one meta-parameter); a column costs an unroll in which
        every gradient is evaluated together with a Hessian product.
        """
        return self._columns * (3 * self.steps + 1)

    def __call__(self, rule: Rule, episode: Episode, objective: Objective) -> Estimate:
        phi = {name: value.detach() for name, value in rule.named_parameters()}
        columns = sum(value.numel() for value in phi.values())
        episode = episode.detach()
        size = self._check_size(episode, columns)
        self._columns = columns
        before = _carried(episode, columns) if self.carry else {}
        after: State = {}
        slopes: list[Tensor] = []
        value, end = torch.zeros(()), episode
        for name, parameter in phi.items():
            for entry in range(parameter.numel()):
                direction = torch.zeros_like(parameter)
                direction.view(-1)[entry] = 1.0
                with _explained(), forward_ad.dual_level(), torch.no_grad():
                    dual_phi = {**phi, name: forward_ad.make_dual(parameter, direction)}
                    begin = _with_tangents(episode, before, len(slopes))
                    reached, losses = unroll(rule, begin, self.steps, dual_phi, order="forward")
                    value, slope = self._objective(rule, dual_phi, objective, (begin, reached), losses)
                    end = _split(reached, after, len(slopes), columns)
                slopes.append(slope)
        flat = torch.stack(slopes).split([parameter.numel() for parameter in phi.values()])
        grads = {name: piece.view_as(phi[name]) for name, piece in zip(phi, flat, strict=True)}
        history = {slot: tree for slot, tree in episode.history.items() if not slot.startswith(PREFIX)}
        history.update(after if self.carry else {})
        return Estimate(value, grads, replace(end, history=history), {"columns": float(columns), "tangent_bytes": float(size)})

    def _objective(
        self, rule: Rule, phi: Tree, objective: Objective, ends: tuple[Episode, Episode], losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        with differentiable_attention("forward"):
            value = under(rule, phi, lambda bound: objective(bound, *ends, losses)).mean()
        primal, tangent = forward_ad.unpack_dual(value)
        return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent.detach()

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


def _split(episode: Episode, tangents: State, column: int, columns: int) -> Episode:
    # Take the dual numbers of one column apart: its tangents into the store, the values into the episode that goes on.
    for slot, name, leaf in _carriers(episode):
        primal, tangent = forward_ad.unpack_dual(leaf)
        tree = tangents.setdefault(slot, {})
        if name not in tree:
            tree[name] = primal.new_zeros(primal.shape[0], columns, *primal.shape[1:])
        if tangent is not None:
            tree[name][:, column] = tangent.detach()

    def values(tree: Tree) -> Tree:
        return {name: forward_ad.unpack_dual(leaf).primal.detach() for name, leaf in tree.items()}

    return replace(episode, params=values(episode.params), state={slot: values(tree) for slot, tree in episode.state.items()})


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "jvp" not in str(error):
            raise
        raise NotImplementedError(
            f"forward mode is not possible here: {str(error).splitlines()[0]} Use Unrolled (reverse mode) for this task and "
            "rule, or write the operation with others that have a forward derivative"
        ) from error
