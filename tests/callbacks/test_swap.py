"""SwapOptimizer in the Trainers of both packages, against the same training with an optimizer of torch."""

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from swap_cases import PACKAGES, QUIET, assert_equal, fit, loader, module, momentum, sgd, with_schedule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_metaopt as lmo

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 4},
    "clip": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_torch_does(way: str, package: str) -> None:
    plain, swapped = module(package, sgd(momentum=0.9)), module(package, sgd(lr=3.0))
    fit(plain, package, **WAYS[way])
    trainer = fit(swapped, package, [momentum()], **WAYS[way])
    assert isinstance(trainer.optimizers[0], lmo.LearnedOptimizer)
    assert_equal(plain, swapped, 2e-2 if way == "bf16-true" else 1e-5)
    with pytest.raises(AssertionError):
        assert_equal(swapped, module(package, sgd()).to(swapped.dtype), 1e-3)  # it has moved at all


def test_grad_scaler_and_its_skipped_steps() -> None:
    plain, swapped = module(PACKAGES[0], sgd(momentum=0.9)), module(PACKAGES[0], sgd())
    for net, callbacks in ((plain, []), (swapped, [momentum()])):
        # the first steps overflow in half precision: the scaler skips them
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        fit(net, callbacks=callbacks, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)], gradient_clip_val=1.0)
        assert scaler.get_scale() < 2.0**24
    assert_equal(plain, swapped, 1e-5)
    assert swapped.trainer.optimizers[0].skipped_steps == 0


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("manual", [False, True])
def test_schedulers_keep_acting_and_do_not_warn(package: str, manual: bool) -> None:
    plain = module(package, with_schedule(0.05))
    swapped = module(package, with_schedule(0.7), manual=manual)
    fit(plain, package)
    if manual:  # the module steps its schedulers itself

        def step(*_: Any) -> None:
            swapped.lr_schedulers().step()

        swapped.on_train_batch_end = step
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(swapped, package, [lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05))])
    assert_equal(plain, swapped, 1e-6)
    assert swapped.rates[0] == 0.7
    assert swapped.rates[-1] < 0.1


def test_one_cycle_peaks_at_the_rule_as_trained() -> None:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    net = module(PACKAGES[0], configure)
    trainer = fit(net, callbacks=[momentum()])
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr_unit"] == 0.2
    assert max(net.rates) == pytest.approx(0.2, rel=0.1)
    assert net.rates[0] == pytest.approx(0.2 / 25)


def test_lr_unit_weight_decay_and_guard() -> None:
    def configure(self: Any) -> Any:
        decayed, others = list(self.body[0].parameters()), list(self.body[2].parameters())
        groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.01)

    plain, swapped = module(PACKAGES[0], configure), module(PACKAGES[0], configure)
    fit(plain)
    # with lr_unit the steps are lr / lr_unit * 0.05 = lr here
    fit(swapped, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05), lr_unit=0.05)])
    assert_equal(plain, swapped, 1e-6)
    bare, reference = module(PACKAGES[0], configure), module(PACKAGES[0], sgd(0.05))
    fit(bare, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05), weight_decay=0.0)])
    fit(reference)
    assert_equal(bare, reference, 1e-6)
    slow = module(PACKAGES[0], configure)
    before = torch.cat([p.detach().flatten() for p in slow.parameters()]).clone()
    fit(slow, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(5.0), weight_decay=0.0, max_update_norm=1e-3)], max_steps=1)
    after = torch.cat([p.detach().flatten() for p in slow.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def two_optimizers(self: Any) -> Any:
    return [torch.optim.SGD(self.body[0].parameters(), 0.05), torch.optim.SGD(self.body[2].parameters(), 0.05)]


@pytest.mark.parametrize("index", [None, 1])
def test_several_optimizers_and_manual_optimisation(index: int | None) -> None:
    plain, swapped = module(PACKAGES[0], two_optimizers, manual=True), module(PACKAGES[0], two_optimizers, manual=True)
    fit(plain)
    trainer = fit(swapped, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05), optimizer_index=index)])
    kinds = [isinstance(optimizer, lmo.LearnedOptimizer) for optimizer in trainer.optimizers]
    assert kinds == [index is None, True]
    assert trainer.global_step == 24
    assert_equal(plain, swapped, 1e-6)
    with pytest.raises(ValueError, match="optimizer_index is 2, but the module configured 2"):
        fit(swapped, callbacks=[lmo.SwapOptimizer(lmo.rules.GradientDescent(0.05), optimizer_index=2)])


def test_sized_rules_are_matched_by_the_modules_names() -> None:
    def configure(self: Any) -> Any:  # the usual split, in another order than the module's
        params = list(self.parameters())
        return torch.optim.SGD(
            [{"params": [p for p in params if p.dim() < 2]}, {"params": [p for p in params if p.dim() > 1]}], 0.1
        )

    plain, swapped = module(PACKAGES[0], sgd(0.05)), module(PACKAGES[0], configure)
    rule = lmo.rules.DCOGradient.for_module(swapped, scale=1 / math.sqrt(0.05))
    fit(plain)
    trainer = fit(swapped, callbacks=[lmo.SwapOptimizer(rule)])
    assert_equal(plain, swapped, 1e-6)
    assert "param_names" not in trainer.optimizers[0].param_groups[0]


def test_parameters_that_are_thawed_later() -> None:
    """As Lightning's BaseFinetuning does: a group without names is added to the running optimizer."""

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body[0], optimizer, initial_denom_lr=1)

    def configure(self: Any) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    plain, swapped = module(PACKAGES[0], configure), module(PACKAGES[0], configure)
    rule = lmo.rules.DCOGradient.for_module(swapped, scale=1 / math.sqrt(0.05))
    fit(plain, callbacks=[Thaw()])
    trainer = fit(swapped, callbacks=[Thaw(), lmo.SwapOptimizer(rule)])
    assert len(trainer.optimizers[0].param_groups) == 2
    assert_equal(plain, swapped, 1e-6)


class Plain(LightningModule):
    """Its optimizer comes from the command line, or is torch's Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.body(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_from_the_command_line(way: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rule.safetensors"
    lmo.save_rule(lmo.rules.HeavyBall(0.25), path)
    args = {
        "callback": [
            "--trainer.callbacks+=lightning_metaopt.SwapOptimizer",
            f"--trainer.callbacks.rule={path}",
            "--optimizer=Adam",
        ],
        "optimizer": [
            "--optimizer=lightning_metaopt.LearnedOptimizer",
            "--optimizer.rule=lightning_metaopt.rules.HeavyBall",
            "--optimizer.rule.init_args.lr=0.25",
            "--optimizer.weight_decay=0.1",
        ],
    }[way]
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    options = {**QUIET, "fast_dev_run": True}
    cli = LightningCLI(Plain, run=False, save_config_callback=None, trainer_defaults=options, seed_everything_default=False)
    cli.trainer.fit(cli.model)
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, lmo.LearnedOptimizer)
    assert optimizer.rule.describe()["lr"] == pytest.approx(0.25)
