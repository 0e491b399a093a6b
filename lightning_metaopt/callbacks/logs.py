"""Logging of callbacks that measure something now and then."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["cosine", "publish", "quantiles"]


def cosine(rows: list[list[float]]) -> float | None:
    """Of two vectors that lie in parts: from each part's two squared lengths and its product. ``None`` where one is zero."""
    square, other, dot = (math.fsum(row[number] for row in rows) for number in range(3))
    return dot / math.sqrt(square) / math.sqrt(other) if square > 0 and other > 0 else None


def quantiles(values: Tensor) -> dict[str, float]:
    """``q10``, ``q50`` and ``q90``, of some 10,000 of the values where there are more."""
    few = values.flatten()[:: max(1, values.numel() // 10_000)].float()
    levels = torch.quantile(few, few.new_tensor([0.1, 0.5, 0.9])).tolist()
    return dict(zip(("q10", "q50", "q90"), levels, strict=True))


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
