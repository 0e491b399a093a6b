"""Episodic meta-training with Lightning's ``Trainer``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_metaopt.checks import refuse_half_precision
from lightning_metaopt.learner import MetaLearner
from lightning_metaopt.rule import Rule

__all__ = ["MetaLearner", "MetaLoop"]


class MetaLoop:
    """Builds a ``Trainer``, trains a :class:`MetaLearner` and returns its rule.

    Every argument of ``lightning.pytorch.Trainer`` passes through (``accelerator``, ``devices``, ``strategy``,
    ``precision``, ``gradient_clip_val``, ``callbacks``, ...). Named here are those whose default differs: no logger and
    no summary, checkpoints only with a ``ModelCheckpoint`` or a ``default_root_dir``, one device.

    Args:
        keep: return the rule that was ``"best"`` in validation or the ``"last"`` one. Without validation both are the last.
        max_epochs: number of epochs, see ``MetaLearner(steps_per_epoch=...)``.
        max_steps: number of meta-steps, -1 for no limit.
        devices: number of devices or their indices.
        logger: as for ``Trainer``.
        callbacks: as for ``Trainer``.
        default_root_dir: where checkpoints and logs go.
        enable_checkpointing: as for ``Trainer``; by default only if there is a place or a callback for them.
        enable_model_summary: as for ``Trainer``.
        limit_val_batches: as for ``Trainer``; 0 for a learner without validation.
        log_every_n_steps: meta-steps between log entries, and between rows of ``learner.history``.
        num_sanity_val_steps: as for ``Trainer``; the learner validates the untrained rule itself.
        **trainer_options: any other argument of ``Trainer``.

    Attributes:
        trainer: the ``Trainer`` of the last :meth:`fit`.

    To resume bit by bit, save with ``ModelCheckpoint(every_n_train_steps=...)`` (Lightning counts the last batch of an
    epoch twice after ``trainer.save_checkpoint`` at its end).

    >>> import torch, lightning_metaopt as lmo
    >>> learner = lmo.MetaLearner(
    ...     lmo.rules.GradientDescent(lr=1e-3), lmo.tasks.LeastSquares(dim=3, rows=5), lmo.Unrolled(steps=5),
    ...     optimizer=lambda phi: torch.optim.Adam(phi, lr=0.1), tasks=8, pool=8)
    >>> rule = MetaLoop(max_epochs=20, accelerator="cpu", enable_progress_bar=False).fit(learner)
    >>> learner.history[-1]["val_loss"] < learner.history[0]["val_loss"]
    True
    """

    def __init__(
        self,
        *,
        keep: Literal["best", "last"] = "best",
        max_epochs: int | None = None,
        max_steps: int = -1,
        devices: list[int] | str | int = 1,
        logger: Any = False,
        callbacks: Any = None,
        default_root_dir: str | Path | None = None,
        enable_checkpointing: bool | None = None,
        enable_model_summary: bool = False,
        limit_val_batches: int | float | None = None,
        log_every_n_steps: int = 10,
        num_sanity_val_steps: int = 0,
        **trainer_options: Any,
    ) -> None:
        if keep not in ("best", "last"):
            raise ValueError(f"keep must be 'best' or 'last', got {keep!r}")
        if max_epochs is None and max_steps == -1 and trainer_options.get("max_time") is None:
            raise ValueError("say when meta-training ends: max_epochs=..., max_steps=... or max_time=...")
        unknown = sorted(set(trainer_options) - set(inspect.signature(Trainer).parameters))
        if unknown:
            raise TypeError(f"lightning's Trainer has no argument {', '.join(unknown)}")
        refuse_half_precision(trainer_options.get("precision"))
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        saves = default_root_dir is not None or any(isinstance(callback, ModelCheckpoint) for callback in listed)
        self.keep = keep
        self.max_epochs = -1 if max_epochs is None else max_epochs
        self.max_steps = max_steps
        self.devices = devices
        self.logger = logger
        self.callbacks = callbacks
        self.default_root_dir = default_root_dir
        self.enable_checkpointing = saves if enable_checkpointing is None else enable_checkpointing
        self.enable_model_summary = enable_model_summary
        self.limit_val_batches = limit_val_batches
        self.log_every_n_steps = log_every_n_steps
        self.num_sanity_val_steps = num_sanity_val_steps
        self._trainer_options = trainer_options
        self.trainer: Trainer | None = None

    def fit(self, learner: MetaLearner, ckpt_path: str | Path | None = None) -> Rule:
        """Meta-train and return the learner's rule, loaded with the parameters that :attr:`keep` asks for.

        Args:
            learner: what to train.
            ckpt_path: a checkpoint to resume from.
        """
        self.trainer = Trainer(
            max_epochs=self.max_epochs,
            max_steps=self.max_steps,
            devices=self.devices,
            logger=self.logger,
            callbacks=self.callbacks,
            default_root_dir=self.default_root_dir,
            enable_checkpointing=self.enable_checkpointing,
            enable_model_summary=self.enable_model_summary,
            limit_val_batches=self.limit_val_batches if learner.val_tasks else 0,  # or Lightning warns of an empty loader
            log_every_n_steps=self.log_every_n_steps,
            num_sanity_val_steps=self.num_sanity_val_steps,
            **self._trainer_options,
        )
        self.trainer.fit(learner, ckpt_path=ckpt_path)
        if self.keep == "best" and learner.val_tasks:
            learner.best.load_into_(learner.rule)
        return learner.rule
