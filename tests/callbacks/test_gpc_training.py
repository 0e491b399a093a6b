"""GPCMetaOpt in a Trainer: accumulation, clipping, other optimizers, and steps that go wrong."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from step_cases import PACKAGES, fit, flat, gan, lazy, loader, module, sgd
from torch import Tensor

from lightning_metaopt.callbacks import GPCMetaOpt
from lightning_metaopt.callbacks.coefficients import Coefficients

HISTORY, META = 2, 0.05


def make(**options: Any) -> GPCMetaOpt:
    defaults = {"history": HISTORY, "clip": None, "meta_optimizer": lambda m: torch.optim.SGD(m, META), "log": False}
    return GPCMetaOpt(**{**defaults, **options})


def value(callback: GPCMetaOpt) -> Tensor:
    found: Tensor = callback.engines[0].coefficients.value.detach()
    return found


def algorithm(net: Any, steps: list[list[Any]], rollout: int, lr: float, clip: Any = lambda g: g) -> tuple[Tensor, Tensor]:
    """Algorithm 7 on accumulated batches, with clipped gradients, by double backward."""
    net = net.double()
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def loss(x: Tensor, t: int) -> Tensor:
        pieces = x.split([shape.numel() for shape in shapes.values()])
        tree = {f"{name}": piece.view(shape) for piece, (name, shape) in zip(pieces, shapes.items(), strict=True)}
        parts = [
            torch.func.functional_call(net.body, {n.removeprefix("body."): p for n, p in tree.items()}, (batch[0].double(),))
            .sub(batch[1].double())
            .square()
            .mean()
            for batch in steps[t]
        ]
        return torch.stack(parts).mean()

    def grad(x: Tensor, t: int) -> Tensor:
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        return clip(torch.autograd.grad(loss(leaf, t), leaf, create_graph=True)[0])

    x, g, m = [flat(net)], [], torch.zeros(HISTORY, dtype=torch.float64)
    for t in range(len(steps)):
        g.append(grad(x[t], t).detach())
        if t >= HISTORY + rollout - 1:
            own, point = m.clone().requires_grad_(), x[t - rollout]
            for s in range(t - rollout, t):
                point = point - lr * grad(point, s) - sum(own[h] * g[s - h] for h in range(HISTORY))
            m = m - META * torch.autograd.grad(loss(point, t), own)[0]
        x.append(x[t] - lr * g[t] - sum(m[h] * g[t - h] for h in range(min(HISTORY, t + 1))))
    return x[-1], m


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("clip", ["none", "norm", "value"])
def test_accumulated_and_clipped_steps_are_repeated(package: str, clip: str) -> None:
    if package != PACKAGES[0] and clip != "norm":
        pytest.skip("one of them is enough")
    batches = list(loader()) * 2
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    limit = {"norm": 0.3, "value": 0.1}.get(clip)
    clips = {
        "none": lambda g: g,
        "norm": lambda g: g * (0.3 / (g.norm() + 1e-6)).clamp(max=1.0),
        "value": lambda g: g.clamp(-0.1, 0.1),
    }
    expected, m = algorithm(module(sgd(0.2)), steps, 2, 0.2, clips[clip])
    net, callback = module(sgd(0.2), package=package), make()
    options: dict[str, Any] = {"gradient_clip_val": limit, "gradient_clip_algorithm": clip if limit else None}
    fit(net, callback, package=package, accumulate_grad_batches=2, precision="64-true", **options)
    assert callback.engines[0].coefficients.steps == 3
    torch.testing.assert_close(value(callback), m, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(net), expected, rtol=1e-10, atol=1e-12)
    if limit:
        assert not torch.allclose(m, algorithm(module(sgd(0.2)), steps, 2, 0.2)[1], rtol=1e-2)


def test_clipping_by_the_module() -> None:
    net, callback = module(sgd(0.2)), make()

    def configure_gradient_clipping(self: Any, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        torch.nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 0.1)

    type(net).configure_gradient_clipping = configure_gradient_clipping
    fit(net, callback, precision="64-true")
    other, plain = module(sgd(0.2)), make()
    fit(other, plain, precision="64-true")
    assert value(callback).abs().max() > 0
    assert not torch.allclose(value(callback), value(plain), rtol=1e-2)


@pytest.mark.parametrize("rollout", [1, 3])
def test_directions_of_other_optimizers(rollout: int) -> None:
    """x+ = x + u - sum_h M^h d, d = -u / lr, with recorded updates as constants."""

    def adam(params: Any) -> Any:
        return torch.optim.AdamW(params, 0.02, weight_decay=0.1)

    net, twin = module(sgd()).double(), module(sgd()).double()
    base = adam(twin.parameters())
    callback = make(rollout=rollout, meta_optimizer=lambda m: torch.optim.SGD(m, 1e-3))
    type(net).configure_optimizers = lambda self: adam(self.parameters())
    fit(net, callback, precision="64-true")
    x, u, m = [flat(twin)], [], torch.zeros(HISTORY, dtype=torch.float64)
    for t, batch in enumerate(list(loader()) * 2):
        torch.nn.utils.vector_to_parameters(x[t].clone(), twin.parameters())
        base.zero_grad()
        (twin.body(batch[0].double()) - batch[1]).square().mean().backward()
        if t >= HISTORY + rollout - 1:
            own, point = m.clone().requires_grad_(), x[t - rollout]
            for s in range(t - rollout, t):
                point = point + u[s] + sum(own[h] * u[s - h] / 0.02 for h in range(HISTORY))
            now = module(sgd()).double()
            torch.nn.utils.vector_to_parameters(point.detach(), now.parameters())
            loss = (now.body(batch[0].double()) - batch[1]).square().mean()
            slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(now.parameters()))])
            m = m - 1e-3 * torch.autograd.grad(point, own, slopes)[0]
        base.step()
        u.append(flat(twin) - x[t])
        x.append(x[t] + u[t] + sum(m[h] * u[t - h] / 0.02 for h in range(min(HISTORY, t + 1))))
    assert m.abs().max() > 1e-4
    torch.testing.assert_close(value(callback), m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(net), x[-1], rtol=1e-9, atol=1e-12)
    rule = callback.rule()
    assert rule.base == "AdamW"
    with pytest.raises(ValueError, match="directions of AdamW, the module configured SGD"):
        fit(module(sgd()), make(coefficients=rule))


def test_a_spike_does_not_stop_learning() -> None:
    def learn(clip: float | None, spike: float) -> tuple[float, int]:
        own = Coefficients(torch.zeros(2), lambda m: torch.optim.Adam(m, 1e-3), clip)
        for number in range(60):
            own.step(torch.tensor([-1.0, -0.5]) * (spike if number == 30 else 1.0))
        return float(own.value.detach()[0]), own.clipped

    calm, never = learn(10.0, 1.0)
    clipped, once = learn(10.0, 1e6)
    stopped, _ = learn(None, 1e6)
    assert (never, once) == (0, 1)
    assert clipped == pytest.approx(calm, rel=0.4)
    assert stopped < 0.7 * calm
    own = Coefficients(torch.zeros(1), lambda m: torch.optim.SGD(m, 1.0), 10.0)
    for number in range(5):
        if number == 4:
            own.begin()  # the first meta-gradient of an episode sets the scale
        own.step(torch.ones(1) * (1e3 if number == 4 else 1.0))
    assert own.clipped == 0


def test_bad_numbers_leave_the_coefficients_alone() -> None:
    net, callback = module(sgd()), make(log=True)
    original, kept = type(net).training_step, []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if callback.engines[0].coefficients is not None:
            kept.append(value(callback).clone())
        loss: Tensor = original(self, batch, batch_idx)
        return loss * math.inf if self.trainer.global_step == 7 else loss

    type(net).training_step = training_step
    with pytest.warns(UserWarning, match="not finite"):
        fit(net, callback)
    assert callback.engines[0].coefficients.skipped >= 1
    assert torch.isfinite(value(callback)).all()
    assert value(callback).abs().max() > 0


def test_a_scaler_that_leaves_steps_out() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    net, callback = module(sgd()), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    fit(net, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    plain, reference = module(sgd()), make()
    fit(plain, reference)
    torch.testing.assert_close(value(callback), value(reference), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_small_gradients_do_not_vanish_from_rollouts_in_half_precision(size: float) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def trained(**options: Any) -> Tensor:
        net, callback = module(sgd(0.05 / size)), make(meta_optimizer=lambda m: torch.optim.SGD(m, 1e-9))
        original = type(net).training_step
        type(net).training_step = lambda self, batch, batch_idx: size * original(self, batch, batch_idx)
        fit(net, callback, **options)
        assert callback.engines[0].coefficients.skipped == 0
        return value(callback) / size**2 * 1e9

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    found, expected = trained(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), trained()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*contains uninitialized parameters", "ignore:Lazy modules are")
def test_lazy_parameters_and_half_precision() -> None:
    callback = make()
    fit(module(sgd(), lazy), callback)
    assert callback.engines[0].coefficients.steps == 12 - 1 - 3  # the first update of lazy parameters is not followed
    full, half = make(history=4), make(history=4, bf16=True)
    for one in (full, half):
        fit(module(sgd()), one)
    torch.testing.assert_close(value(half), value(full), rtol=2e-2, atol=1e-4)
    assert not torch.equal(value(half), value(full))
    assert half.engines[0]._ring.values.dtype == torch.bfloat16


def test_schedules_are_followed() -> None:
    """Where the learning rate is 0, nothing moves but what earlier steps left behind."""

    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    net, callback = module(configure), make(coefficients=[0.1, 0.2], freeze_after=0)
    points: list[Tensor] = []
    type(net).on_train_batch_end = lambda self, *_: points.append(flat(self))
    fit(net, callback)
    moves = [(b - a).norm() for a, b in itertools.pairwise(points)]
    assert moves[2] > 0  # the step after: the second-last gradient
    assert all(move == 0 for move in moves[4:])


def test_gram_works_with_manual_optimisation() -> None:
    callback = make(mode="gram", rollout=1, meta_optimizer=lambda m: torch.optim.SGD(m, 1e-4))
    fit(gan(), callback)
    assert all(engine.coefficients.steps > 0 for engine in callback.engines)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mode='gram' without"):
        fit(gan(), make())
    with pytest.raises(ValueError, match="LBFGS"):
        fit(module(lambda self: torch.optim.LBFGS(self.parameters())), make())
    with pytest.raises(ValueError, match="maximize"):
        fit(module(sgd(maximize=True)), make())
    with pytest.raises(ValueError, match="mode='gram'"):
        GPCMetaOpt.attach(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(ValueError, match="MetaLearner"):
        make(kind="full")
    with pytest.raises(ValueError, match="before the first meta-step"):
        make(episode_steps=3)
    with pytest.raises(ValueError, match="freeze_after"):
        make(fixed_batch=True)
    with pytest.raises(ValueError, match="leave it out"):
        make(mode="gram", common_batch=True)
    with pytest.raises(ValueError, match="learned for this history"):
        fit(module(sgd()), make(coefficients=[0.1, 0.2, 0.3]))
    for options in ({"history": 0}, {"mode": "fast"}, {"meta_lr": -1.0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match="must"):
            make(**options)


def test_sharded_strategies_are_refused() -> None:
    from types import SimpleNamespace

    strategy = SimpleNamespace(handles_gradient_accumulation=False, restore_checkpoint_after_setup=True)
    with pytest.raises(RuntimeError, match="strategy='ddp' or a single device"):
        make().setup(SimpleNamespace(strategy=strategy), module(sgd()), "fit")
