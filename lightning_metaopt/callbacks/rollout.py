"""Steps of training taken again at other points, and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.hooks import RemovableHandle

from lightning_metaopt.callbacks.flat import Flat
from lightning_metaopt.recording import Moment
from lightning_metaopt.replay import Replay
from lightning_metaopt.snapshot import undisturbed
from lightning_metaopt.tree import Tree, detach

__all__ = ["Clip", "Gradients", "Past", "bind"]

Clip = Callable[[Tensor, Flat], Tensor]
"""Clips a vector of gradients, differentiably."""


@dataclass(frozen=True)
class Past:
    """What a rollout needs of a step :math:`s`.

    Attributes:
        moments: the batches whose gradients were accumulated.
        lr: :math:`\\eta_s`, for each parameter.
        decay: :math:`\\delta_s`, likewise.
        vectors: ``"point"`` for :math:`x_s`; ``"reached"`` for where the base optimizer alone went from there, ``"update"`` for
            what it did: those that are needed.
    """

    moments: list[Moment]
    lr: list[float]
    decay: list[float]
    vectors: dict[str, Tensor] = field(default_factory=dict)


@final
class Gradients:
    """Gradients at any point, as training computes them: of the accumulated batches, averaged over processes, and clipped."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.replay: Replay | None = None
        self.clip: Clip | None = None
        self._average: Callable[[Tensor], Tensor] | None = None
        self._handle: RemovableHandle | None = None
        self._scale: Callable[[], float] = lambda: 1.0

    def bind(
        self,
        replay: Replay,
        *,
        clip: Clip | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Say how gradients are computed.

        Args:
            replay: the training step.
            clip: clips them.
            average: the mean over processes.
            scale: what losses are multiplied by on the way through half precision.
        """
        self.replay, self.clip, self._average, self._scale = replay, clip, average, scale

    def release(self) -> None:
        """Forget the module and its batches."""
        self.replay = self.clip = self._average = None
        self.moments.clear()
        self._forget()

    def record(self, batch: Any, batch_idx: int = 0, weight: float = 1.0) -> None:
        """Keep a copy of the batch that the next gradient comes from; several, with their weights, if it is accumulated."""
        assert self.replay is not None
        moment = self.replay.record(batch, batch_idx, weight=weight, buffers=True)
        self.moments.append(moment)
        if self._average is not None and moment.buffers:
            # DDP hands the buffers of the first process to the others on its way to the module, just after this.
            self._forget()
            self._handle = self.replay.module.register_forward_pre_hook(self._reached)

    def _reached(self, *_: Any) -> None:
        self._forget()
        if self.replay is not None and self.moments:
            self.moments[-1] = replace(self.moments[-1], buffers=self.replay.buffers())

    def _forget(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self) -> list[Moment]:
        """What was recorded since the last step; it is not kept any longer."""
        self._forget()
        found, self.moments = self.moments, []
        return found

    def of_loss(self, moments: Sequence[Moment], point: Tensor, flat: Flat) -> Tensor:
        """The gradient of the loss, averaged but not clipped."""
        names = self._names(flat)
        assert self.replay is not None
        found = self.replay.grad(moments, self._tree(point, flat, names), scale=self._scale())[1]
        return self._mean(flat.join([found[name] for name in names]))

    def at(self, moments: Sequence[Moment], point: Tensor, flat: Flat) -> Tensor:
        """What the optimizer would have been given."""
        grad = self.of_loss(moments, point, flat)
        return grad if self.clip is None else self.clip(grad, flat)

    def linearised(self, moments: Sequence[Moment], point: Tensor, flat: Flat) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same, and the function that multiplies a vector by its (transposed) derivative with respect to the point."""
        names = self._names(flat)
        assert self.replay is not None
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in self._tree(point, flat, names).items()}
        local: Tree | None = None
        try:
            local = self.replay.grad(moments, leaves, create_graph=True, scale=self._scale())[1]
            found = detach(local)
        except RuntimeError as error:
            if "gradient checkpointing" not in str(error):
                raise
            found = self.replay.grad(moments, leaves, scale=self._scale())[1]
        raw = self._mean(flat.join([found[name] for name in names]))
        given, back = _clipped(raw, flat, self.clip)

        def pull(vector: Tensor) -> Tensor:
            assert self.replay is not None
            vector = back(vector)
            # In half precision a small vector would vanish on its way back; the product is linear in it. It begins at 1/64, and
            # ends at 1/64 of what the scaler has found that gradients may be.
            size = 1.0 if self._scale() == 1 else 64 * float(vector.abs().max()) / self._scale() or 1.0
            parts = dict(zip(names, flat.split(vector / size), strict=True))
            products = self.replay.hvp(moments, leaves, parts)[2] if local is None else _product(local, leaves, parts)
            return self._mean(flat.join([products[name] for name in names])).mul_(size)

        return given, pull

    def _tree(self, point: Tensor, flat: Flat, names: list[str]) -> Tree:
        parts = zip(names, flat.split(point), flat.params, strict=True)
        return {name: part.to(param.dtype) for name, part, param in parts}

    def _mean(self, vector: Tensor) -> Tensor:
        return vector if self._average is None else self._average(vector)

    def _names(self, flat: Flat) -> list[str]:
        assert self.replay is not None
        known: dict[Tensor, str] = {param: name for name, param in self.replay.module.named_parameters()}
        found = [known.get(param) for param in flat.params]
        if None in found:
            raise ValueError(
                "the optimizer trains a tensor that is no parameter of the module, so that the training step cannot be repeated "
                "with another value of it: register it as torch.nn.Parameter, or use mode='gram'"
            )
        return [name for name in found if name is not None]


def _product(outputs: Tree, leaves: Tree, vectors: Tree) -> Tree:
    names = [name for name, output in outputs.items() if output.requires_grad]
    if not names:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(
            [outputs[name] for name in names],
            list(leaves.values()),
            [vectors[name].to(outputs[name].dtype) for name in names],
            allow_unused=True,
            materialize_grads=True,
        )
    return detach(dict(zip(leaves, found, strict=True)))


def _clipped(raw: Tensor, flat: Flat, clip: Clip | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if clip is None:
        return raw, lambda vector: vector
    leaf = raw.detach().requires_grad_()
    with torch.enable_grad():
        found = clip(leaf, flat)
    return found.detach(), lambda vector: torch.autograd.grad(found, leaf, vector, retain_graph=True)[0]


def bind(gradients: Gradients, trainer: Trainer, module: LightningModule, step: Callable[..., Any] | None = None) -> None:
    """Let gradients be computed as ``trainer`` does: in its precision, averaged over processes, and clipped; of ``step``, or of the
    module's own.
    """
    plugin = trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)

    def average(values: Tensor) -> Tensor:
        mean: Tensor = trainer.strategy.reduce(values.clone(), reduce_op="mean")
        return mean

    gradients.bind(
        Replay(module, step, context=plugin.train_step_context),
        clip=_clip_of(trainer, module),
        average=average if trainer.world_size > 1 else None,
        scale=(lambda: 1.0) if scaler is None else scaler.get_scale,
    )


def _clip_of(trainer: Trainer, module: LightningModule) -> Clip | None:
    own = type(module).configure_gradient_clipping.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")
    limit = trainer.gradient_clip_val
    if own:

        def by_module(grad: Tensor, flat: Flat) -> Tensor:
            # What the module makes of the gradients, as factors that are constants.
            params = [nn.Parameter(param.detach().clone()) for param in flat.params]
            for param, part in zip(params, flat.split(grad.detach().clone()), strict=True):
                param.grad = part.to(param.dtype)
            with undisturbed(module):  # it may log norms
                module.configure_gradient_clipping(SGD(params), limit, trainer.gradient_clip_algorithm)
            factors = flat.join([param.grad for param in params]) / torch.where(grad == 0, 1, grad).detach()
            return grad * factors

        return by_module
    if not limit:
        return None
    if str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm") == "value":
        return lambda grad, flat: grad.clamp(-limit, limit)
    return lambda grad, flat: grad * (limit / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
