"""Mode "bootstrapped" of OptimisticMetaGrad in a Trainer: precision, accumulation, clipping, processes, checkpoints, refusals."""

from __future__ import annotations

import gc
import math
import random
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from replay_cases import CASES
from step_cases import PACKAGES, fit, flat, gan, lazy, module, sgd
from torch import Tensor, nn

from lightning_metaopt.callbacks import OptimisticMetaGrad
from lightning_metaopt.replay import Replay


def make(**options: Any) -> Any:
    return OptimisticMetaGrad(mode="bootstrapped", **{"lookahead": 2, "mu": "loss", **options})


def outside(net: Any, batches: list[Any], *, window: int = 1, autocast: bool = False, clip: float | None = None) -> Tensor:
    """The same training as a bare loop."""
    context = (lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)) if autocast else None
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    replay = Replay(net, **({"context": context} if context else {}))
    engine = OptimisticMetaGrad.attach(optimizer, replay, mode="bootstrapped", lookahead=2, mu="loss")
    if clip:

        def limit(other: Any) -> None:
            nn.utils.clip_grad_norm_([p for group in other.param_groups for p in group["params"]], clip)

        engine.bootstrap.bind(replay, clip=limit)
    torch.manual_seed(1)
    for number, batch in enumerate(batches):
        engine.bootstrap.record(batch, number, 1 / window)
        if number % window == 0:
            optimizer.zero_grad()
        if context:
            with context():
                loss = net.training_step(batch, number)
        else:
            loss = net.training_step(batch, number)
        (loss / window).backward()
        if (number + 1) % window == 0:
            if clip:
                limit(optimizer)
            optimizer.step()
    return flat(net)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": True}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"window": 2}),
    "clipping": ({"gradient_clip_val": 0.3}, {"clip": 0.3}),
}


@pytest.mark.parametrize(("variant", "package"), [*((name, PACKAGES[0]) for name in VARIANTS), ("plain", PACKAGES[1])])
def test_a_bare_loop_does_the_same(variant: str, package: str) -> None:
    options, same = VARIANTS[variant]
    inside, bare, alone = (module(sgd(momentum=0.9), package=package) for _ in range(3))
    callback = make()
    trainer = fit(inside, callback, package=package, **options)
    batches = [batch for _ in range(2) for batch in trainer.train_dataloader]
    assert torch.equal(flat(inside), outside(bare, batches, **same))
    fit(alone, package=package, **options)
    assert not torch.equal(flat(inside), flat(alone))
    assert callback.engines[0].bootstrap.replay is None  # nothing holds the module any longer
    assert not callback.engines[0].bootstrap.moments


def test_clipping_acts_on_steps_ahead() -> None:
    clipped, free = module(sgd(momentum=0.9)), module(sgd(momentum=0.9))
    batches = [batch for _ in range(2) for batch in fit(module(sgd())).train_dataloader]
    assert not torch.equal(outside(clipped, batches, clip=0.3), outside(free, batches))


def test_own_clipping_is_used() -> None:
    net, seen = module(sgd()), []

    def configure(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        seen.append(optimizer is self.trainer.optimizers[0])
        self.log("norm", torch.ones(()))
        for group in optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], 0.01)

    type(net).configure_gradient_clipping = configure
    fit(net, make(mu="euclidean"))
    assert seen.count(True) == 12
    assert seen.count(False) == 11 * 2  # two steps ahead in each but the first


@pytest.mark.parametrize("case", ["BatchNorm", "dropout", "torchmetrics and a dictionary", "tied", "augmentation in place", "None"])
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_the_module_does_not_notice(case: str) -> None:
    """At a rate of nearly nothing, training is that of the module alone."""
    alone, helped = CASES[case](PACKAGES[0]), CASES[case](PACKAGES[0])
    import numpy as np

    metrics = []
    for net, callbacks in ((alone, []), (helped, [make(update="raw", meta_lr=1e-300)])):
        np.random.seed(0)
        random.seed(0)
        trainer = fit(net, *callbacks)
        metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if "Optimistic" not in k})
        if callbacks:
            assert callbacks[0].engines[0].factors()
    torch.testing.assert_close(dict(alone.state_dict()), dict(helped.state_dict()), rtol=1e-5, atol=1e-6)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*contains uninitialized parameters", "ignore:Lazy modules are")
def test_lazy_parameters_and_a_scaler() -> None:
    callback = make()
    fit(module(sgd(), lazy), callback)
    assert callback.engines[0].factors()
    from lightning.pytorch.plugins import MixedPrecision

    callback, net = make(update="raw", meta_lr=0.05), module(sgd())
    fit(net, callback, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))])
    assert callback.engines[0].skipped == 0
    assert torch.isfinite(flat(net)).all()
    reference, other = make(update="raw", meta_lr=0.05), module(sgd())
    fit(other, reference)
    for one, two in zip(callback.engines[0].factors().values(), reference.engines[0].factors().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", [{}, {"update": "raw", "meta_lr": 1e-2, "mu": "euclidean"}])
def test_resumes_exactly(options: dict[str, Any], tmp_path: Any) -> None:
    whole, again, other = (module(sgd(momentum=0.9)) for _ in range(3))
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    fit(whole, make(**options), checkpoint, enable_checkpointing=True, max_epochs=4)
    path = tmp_path / "step=12.ckpt"
    assert "OptimisticMetaGrad" in torch.load(path, weights_only=True)["callbacks"]
    callback = make(**options)
    fit(again, callback, ckpt=path, max_epochs=4)
    assert torch.equal(flat(whole), flat(again))
    assert callback.engines[0].steps == 24
    for changed in (make(**{**options, "lookahead": 3}), OptimisticMetaGrad(mode="standard")):
        with pytest.raises(ValueError, match="saved with other options"):
            fit(other, changed, ckpt=path, max_epochs=4)


def test_processes_average_their_targets() -> None:
    """Two processes with halves of the batches: as one that accumulates them. What one alone would find is not enough."""
    net, bare = module(sgd(momentum=0.9)), module(sgd(momentum=0.9))
    batches = fit(module(sgd())).train_dataloader
    pairs = [[first, second] for first, second in zip(*[iter(batches)] * 2, strict=True)]

    def train(net: Any, average: bool) -> Tensor:
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        replay = Replay(net)
        engine = OptimisticMetaGrad.attach(optimizer, replay, mode="bootstrapped", lookahead=2, mu="loss")
        calls: list[Any] = []
        for pair in pairs * 4:
            if average:
                other = Replay(net)
                partner = other.record(pair[1])
                # The other process, which is at the same point and reduces the same vectors.
                original = replay.grad

                def grad(
                    moments: Any, at: Any, partner: Any = partner, other: Any = other, original: Any = original, **o: Any
                ) -> Any:
                    calls.append(other.grad(partner, at)[1])
                    return original(moments, at, **o)

                replay = Replay(net)
                original = replay.grad
                object.__setattr__(replay, "grad", lambda m, at, _g=grad, _o=original, **o: _g(m, at, original=_o, **o))
                engine.bootstrap.bind(
                    replay, average=lambda flat: (flat + torch.cat([g.flatten() for g in calls.pop().values()])) / 2
                )
                engine.bootstrap.record(pair[0])
            else:
                for batch in pair:
                    engine.bootstrap.record(batch, weight=0.5)
            optimizer.zero_grad()
            for batch in pair:
                (net.training_step(batch, 0) / 2).backward()
            optimizer.step()
        return flat(net)

    torch.testing.assert_close(train(net, average=True), train(bare, average=False), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_is_refused_when_fit_starts() -> None:
    with pytest.raises(ValueError, match="automatic_optimization=False.*Use automatic optimisation"):
        fit(gan(), make())
    net = module(sgd())

    def training_step(self: Any, dataloader_iter: Any) -> None:
        raise AssertionError

    type(net).training_step = training_step
    with pytest.raises(TypeError, match=r"let it take \(batch, batch_idx\)"):
        fit(net, make())


def test_a_step_that_is_left_out_takes_its_batch_along() -> None:
    """Under a scaler a step with infinite gradients is not taken: the next one must not count its batch."""
    from lightning.pytorch.plugins import MixedPrecision

    net, counts = module(sgd()), []
    original = type(net).training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = original(self, batch, batch_idx)
        counts.append(len(callback.engines[0].bootstrap.moments))
        return loss * math.inf if batch_idx == 2 else loss

    type(net).training_step = training_step
    callback = make()
    fit(net, callback, plugins=[MixedPrecision("16-mixed", device="cpu")])
    assert callback.engines[0].steps == 10
    assert set(counts) <= {0, 1}


def test_nothing_leaks() -> None:
    net, callback = module(sgd()), make()
    fit(net, callback)
    replay = Replay(net)
    batch = (torch.randn(4, 3), torch.randn(4, 1))
    inside = weakref.ref(batch[0])
    moment = replay.record(batch)
    copied = weakref.ref(moment.batch[0])
    params = replay.params()
    kept = weakref.ref(params["body.0.weight"])
    replay.hvp(moment, params, params)
    replay.grad(moment, params, create_graph=True)
    replay.loss(moment, params)
    module_ref = weakref.ref(net)
    net.trainer = None
    del batch, moment, params, replay, net, callback  # Lightning gives callbacks the module's own log()
    gc.collect()
    assert [ref() for ref in (inside, copied, kept, module_ref)] == [None] * 4
