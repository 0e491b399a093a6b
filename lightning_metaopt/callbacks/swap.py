"""A learned optimizer in place of the one that a module has configured."""

from __future__ import annotations

import os
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_metaopt.optimizer import LearnedOptimizer
from lightning_metaopt.rule import Rule

__all__ = ["SwapOptimizer"]


@final
class SwapOptimizer(Callback):
    """Trains an unchanged ``LightningModule`` with a :class:`~lightning_metaopt.LearnedOptimizer`.

    The module's own optimizer gives its param groups, so LR schedulers, groups with their own learning rates and
    parameters that are thawed later keep working; its update rule is not used. The rule's update is multiplied by
    ``lr / lr_unit``, and by default ``lr_unit`` is the learning rate that the module asked for: a constant learning
    rate applies the rule exactly as it was trained, whatever its value, and a schedule scales it.

    Args:
        rule: a rule, or the name or file of a saved one (see :func:`~lightning_metaopt.load_rule`).
        lr_unit: the learning rate at which the update is applied as it was trained. ``None`` for each group's own: the
            peak of ``OneCycleLR`` and ``CyclicLR``, else the value that a scheduler starts from, else ``lr``.
        weight_decay: ``None`` to keep the value of each group. It becomes decoupled, as in ``AdamW``: each step takes
            the fraction ``lr * weight_decay`` off the parameter.
        max_update_norm: longest step, see :class:`~lightning_metaopt.LearnedOptimizer`.
        optimizer_index: which of several optimizers to replace; ``None`` for all.

    Checkpoints contain the learned optimizer's state with phi, so that a run continues exactly where this callback is
    among the callbacks again. Works with the ``Trainer`` of ``lightning`` and of ``pytorch_lightning``.

    Raises:
        RuntimeError: when ``fit`` starts, for strategies that shard parameters or own the step (FSDP, DeepSpeed), and for
            modules that step optimizers which Lightning does not know; during training, if the module steps the
            optimizer that was replaced.
        ValueError: when ``fit`` starts, if there is no such optimizer, or the rule is sized for other parameters.

    >>> import lightning_metaopt as lmo
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> swap = SwapOptimizer(lmo.rules.HeavyBall(lr=0.01))
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    >>> trainer = Trainer(max_steps=2, limit_val_batches=0, accelerator="cpu", callbacks=[swap], **quiet)
    >>> trainer.fit(BoringModel())
    >>> trainer.optimizers[0].rule.describe()["momentum"]
    0.899...
    """

    def __init__(
        self,
        rule: Rule | str | os.PathLike[str],
        lr_unit: float | None = None,
        weight_decay: float | None = None,
        max_update_norm: float | None = None,
        optimizer_index: int | None = None,
    ) -> None:
        self.rule = rule
        self.lr_unit = lr_unit
        self.weight_decay = weight_decay
        self.max_update_norm = max_update_norm
        self.optimizer_index = optimizer_index
        self._guards: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if strategy.handles_gradient_accumulation or strategy.restore_checkpoint_after_setup:
            raise RuntimeError(_sharded(type(strategy).__name__))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        if any(hasattr(param, "device_mesh") for param in pl_module.parameters()):
            raise RuntimeError(_sharded("a strategy with DTensor parameters"))
        old = list(trainer.optimizers)
        chosen = range(len(old)) if self.optimizer_index is None else [self.optimizer_index]
        if not all(0 <= index < len(old) for index in chosen):
            raise ValueError(f"optimizer_index is {self.optimizer_index}, but the module configured {len(old)} optimizer(s)")
        names: dict[Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
        new = list(old)
        for index in chosen:
            if not old[index].param_groups:
                raise ValueError(f"{type(pl_module).__name__}.configure_optimizers returns no optimizer that could be replaced")
            new[index] = LearnedOptimizer.replacing(
                old[index],
                self.rule,
                lr_unit=self.lr_unit,
                weight_decay=self.weight_decay,
                max_update_norm=self.max_update_norm,
                names=names,
            )
        trainer.optimizers = new
        if not pl_module.automatic_optimization and not _uses(pl_module, [new[index] for index in chosen]):
            trainer.optimizers = old
            raise RuntimeError(
                f"{type(pl_module).__name__} has an attribute `optimizers` of its own, and would go on stepping those. Let it take "
                "them from LightningModule.optimizers(), or make a LearnedOptimizer in configure_optimizers"
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for index in chosen:
            if any(getattr(scheduler, "optimizer", None) is old[index] for scheduler in schedulers):
                _step_nothing(old[index])
            self._guards.append(old[index].register_step_pre_hook(_refuse_step))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        while self._guards:
            self._guards.pop().remove()


def _sharded(name: str) -> str:
    return (
        f"SwapOptimizer needs whole parameters and a step of its own, which {name} does not leave to it; "
        "use strategy='ddp' or a single device"
    )


def _uses(module: LightningModule, new: list[Optimizer]) -> bool:
    # Whether the module, when it asks for its optimizers, gets the new ones (wrapped or not).
    found: Any = module.optimizers
    found = found() if callable(found) else found
    found = found if isinstance(found, (list, tuple)) else [found]
    return any(getattr(one, "optimizer", one) is other for one in found for other in new)


def _step_nothing(optimizer: Optimizer) -> None:
    # LR schedulers warn unless their own optimizer has been stepped before them.
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": []} for group in groups]
    try:
        optimizer.step(closure=lambda: 0.0)
    finally:
        optimizer.param_groups = groups


def _refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    raise RuntimeError(
        f"SwapOptimizer has replaced this {type(optimizer).__name__}, but something still steps it. A module that optimises "
        "manually has to take its optimizers from LightningModule.optimizers(); or give `optimizer_index` to replace "
        "only some of several optimizers"
    )
