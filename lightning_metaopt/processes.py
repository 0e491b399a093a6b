"""What the processes of a ``Trainer`` tell each other."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

__all__ = ["gather", "reduce"]


def gather(trainer: Any, leaf: Tensor) -> Tensor:
    """The parts of all processes, joined along the first axis, in each of them."""
    found: Tensor = trainer.strategy.all_gather(leaf.contiguous())
    return found.flatten(0, 1) if trainer.world_size > 1 else leaf


def reduce(trainer: Any, value: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    """The mean or sum over all processes, in each of them; ``value`` stays as it is."""
    found: Tensor = trainer.strategy.reduce(value.clone(), reduce_op=how)
    return found
