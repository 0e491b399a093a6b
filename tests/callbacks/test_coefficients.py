"""Meta-steps of GPC's coefficients: spikes of the meta-gradient are cut to what is usual."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_metaopt.callbacks.coefficients import MEMORY, Coefficients


def made(clip: float | None) -> Coefficients:
    return Coefficients(torch.zeros(3, dtype=torch.float64), partial(torch.optim.SGD, lr=1.0), clip)


def meta_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [1e6 if step in (30, 31, 75) else 50.0 if step % 17 == 5 else 1.0 for step in range(100)]
    return [size * torch.randn(3, generator=generator, dtype=torch.float64) for size in sizes]


def test_a_plain_loop() -> None:
    """At most ``clip`` times the root of the running mean of squares, which spikes enter as they were cut; episodes begin anew."""
    own = made(clip=4.0)
    value, square, seen, cut = torch.zeros(3, dtype=torch.float64), 0.0, 0, 0
    for step, grad in enumerate(meta_gradients()):
        if step == 60:
            own.begin()
            square, seen = 0.0, 0
        own.step(grad)
        size = float(grad.norm())
        longest = 4.0 * math.sqrt(square / (1 - MEMORY**seen)) if seen else math.inf
        kept = min(1.0, longest / size)
        size, cut = size * kept, cut + (kept < 1)
        value, square, seen = value - kept * grad, MEMORY * square + (1 - MEMORY) * size**2, seen + 1
        torch.testing.assert_close(own.value.detach(), value, rtol=1e-10, atol=1e-12)
    assert own.clipped == cut > 3
    assert own.steps == 100


def test_nothing_is_cut_without_a_limit_and_a_cut_run_is_resumed() -> None:
    free, first = made(clip=None), made(clip=4.0)
    for grad in meta_gradients()[:40]:
        free.step(grad)
        first.step(grad)
    torch.testing.assert_close(free.value.detach(), -torch.stack(meta_gradients()[:40]).sum(0), rtol=1e-12, atol=1e-6)
    again = made(clip=4.0)
    again.load_state_dict(first.state_dict())
    for grad in meta_gradients()[40:]:
        first.step(grad)
        again.step(grad)
    assert torch.equal(first.value, again.value)
    assert first.clipped == again.clipped
    with pytest.warns(UserWarning, match="not finite"):
        first.step(torch.full((3,), math.nan, dtype=torch.float64))
    assert (first.steps, first.skipped) == (100, 1)
    assert torch.equal(first.value, again.value)
