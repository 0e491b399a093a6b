"""SwapOptimizer across checkpoints and calls of fit."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from swap_cases import PACKAGES, assert_equal, fit, loader, module, momentum, sgd, with_schedule

import lightning_metaopt as lmo


@pytest.mark.parametrize("package", PACKAGES)
def test_resume_is_exact(package: str, tmp_path: Any) -> None:
    callbacks = pytest.importorskip(package).callbacks
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}

    def saver(name: str) -> Any:
        return callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, filename=name + "{step}", save_top_k=-1)

    straight, broken, resumed = (module(package, with_schedule(0.3)) for _ in range(3))
    whole = fit(straight, package, [lmo.SwapOptimizer(lmo.rules.Adam(0.02))], max_epochs=3)
    fit(broken, package, [lmo.SwapOptimizer(lmo.rules.Adam(0.02)), saver("at-")], max_epochs=2, **saving)
    # what counts is the phi in the checkpoint
    again = [lmo.SwapOptimizer(lmo.rules.Adam(0.5)), saver("again-")]
    part = fit(resumed, package, again, ckpt=str(tmp_path / "at-step=6.ckpt"), max_epochs=3, **saving)
    assert straight.rates[6:] == resumed.rates
    assert_equal(straight, resumed)
    one, two = whole.optimizers[0].state_dict(), part.optimizers[0].state_dict()
    assert all(torch.equal(one["state"][i][key], two["state"][i][key]) for i in one["state"] for key in one["state"][i])


def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path: Any) -> None:
    def saver() -> Any:
        return ModelCheckpoint(dirpath=tmp_path, save_last=True)

    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(module(PACKAGES[0], sgd()), callbacks=[saver()], max_epochs=1, **saving)
    net, path = module(PACKAGES[0], sgd()), str(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="no entry 'rule'"):
        fit(net, callbacks=[momentum(), saver()], ckpt=path, **saving)


def test_checkpoints_load_without_pickled_code(tmp_path: Any) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(module(PACKAGES[0], sgd()), callbacks=[momentum(), saver], enable_checkpointing=True, default_root_dir=tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["rule"]["class"] == "HeavyBall"


def test_fit_twice() -> None:
    once, twice = module(PACKAGES[0], sgd()), module(PACKAGES[0], sgd())
    fit(once, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05))], max_epochs=4)
    optimizer = torch.optim.SGD(twice.parameters(), 0.05)
    twice.configure_optimizers = lambda: optimizer  # even the same one again
    trainer = fit(twice, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05))], max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(twice, loader())
    assert_equal(once, twice)
    optimizer.step()  # its owner may have it back afterwards
