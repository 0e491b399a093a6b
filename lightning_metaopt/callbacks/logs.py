"""Logging of callbacks that measure something now and then."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

__all__ = ["publish"]


def publish(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Hand values to the loggers, and to those who read ``trainer.callback_metrics`` or ``trainer.logged_metrics``.

    What a module has logged once by ``log`` costs time in every step that follows, for each name; on a tiny module a third of a
    step for fifteen of them. Lightning's own ``LearningRateMonitor`` does as is done here.

    Args:
        trainer: the trainer.
        values: numbers by name.
        step: the optimizer's step, from 0.
    """
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
