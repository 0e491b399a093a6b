"""What an engine is handed after a step, without a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_cases import Probe
from torch import nn

from lightning_metaopt.callbacks import OptimisticMetaGrad


def test_base_rates_and_the_sign_of_optimizers_that_maximise() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], 0.2, maximize=True)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    probe = Probe(optimizer)
    probe.attach()
    param.grad = torch.ones(2)
    optimizer.step()
    ((move,),) = probe.seen
    assert (move.lr, move.base_lr) == (0.1, 0.2)
    assert move.grad.tolist() == [-1, -1]
    assert move.param.tolist() == pytest.approx([0.1, 0.1])


class Derived(torch.optim.SGD):
    """An optimizer that takes its parent's step: torch calls the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_nothing_is_cast_after_a_step_inside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Probe, "adjust", lambda self, moves: seen.append((moves[0].param @ moves[0].param.T).dtype))
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([param], 0.1)
    Probe(optimizer).attach()
    param.grad = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert seen == [torch.float32]


def test_a_step_within_a_step_is_followed_once():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch wraps the parent's step when the first of them is made
    ends = []
    for kind in (torch.optim.SGD, Derived):
        x = nn.Parameter(torch.tensor([1.0]))
        optimizer = kind([x], lr=0.1)
        engine = OptimisticMetaGrad.attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (x.square().sum() / 2).backward()
            optimizer.step()
        assert engine.steps == 5
        ends.append(x.detach().clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.tensor([0.9**5]))
