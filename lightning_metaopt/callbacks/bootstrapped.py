"""Bootstrapped meta-gradients on the steps of any optimizer: targets from steps that are tried ahead and not taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_metaopt.callbacks.hooks import Move
from lightning_metaopt.callbacks.pieces import precise
from lightning_metaopt.online.target import Mu, check_target, pull_of_target
from lightning_metaopt.recording import Moment
from lightning_metaopt.replay import Replay
from lightning_metaopt.snapshot import undisturbed
from lightning_metaopt.tree import Tree

__all__ = ["Bootstrap", "bind"]

Shorten = Callable[[list[Tensor], list[Tensor]], float]


@final
class Bootstrap:
    """Replaces the gradient :math:`g_t` in the meta-gradient :math:`g_t P_{t-1}` by the pull of a target (Eq. 10).

    .. math:: \\nabla\\mu(x_t) - \\nabla\\mu(z_t), \\qquad z_t = y_K - \\eta\\nabla f(y_K), \\quad y_0 = x_t,\\;
              y_{k+1} = y_k - \\mathrm{lr}_t\\, w_t P(y_k) .

    The first step ahead is the one that the base optimizer has just made; the others are made by a copy of it, which goes on from
    its state. Steps ahead are shortened like those that are taken. All gradients are those of the batch at hand, with the same
    random numbers: the step whose factors are judged, from :math:`x_{t-1}` to :math:`x_t`, has not seen that batch, and the one
    after it is not known yet.

    For :math:`\\mu = \\tfrac12\\|\\cdot\\|^2` the pull is a gradient and the way to it, :math:`\\eta\\nabla f(y_K) + h_t` with
    :math:`h_t = x_t - y_K`. In Algorithm 3 of the paper these :math:`h_t` add up, as hints do without error correction. With
    momentum they are mostly steps that follow from the last one in any case, and every factor grows until training breaks down.
    ``corrected`` takes the last one off again, :math:`\\eta\\nabla f(y_K) + h_t - h_{t-1}`, as AO-FTRL does, but for one term: the
    correction of Theorem 3 takes off :math:`\\eta(\\nabla f(y_K) - g_t)` of the last step as well.

    Args:
        lookahead: :math:`K`; so many gradients are computed more in each step, and one more yet for ``mu="loss"``.
        target_lr: :math:`\\eta`, the last step to the target (the paper takes 1).
        mu: ``"euclidean"`` for :math:`\\mu = \\tfrac12\\|\\cdot\\|^2`, ``"loss"`` for :math:`\\mu = f`.
        corrected: whether :math:`h_{t-1}` is taken off again; ``None`` for base optimizers with momentum only. For ``"euclidean"``.
    """

    def __init__(self, lookahead: int = 1, target_lr: float = 1.0, mu: Mu = "euclidean", corrected: bool | None = False) -> None:
        check_target(lookahead, mu)
        if corrected and mu == "loss":
            raise ValueError("corrected=True is for mu='euclidean': with mu='loss' there is nothing of the steps ahead in the pull")
        self.options: dict[str, Any] = {"lookahead": lookahead, "target_lr": target_lr, "mu": mu}
        self.corrected = corrected
        self.hints: dict[Tensor, Tensor] = {}  # h of the last step
        self.moments: list[Moment] = []
        self.replay: Replay | None = None
        self._clip: Callable[[Optimizer], None] | None = None
        self._average: Callable[[Tensor], Tensor] | None = None
        self._scale: Callable[[], float] = lambda: 1.0
        self._warned = False

    def bind(
        self,
        replay: Replay,
        *,
        clip: Callable[[Optimizer], None] | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Say how gradients are computed.

        Args:
            replay: the training step.
            clip: clips the gradients of an optimizer's parameters.
            average: the mean over processes.
            scale: what losses are multiplied by on the way through half precision.
        """
        self.replay, self._clip, self._average, self._scale = replay, clip, average, scale

    def release(self) -> None:
        """Forget the module and its batches."""
        self.replay = self._clip = self._average = None
        self.moments.clear()

    def record(self, batch: Any, batch_idx: int = 0, weight: float = 1.0) -> None:
        """Keep a copy of the batch that the next gradient comes from; several, with their weights, if it is accumulated."""
        assert self.replay is not None
        self.moments.append(self.replay.record(batch, batch_idx, weight=weight))

    def take(self) -> list[Moment]:
        """What was recorded since the last step; it is not kept any longer."""
        found, self.moments = self.moments, []
        return found

    def pull(
        self,
        optimizer: Optimizer,
        moves: list[Move],
        factors: list[Tensor | None],
        moments: list[Moment],
        shorten: Shorten,
        learning: list[bool],
    ) -> list[Tensor] | None:
        """The pull for each parameter, or ``None`` if it is not finite.

        Args:
            optimizer: the base optimizer, after its step.
            moves: what it did.
            factors: :math:`w_t`; ``None`` for 1.
            moments: the batches that the gradients come from.
            shorten: from a point and a step to the fraction of it that is taken.
            learning: which of the factors are going to follow their pull.

        Raises:
            RuntimeError: if no batch has been recorded.
            ValueError: if the optimizer trains tensors that are no parameters of the module.
        """
        if self.replay is None or not moments:
            raise RuntimeError(
                "there is no batch to compute a target on; outside of a Trainer, call engine.bootstrap.record(batch) before each "
                "step"
            )
        keys = self._names(move.param for move in moves)
        by_name = dict(zip(keys, moves, strict=True))
        start = {key: precise(move.old) for key, move in zip(keys, moves, strict=True)}
        slopes = {key: precise(move.grad) for key, move in zip(keys, moves, strict=True)}
        signs = {id(param): -1 if group.get("maximize") else 1 for group in optimizer.param_groups for param in group["params"]}
        # As the factors see it: of a group whose learning rate is 0 nothing moves.
        taken: list[Tensor] | None = [
            precise(move.param.detach()) - start[key] if move.lr else torch.zeros_like(start[key])
            for move, key in zip(moves, keys, strict=True)
        ]
        twin: Optimizer | None = None
        pairs: list[tuple[Tensor, Tensor]] = []
        reached: Tree = {}

        def advance(point: Tree, slopes: Tree) -> Tree:
            nonlocal taken, twin, pairs
            if taken is not None:
                steps, taken = taken, None
            else:
                if twin is None:
                    twin, copies = _copied(optimizer)
                    pairs = [(copies[id(move.param)], move.param) for move in moves]
                for (own, param), key in zip(pairs, keys, strict=True):
                    own.copy_(point[key])
                    own.grad = (slopes[key] * signs[id(param)]).to(own.dtype)
                before = [own.detach().clone() for own, _ in pairs]
                _step(twin)
                steps = [(own.detach() - old).to(point[key]) for (own, _), old, key in zip(pairs, before, keys, strict=True)]
            changes = [step if w is None else step * w.to(step) for step, w in zip(steps, factors, strict=True)]
            share = shorten(list(point.values()), changes)
            reached.update({key: point[key].add(change, alpha=share) for key, change in zip(keys, changes, strict=True)})
            return dict(reached)

        def gradient(point: Tree) -> Tree:
            assert self.replay is not None
            at = {key: leaf.to(by_name[key].param.dtype) for key, leaf in point.items()}
            found = self._averaged(self.replay.grad(moments, at, scale=self._scale())[1])
            self._clipped(at, found)
            return {key: (found[key] * signs[id(by_name[key].param)]).to(leaf) for key, leaf in point.items()}

        found, _ = pull_of_target(start, slopes, advance, gradient, **self.options)
        last, self.hints = self.hints, {}
        if all(bool(torch.isfinite(value).all()) for value in found.values()):
            pulls = [found[key] for key in keys]
            for number, (move, key) in enumerate(zip(moves, keys, strict=True)):
                if learning[number] and self._corrects(move):
                    self.hints[move.param] = start[key] - reached[key]
                    if move.param in last:
                        pulls[number] = pulls[number] - last[move.param]
            return pulls
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a target is not finite, so the step sizes were not changed in this step. Further such steps are only counted, in "
                "`skipped`; a smaller target_lr or fewer steps of lookahead may help",
                UserWarning,
                stacklevel=2,
            )
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        return {**self.options, "corrected": self.corrected}

    def state(self, params: list[Tensor]) -> list[Tensor | None]:
        """Copies of what the next step takes off, parameter by parameter."""
        return [self.hints[param].clone() if param in self.hints else None for param in params]

    def load(self, state: list[Tensor | None], params: list[Tensor]) -> None:
        """Continue from :meth:`state`; lazy parameters may come later, and have nothing to take off then."""
        pairs = zip(params, state, strict=False)
        self.hints = {param: hint.to(param.device, copy=True) for param, hint in pairs if hint is not None}

    def _corrects(self, move: Move) -> bool:
        return self.options["mu"] == "euclidean" and (move.momentum if self.corrected is None else self.corrected)

    def _names(self, params: Iterable[Tensor]) -> list[str]:
        assert self.replay is not None
        known: dict[Tensor, str] = {param: name for name, param in self.replay.module.named_parameters()}
        found = [known.get(param) for param in params]
        if None in found:
            raise ValueError(
                "the optimizer trains a tensor that is no parameter of the module, so that the training step cannot be repeated "
                "with another value of it: register it as torch.nn.Parameter, or use mode='optimistic'"
            )
        return [name for name in found if name is not None]

    def _averaged(self, grads: Tree) -> Tree:
        if self._average is None:
            return grads
        flat = self._average(torch.cat([grad.flatten().float() for grad in grads.values()]))
        pieces = flat.split([grad.numel() for grad in grads.values()])
        return {key: piece.view_as(grad).to(grad) for (key, grad), piece in zip(grads.items(), pieces, strict=True)}

    def _clipped(self, at: Tree, grads: Tree) -> None:
        # In place, by whatever clips the gradients of training.
        if self._clip is None:
            return
        params = {key: nn.Parameter(leaf.clone()) for key, leaf in at.items()}
        for key, param in params.items():
            param.grad = grads[key]
        self._clip(SGD(params.values()))
        grads.update({key: param.grad for key, param in params.items() if param.grad is not None})


def bind(ahead: Bootstrap, trainer: Trainer, module: LightningModule) -> None:
    """Let targets be computed as ``trainer`` computes gradients: in its precision, averaged over processes, and clipped."""
    plugin = trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    own = type(module).configure_gradient_clipping.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")

    def clip(optimizer: Optimizer) -> None:
        with undisturbed(module):  # it may log norms
            module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def average(values: Tensor) -> Tensor:
        mean: Tensor = trainer.strategy.reduce(values, reduce_op="mean")
        return mean

    ahead.bind(
        Replay(module, context=plugin.train_step_context),
        clip=clip if own or trainer.gradient_clip_val else None,
        average=average if trainer.world_size > 1 else None,
        scale=(lambda: 1.0) if scaler is None else scaler.get_scale,
    )


def _copied(optimizer: Optimizer) -> tuple[Optimizer, dict[int, Tensor]]:
    # The same optimizer with copies of parameters and state, without hooks.
    copies = {
        id(param): nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)
        for group in optimizer.param_groups
        for param in group["params"]
    }
    return copy.deepcopy(optimizer, dict(copies)), dict(copies)


def _step(twin: Optimizer) -> None:
    try:
        twin.step()
    except TypeError as error:
        error.add_note("Optimizers whose step needs a closure can look one step ahead only: use lookahead=1")
        raise
