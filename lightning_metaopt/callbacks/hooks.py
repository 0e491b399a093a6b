"""The base of callbacks that change what an optimizer's step has done, whatever optimizer the module has configured."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_metaopt.callbacks.families import has_momentum
from lightning_metaopt.callbacks.logs import publish

__all__ = ["Move", "StepCallback", "StepEngine"]


@dataclass(frozen=True)
class Move:
    """What one step of the base optimizer did to one parameter.

    Attributes:
        param: the parameter, at its new value.
        old: its value before the step.
        grad: the gradient that the optimizer used: unscaled, clipped, of the accumulated batches, averaged over processes;
            its sign is turned for optimizers that maximise.
        lr: the learning rate of its param group in this step.
        base_lr: the one that its schedule starts from: the peak of ``OneCycleLR``, else ``initial_lr``, else the first ``lr``.
        momentum: whether the optimizer averages over steps, as far as its param group tells; if it does not tell, ``True``.
    """

    param: Tensor
    old: Tensor
    grad: Tensor
    lr: float
    base_lr: float
    momentum: bool = True


class StepEngine(ABC):
    """Follows the steps of one optimizer, through its public hooks: the parameters are copied before each step and
    handed to :meth:`adjust` after it, together with the gradients. The optimizer and its ``state_dict`` stay as they are.

    Raises:
        TypeError: for something that is no ``torch.optim.Optimizer``, and for complex parameters.
        ValueError: for ``LBFGS``, which takes several steps in one, and for an optimizer without parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check(optimizer)
        self.optimizer = optimizer
        self.active, self.watched, self._stepping, self.steps = True, False, False, 0
        self._old: dict[Tensor, Tensor] = {}
        self._base: dict[int, float] = {}  # learning rates that groups without scheduler began with
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Follow the optimizer from now on."""
        if not self._handles:
            optimizer = self.optimizer
            self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def detach(self) -> None:
        """Leave the optimizer alone from now on; what was learned stays here."""
        while self._handles:
            self._handles.pop().remove()
        self._old.clear()

    @abstractmethod
    def adjust(self, moves: list[Move]) -> None:
        """Change the parameters after a step (without gradients being recorded, outside of autocast)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was learned, in plain containers and tensors, in the order of the optimizer's param groups."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ``ValueError`` if it belongs to other options or parameters."""

    def metrics(self, names: dict[Tensor, str]) -> dict[str, float]:
        """What to log; by default nothing."""
        return {}

    def watch(self, now: bool) -> None:
        """Whether the next step will be logged, for what is costly to measure."""
        self.watched = now

    def params(self) -> list[Tensor]:
        """The optimizer's parameters in the order of its groups."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.active:
            return
        self._stepping = True
        for param in self.params():
            old = self._old.get(param)
            if is_lazy(param) or not param.requires_grad:
                self._old.pop(param, None)
            elif old is None or old.shape != param.shape or old.dtype != param.dtype or old.device != param.device:
                self._old[param] = param.detach().clone()
            else:
                old.copy_(param)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not (self.active and self._stepping):  # torch calls the hooks twice where a step calls super().step()
            return
        self._stepping = False
        moves = []
        for number, group in enumerate(optimizer.param_groups):
            lr, momentum = float(group.get("lr", 1.0)), has_momentum(group)
            base = float(group.get("max_lr", group.get("initial_lr", self._base.setdefault(number, lr))))
            for param in group["params"]:
                # A lazy parameter has got its shape in this very step: its first update stays as it is.
                if param.grad is None or param not in self._old:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients: use sparse=False in embeddings")
                grad = -param.grad.detach() if group.get("maximize") else param.grad.detach()
                moves.append(Move(param, self._old[param], grad, lr, base, momentum))
        if moves:
            self.steps += 1
            with torch.autocast(moves[0].param.device.type, enabled=False):  # manual optimisation steps inside autocast
                self.adjust(moves)


def check(optimizer: Any) -> None:
    """Raise for optimizers whose updates cannot be followed."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is not a torch.optim.Optimizer, whose steps could be followed")
    if any(cls.__name__ == "LBFGS" for cls in type(optimizer).__mro__):
        raise ValueError("LBFGS searches along a line within one step; use an optimizer with one update a step (SGD, Adam, ...)")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        raise ValueError(f"{name} has no parameters: let configure_optimizers return an optimizer that trains some")
    if any(hasattr(param, "device_mesh") for param in params):
        raise ValueError("parameters that are sharded over devices are not supported; use strategy='ddp' or a single device")
    if any(param.is_complex() for param in params):
        raise TypeError("complex parameters are not supported; train torch.view_as_real of them")


class StepCallback(Callback, ABC):
    """Attaches an engine to each optimizer of a module for the time of ``fit``; saves, restores and logs what it learns.

    Args:
        optimizer_index: which of several optimizers to follow; ``None`` for all.
        log: log what the engines measure, whenever the ``Trainer`` logs.

    Works with any optimizers, LR schedulers, param groups, gradient accumulation, clipping, precision, manual optimisation,
    and processes of DDP; in the ``Trainer`` of ``lightning`` and of ``pytorch_lightning``. A resumed run continues exactly.

    Raises:
        RuntimeError: when ``fit`` starts, for strategies that shard parameters or own the step (FSDP, DeepSpeed).
        ValueError: when ``fit`` starts, for an optimizer that cannot be followed, or a sparse embedding; when training starts,
            for a checkpoint of other options or parameters.
    """

    def __init__(self, optimizer_index: int | None = None, log: bool = True) -> None:
        self.optimizer_index = optimizer_index
        self.log_metrics = log
        self.engines: list[Any] = []
        self._loaded: dict[str, Any] | None = None
        self._trained = False  # whether the engines know more than what was loaded
        self._batches = self._begun = self._global_step = 0  # batches that ended in a step: all, and when training started

    @abstractmethod
    def engine(self, optimizer: Optimizer) -> StepEngine:
        """An engine for one of the optimizers."""

    @property
    def state_key(self) -> str:
        return type(self).__qualname__ + ("" if self.optimizer_index is None else f"[{self.optimizer_index}]")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name, strategy = type(self).__name__, trainer.strategy
        if strategy.handles_gradient_accumulation or strategy.restore_checkpoint_after_setup:
            raise RuntimeError(
                f"{name} needs whole parameters and their gradients, which {type(strategy).__name__} does not leave to it; use "
                "strategy='ddp' or a single device"
            )
        for label, part in pl_module.named_modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
                raise ValueError(f"{name} needs dense gradients: use sparse=False in the embedding {label!r}")
        self._detach()
        self.engines, self._loaded, self._trained, self._batches = [], None, False, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # As early as possible, so that what others hook on (averages of weights) comes after us; at rest until training starts.
        self._attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)  # other callbacks may have replaced optimizers
        if self._loaded is not None:
            self._restore(self._loaded)
        else:
            self._batches = trainer.global_step
            if trainer.global_step > 0 and getattr(trainer, "ckpt_path", None) is not None:
                warnings.warn(
                    f"the checkpoint has no state of {type(self).__name__}: it starts fresh at step {trainer.global_step}",
                    UserWarning,
                    stacklevel=2,
                )
        self._loaded, self._trained, self._begun = None, True, self._batches
        for engine in self.engines:
            engine.active = True

    def _attach(self, trainer: Trainer) -> None:
        every = list(trainer.optimizers)
        index = self.optimizer_index
        if not every or (index is not None and not 0 <= index < len(every)):
            raise ValueError(f"optimizer_index is {index}, but the module configured {len(every)} optimizer(s)")
        chosen = every if index is None else [every[index]]
        if [engine.optimizer for engine in self.engines] != chosen:
            self._detach()
            self.engines = [self.engine(optimizer) for optimizer in chosen]
        for engine in self.engines:
            engine.active = False
            engine.attach()

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["engines"]) != len(self.engines):
            raise ValueError(
                f"the checkpoint has the state of {len(state['engines'])} optimizer(s) for {type(self).__name__}, the module "
                f"configured {len(self.engines)}: give the same optimizer_index and optimizers, or load the weights alone"
            )
        for engine, saved in zip(self.engines, state["engines"], strict=True):
            engine.load_state_dict(saved)
        self._batches = state["batches"]

    def state_dict(self) -> dict[str, Any]:
        if not self._trained:
            return self._loaded or {}
        return {"format": 1, "batches": self._batches, "engines": [engine.state_dict() for engine in self.engines]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._trained and any(engine.active for engine in self.engines):
            self._restore(state_dict)  # in mid-training: a finder of learning rates puts back what it has changed
        else:
            self._loaded = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._global_step = trainer.global_step
        for engine in self.engines:
            engine.watch(self.log_metrics and self._is_due(trainer, self._batches + 1))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._global_step and pl_module.automatic_optimization:
            return  # gradients are being accumulated
        self._batches += 1
        if not self.log_metrics or not self._is_due(trainer, self._batches):
            return
        names: dict[Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
        for number, engine in enumerate(self.engines):
            self.report(pl_module, number, engine.metrics(names))

    def report(self, pl_module: LightningModule, number: int, measured: dict[str, float]) -> None:
        """Log what an engine has measured."""
        prefix = f"{type(self).__name__}/" + (f"optimizer{number}/" if len(self.engines) > 1 else "")
        publish(pl_module.trainer, {prefix + name: value for name, value in measured.items()}, self._batches - 1)

    @staticmethod
    def _is_due(trainer: Trainer, batches: int) -> bool:
        every: int = getattr(trainer, "log_every_n_steps", 0)
        return every > 0 and batches % every == 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batches > self._begun and not any(engine.steps for engine in self.engines):
            warnings.warn(
                f"{type(self).__name__} saw no step of the optimizers that configure_optimizers returned: either none had "
                "gradients, or the module steps other ones. Attach to those with the class method attach()",
                UserWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for engine in self.engines:
            engine.detach()
            engine.active = False
