"""Trainings whose optimizer SwapOptimizer cannot replace."""

import warnings
from typing import Any

import lightning.pytorch
import pytest
import torch
from swap_cases import PACKAGES, fit, module, momentum, sgd


def test_a_module_that_steps_its_own_optimizers_is_refused() -> None:
    listed = module(PACKAGES[0], sgd(), manual=True)
    own = torch.optim.SGD(listed.parameters(), 0.05)
    type(listed).optimizers = [own]  # as some published modules do
    before = [p.detach().clone() for p in listed.parameters()]
    with pytest.raises(RuntimeError, match="attribute `optimizers` of its own"):
        fit(listed, callbacks=[momentum()])
    assert isinstance(listed.trainer.strategy.optimizers[0], torch.optim.SGD)
    hidden = module(PACKAGES[0], sgd(), manual=True)

    def training_step(batch: Any, batch_idx: int) -> None:
        optimizer.step()

    optimizer = torch.optim.SGD(hidden.parameters(), 0.05)
    hidden.configure_optimizers = lambda: optimizer
    hidden.training_step = training_step
    with pytest.raises(RuntimeError, match="has replaced this SGD, but something still steps it"):
        fit(hidden, callbacks=[momentum()])
    optimizer.step()  # the guard is gone after the failure
    for net in (listed, hidden):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["handles_gradient_accumulation", "restore_checkpoint_after_setup"])
def test_sharding_strategies_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning.pytorch.strategies.SingleDeviceStrategy, name, property(lambda self: True))
    with pytest.raises(RuntimeError, match="SwapOptimizer needs whole parameters.*SingleDeviceStrategy"):
        fit(module(PACKAGES[0], sgd()), callbacks=[momentum()])


def test_what_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="maximize"):
        fit(module(PACKAGES[0], sgd(maximize=True)), callbacks=[momentum()])
    with pytest.raises(ValueError, match="lr_unit of param group 0 must be positive"):
        fit(module(PACKAGES[0], sgd(lr=0.0)), callbacks=[momentum()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Lightning warns of configure_optimizers returning None
        with pytest.raises(ValueError, match="Net.configure_optimizers returns no optimizer"):
            fit(module(PACKAGES[0], lambda self: None), callbacks=[momentum()])
