"""Random numbers of problems that walk through minibatches: seeds, and orders in which data are taken."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST_SEED", "integers", "seeds_at", "walk"]

LARGEST_SEED = 2**62 - 1
_MIX = 0x1E3779B97F4A7C15  # odd: consecutive steps get unrelated seeds


def integers(generator: torch.Generator, bound: int, *shape: int) -> Tensor:
    """Integers from 0 to ``bound - 1``, on the CPU wherever the generator is."""
    return torch.randint(bound, shape, generator=generator, device=generator.device).cpu()


def walk(generator: torch.Generator, count: int, length: int) -> Tensor:
    """``length`` numbers below ``count``: pass after pass through all of them, each in a new order.

    >>> order = walk(torch.Generator().manual_seed(0), count=3, length=8)
    >>> [sorted(part.tolist()) for part in order.split(3)[:2]], len(order)
    ([[0, 1, 2], [0, 1, 2]], 8)
    """
    passes = [torch.randperm(count, generator=generator, device=generator.device).cpu() for _ in range(-(-length // count))]
    return torch.cat(passes)[:length]


def seeds_at(seeds: Tensor, step: int) -> Tensor:
    """Another seed at each step for each of ``seeds``, the same whenever it is asked for."""
    return (seeds + step * _MIX % LARGEST_SEED) & LARGEST_SEED
