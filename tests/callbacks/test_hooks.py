"""With factors of 1, training is bit for bit the same as without the callback, in everything that Lightning and torch offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import Callback, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from step_cases import PACKAGES, ProbeCallback, fit, flat, gan, lazy, module, sgd
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.callbacks import EvaluationWeights, OptimisticMetaGrad, PolynomialDecay


def inert() -> OptimisticMetaGrad:
    """Computes everything, and finds factors of 1."""
    return OptimisticMetaGrad(meta_lr=0.0, trust=1e9)


def groups(self: Any) -> Any:
    first, second = list(self.body[0].parameters()), list(self.body[2].parameters())
    return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": second}], lr=0.02, momentum=0.9, weight_decay=0.1)


def scheduled(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    return configure


def third_party(name: str) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        return {
            "prodigy": lambda: pytest.importorskip("prodigyopt").Prodigy(self.parameters(), d0=1e-3),
            "schedulefree": lambda: pytest.importorskip("schedulefree").SGDScheduleFree(self.parameters(), lr=0.05),
            "learned": lambda: lmo.LearnedOptimizer(self.named_parameters(), lmo.rules.HeavyBall(0.05, 0.9)),
        }[name]()

    return configure


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def frozen() -> nn.Module:
    body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    body[0].weight.requires_grad_(False)
    return body


def scaler() -> dict[str, Any]:
    # the first steps overflow in half precision: the scaler skips them
    made = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=made)], "gradient_clip_val": 1.0}


Lr = torch.optim.lr_scheduler
# configure_optimizers, options of the Trainer, the network
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, Any]], Callable[[], nn.Module] | None]] = {
    "plain": (sgd(), dict, None),
    "momentum": (sgd(momentum=0.9, nesterov=True), dict, None),
    "Adam": (lambda self: torch.optim.Adam(self.parameters(), 0.01), dict, None),
    "AdamW, fused": (lambda self: torch.optim.AdamW(self.parameters(), 0.01, fused=True), dict, None),
    "RMSprop": (lambda self: torch.optim.RMSprop(self.parameters(), 0.01), dict, None),
    "maximize": (lambda self: torch.optim.SGD(self.parameters(), 0.01, maximize=True), dict, None),
    "prodigy": (third_party("prodigy"), dict, None),
    "schedulefree": (third_party("schedulefree"), dict, None),
    "learned": (third_party("learned"), dict, None),
    "K-FAC": (lambda self: lmo.baselines.KFAC(self.parameters(), lr=0.1), dict, None),
    "groups": (groups, dict, None),
    "warm-up from 0": (scheduled(lambda o: Lr.LambdaLR(o, lambda step: step / 12)), dict, None),
    "cosine to 0": (scheduled(lambda o: Lr.CosineAnnealingLR(o, 6)), dict, None),
    "one cycle": (scheduled(lambda o: Lr.OneCycleLR(o, 0.2, 12)), dict, None),
    "accumulate": (sgd(momentum=0.9), lambda: {"accumulate_grad_batches": 4}, None),
    "clip": (sgd(momentum=0.9), lambda: {"gradient_clip_val": 0.1}, None),
    "bf16-mixed": (sgd(momentum=0.9), lambda: {"precision": "bf16-mixed"}, None),
    "bf16-true": (sgd(momentum=0.9), lambda: {"precision": "bf16-true"}, None),
    "16-mixed": (sgd(momentum=0.9), scaler, None),
    "frozen": (sgd(), dict, frozen),
    "shared": (sgd(momentum=0.9), dict, Tied),
    "batch norm, dropout": (
        sgd(momentum=0.9),
        dict,
        lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)),
    ),
    "lazy": (sgd(momentum=0.9), dict, lazy),
}


@pytest.mark.filterwarnings("ignore:.*contains uninitialized parameters", "ignore:Lazy modules are")
@pytest.mark.parametrize("case", CASES)
def test_factors_of_one_change_nothing(case: str) -> None:
    configure, options, body = CASES[case]
    plain, followed, moved = (module(configure, body) for _ in range(3))
    modes = [EvaluationWeights()] if case == "schedulefree" else []
    fit(plain, *modes, **options())
    callback = inert()
    fit(followed, *modes, callback, **options())
    assert callback.engines[0].steps >= 3
    assert callback.engines[0].clipped == 0
    assert torch.equal(flat(plain), flat(followed))
    fit(moved, *modes, OptimisticMetaGrad(meta_lr=0.3), **options())
    assert not torch.equal(flat(plain), flat(moved))
    assert torch.isfinite(flat(moved)).all()


@pytest.mark.parametrize("package", PACKAGES)
def test_two_optimizers_by_hand_in_both_packages(package: str) -> None:
    plain, followed = gan(package), gan(package)
    fit(plain, package=package, precision="bf16-mixed")
    callback = inert()
    fit(followed, callback, package=package, precision="bf16-mixed")
    assert [engine.steps for engine in callback.engines] == [12, 12]
    assert torch.equal(flat(plain), flat(followed))
    chosen = OptimisticMetaGrad(optimizer_index=1)
    trainer = fit(gan(package), chosen, package=package)
    assert [engine.optimizer for engine in chosen.engines] == [trainer.optimizers[1]]
    with pytest.raises(ValueError, match="optimizer_index is 2, but the module configured 2"):
        fit(gan(package), OptimisticMetaGrad(optimizer_index=2), package=package)


@pytest.mark.filterwarnings("ignore:.*does not have a `.*dataloader`", "ignore:.*log_every_n_steps", "ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["finder", "SWA", "averages", *(["EMA"] if hasattr(of_lightning, "EMAWeightAveraging") else [])])
def test_beside_other_callbacks(name: str, first: bool, tmp_path: Any) -> None:
    make = {
        "finder": lambda: LearningRateFinder(num_training_steps=8, min_lr=1e-3, max_lr=0.3),
        "SWA": lambda: StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1),
        "EMA": lambda: of_lightning.EMAWeightAveraging(decay=0.9),
        "averages": lambda: EvaluationWeights(average=PolynomialDecay()),
    }[name]
    plain, followed = module(sgd(momentum=0.9)), module(sgd(momentum=0.9))
    followed.configure_optimizers = lambda: torch.optim.SGD(followed.parameters(), followed.lr, momentum=0.9)
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), plain.lr, momentum=0.9)
    options: dict[str, Any] = {"max_epochs": 3, "default_root_dir": tmp_path, "enable_progress_bar": False}
    fit(plain, make(), **options)
    callback = inert()
    fit(followed, *([callback, make()] if first else [make(), callback]), **options)
    assert torch.equal(flat(plain), flat(followed))
    assert callback.engines[0].steps == 18  # none of the finder's


def test_averages_are_of_the_corrected_iterates() -> None:
    """Averages see what the callback has made of a step, whichever of the two is first."""
    found = []
    for order in (1, -1):
        net = module(sgd())
        fit(net, *[OptimisticMetaGrad(), EvaluationWeights(average=PolynomialDecay())][::order])
        found.append(flat(net))
    assert torch.equal(*found)


def test_fit_twice_begins_afresh() -> None:
    plain, followed, callback = module(sgd(momentum=0.9)), module(sgd(momentum=0.9)), inert()
    trainers = [fit(plain), fit(followed, callback)]
    for trainer, net in zip(trainers, (plain, followed), strict=True):
        trainer.fit_loop.max_epochs = 4
        trainer.fit(net, net.trainer.train_dataloader)
    assert torch.equal(flat(plain), flat(followed))
    assert callback.engines[0].steps == 12
    assert callback.engines[0].optimizer is trainers[1].optimizers[0]
    optimizer = callback.engines[0].optimizer
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:.*This process .* is multi-threaded", "ignore:Using .DistributedSampler")
def test_two_processes() -> None:
    """Gradients are averaged before the step: both processes learn the same factors as one with both batches."""
    results = {}
    for devices in (1, 2):
        for name, make in (("none", list), ("inert", lambda: [inert()]), ("learning", lambda: [OptimisticMetaGrad()])):
            net = module(sgd(momentum=0.9))
            strategy: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {"accumulate_grad_batches": 2}
            fit(net, *make(), **strategy, max_epochs=1)
            results[devices, name] = flat(net)
    assert torch.equal(results[2, "none"], results[2, "inert"])
    assert torch.isfinite(results[2, "learning"]).all()
    assert not torch.equal(results[2, "none"], results[2, "learning"])


def test_what_is_handed_over() -> None:
    """The final gradient, of accumulated batches and clipped; the values around the step; learning rates."""
    net, callback = module(scheduled(lambda o: Lr.StepLR(o, 1, 0.5))), ProbeCallback()
    fit(net, callback, accumulate_grad_batches=3, gradient_clip_val=1e-3)
    (engine,) = callback.engines
    assert len(engine.seen) == 4
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for step, moves in enumerate(engine.seen):
        norm = torch.cat([move.grad.flatten() for move in moves]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
        for number, move in enumerate(moves):
            velocity[number] = 0.9 * velocity[number] + move.grad
            assert (move.lr, move.base_lr) == (0.05 * 0.5**step, 0.05)
            torch.testing.assert_close(move.param, move.old - move.lr * velocity[number], rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
@pytest.mark.parametrize("name", ["lbfgs", "none", "sparse", "strategy", "complex", "no optimizer"])
def test_refusals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lbfgs":
        with pytest.raises(ValueError, match="LBFGS searches along a line"):
            fit(module(lambda self: torch.optim.LBFGS(self.parameters())), OptimisticMetaGrad())
    elif name == "none":
        with pytest.raises(ValueError, match="has no parameters"):
            fit(module(lambda self: None), OptimisticMetaGrad())
    elif name == "sparse":
        with pytest.raises(ValueError, match="sparse=False in the embedding 'body.0'"):
            fit(module(sgd(), lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True))), OptimisticMetaGrad())
        table = nn.Embedding(3, 2, sparse=True)
        optimizer = torch.optim.SGD(table.parameters(), 0.1)
        OptimisticMetaGrad.attach(optimizer)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="dense gradients"):
            optimizer.step()
    elif name == "strategy":
        monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", property(lambda self: True))
        with pytest.raises(RuntimeError, match="strategy='ddp' or a single device"):
            fit(module(sgd()), OptimisticMetaGrad())
    elif name == "complex":
        with pytest.raises(TypeError, match="view_as_real"):
            OptimisticMetaGrad.attach(torch.optim.SGD([torch.zeros(2, dtype=torch.complex64)], 0.1))
    else:
        with pytest.raises(TypeError, match=r"is not a torch\.optim\.Optimizer"):
            OptimisticMetaGrad.attach(object())  # type: ignore[arg-type]  # that is the point


def test_a_module_that_steps_other_optimizers_is_told() -> None:
    net = gan()
    net.optimizers = lambda: [torch.optim.SGD(net.maker.parameters(), 0.1), torch.optim.SGD(net.judge.parameters(), 0.1)]
    net.toggle_optimizer = net.untoggle_optimizer = lambda optimizer: None
    with pytest.warns(UserWarning, match="saw no step"):
        fit(net, OptimisticMetaGrad())


def test_steps_before_training_are_not_followed() -> None:
    class Early(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            for param in pl_module.parameters():
                param.grad = torch.ones_like(param)
            trainer.optimizers[0].step()

    callback = ProbeCallback()
    fit(module(sgd()), callback, Early())
    assert callback.engines[0].steps == 12
