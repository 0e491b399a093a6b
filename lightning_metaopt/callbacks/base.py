"""The base of callbacks that change what an optimizer's step has done, whatever optimizer the module has configured."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_metaopt.callbacks.hooks import StepEngine
from lightning_metaopt.callbacks.logs import publish

__all__ = ["StepCallback"]


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
