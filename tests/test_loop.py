"""Meta-training against plain loops written by hand, and what Lightning brings along."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, unroll
from lightning_metaopt.task_loader import draw

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, double=True, start_std=1.0)
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


def momentum(lr: float = 0.01) -> lmo.rules.HeavyBall:
    return lmo.rules.HeavyBall(lr=lr, momentum=0.5).double()


def learner_of(rule: lmo.Rule | None = None, lr: float = 0.05, **options: Any) -> lmo.MetaLearner:
    settings = {"metagrad": lmo.Unrolled(steps=2), "optimizer": partial(torch.optim.Adam, lr=lr), "tasks": 4, "val_tasks": 3}
    return lmo.MetaLearner(rule or momentum(), FAMILY, **{**settings, **options})


def fit(learner: lmo.MetaLearner, **options: Any) -> lmo.MetaLoop:
    loop = lmo.MetaLoop(**{**QUIET, "keep": "last", **options})
    loop.fit(learner)
    return loop


def phi_of(rule: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in rule.parameters()])


def begin(rule: lmo.Rule, stream: str, number: int, size: int = 4) -> Episode:
    task, params, buffers = draw(FAMILY, 0, stream, number, size)
    return Episode(task, params, buffers, rule.init(params), origin=params)


def meta_step(rule: lmo.Rule, optimizer: torch.optim.Optimizer, episodes: list[Episode], steps: int = 2) -> list[Episode]:
    """Plain twin of a meta-step: autograd through the unroll, mean over all problems."""
    ends, losses = [], []
    for episode in episodes:
        end, _ = unroll(rule, episode, steps, order="second")
        losses.append(end.task.loss(end.params, {}, end.task.batch(end.step)))
        ends.append(end.detach())
    optimizer.zero_grad()
    torch.cat(losses).mean().backward()
    optimizer.step()
    return ends


def test_pool_that_starts_afresh_is_algorithm_1() -> None:
    learner = learner_of(pool=4)
    fit(learner, max_epochs=5)
    rule = momentum()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    for _ in range(5):
        meta_step(rule, optimizer, [begin(rule, "pool", 0)])
    torch.testing.assert_close(phi_of(learner.rule), phi_of(rule), rtol=1e-12, atol=0.0)
    assert learner.trainer.global_step == 5  # one meta-step an epoch


def test_minibatches_of_a_pool_carry_their_own_episodes() -> None:
    learner = learner_of(pool=8, horizon=4)
    fit(learner, max_epochs=5)
    rule = momentum()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    running = [begin(rule, "pool", lane) for lane in range(2)]
    for index in range(10):
        lane = index % 2
        (running[lane],) = meta_step(rule, optimizer, [running[lane]])
        if running[lane].step == 4:
            running[lane] = begin(rule, "pool", lane)
    torch.testing.assert_close(phi_of(learner.rule), phi_of(rule), rtol=1e-12, atol=0.0)


def test_fresh_problems_for_every_episode() -> None:
    learner = learner_of(horizon=4, steps_per_epoch=3)
    fit(learner, max_epochs=2)
    rule = momentum()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    for number in range(3):
        current = [begin(rule, "train", number)]
        for _ in range(2):
            current = meta_step(rule, optimizer, current)
    torch.testing.assert_close(phi_of(learner.rule), phi_of(rule), rtol=1e-12, atol=0.0)
    drawn = {
        float(draw(FAMILY, 0, stream, number, 4)[0].data["target"].sum()) for stream in ("train", "validation") for number in (0, 1)
    }
    assert len(drawn) == 4


def test_accumulated_minibatches_are_one_large_batch() -> None:
    learner = learner_of(pool=8)
    fit(learner, max_epochs=3, accumulate_grad_batches=2)
    rule = momentum()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    for _ in range(3):
        meta_step(rule, optimizer, [begin(rule, "pool", lane) for lane in range(2)])
    torch.testing.assert_close(phi_of(learner.rule), phi_of(rule), rtol=1e-12, atol=0.0)
    assert learner.cost.gradient_evaluations == 6 * 4 * lmo.Unrolled(steps=2).gradient_evaluations + 4 * 3 * 2


def test_clipping_and_schedules_are_lightnings() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
    learner = learner_of(pool=4, optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=schedule, val_tasks=0)
    start = phi_of(learner.rule)
    moved = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            moved.append(phi_of(module.rule))

    loop = fit(learner, max_epochs=4, gradient_clip_val=0.01, callbacks=[Watch()])
    assert loop.trainer is not None
    assert loop.trainer.gradient_clip_val == 0.01
    lengths = [float((after - before).norm()) for before, after in zip([start, *moved], moved, strict=False)]
    assert lengths == pytest.approx([0.01, 0.01, 0.001, 0.001], rel=1e-3)


def test_validation_is_a_plain_unroll_of_held_out_problems() -> None:
    learner = learner_of(pool=4, val_steps=7)
    loop = fit(learner, max_epochs=2)
    rule = learner.rule
    end, losses = unroll(rule, begin(rule, "validation", 0, size=3), 7)
    value = float(end.task.val_loss(end.params, {}).mean())
    assert learner.history[-1]["val_loss"] == pytest.approx(value, rel=1e-12)
    assert learner.val_curve == pytest.approx([*losses.mean(1).tolist(), value], rel=1e-12)  # here the two losses agree
    assert [row["step"] for row in learner.history] == [0, 1, 2]
    trainer = loop.trainer
    assert trainer is not None
    (validated,) = trainer.validate(learner, verbose=False)  # in inference mode
    assert validated["val/loss"] == pytest.approx(value, rel=1e-6)
    (tested,) = trainer.test(learner, verbose=False)
    end, _ = unroll(rule, begin(rule, "test", 0, size=3), 7)
    assert tested["test/loss"] == pytest.approx(float(end.task.val_loss(end.params, {}).mean()), rel=1e-6)


def test_the_best_rule_is_kept() -> None:
    results = {}
    for keep in ("best", "last"):
        uphill = partial(torch.optim.Adam, lr=0.1, maximize=True)
        learner = learner_of(pool=4, optimizer=uphill, guard_factor=None)
        rule = lmo.MetaLoop(max_epochs=6, keep=keep, **QUIET).fit(learner)  # type: ignore[arg-type]  # a loop over literals
        results[keep] = float(unroll_loss(rule))
        values = [row["val_loss"] for row in learner.history]
        assert results[keep] == pytest.approx(min(values) if keep == "best" else values[-1], rel=1e-12)
    assert results["best"] < results["last"]


def unroll_loss(rule: lmo.Rule) -> Tensor:
    end, _ = unroll(rule, begin(rule, "validation", 0, size=3), 2)
    return end.task.val_loss(end.params, {}).mean()


def test_a_rule_trained_after_the_last_validation_counts() -> None:
    learner = learner_of(steps_per_epoch=100)
    before = phi_of(learner.rule)
    rule = lmo.MetaLoop(max_steps=5, **QUIET).fit(learner)
    assert learner.history[-1]["step"] == 5
    assert learner.history[-1]["val_loss"] < learner.history[0]["val_loss"]
    assert not torch.equal(phi_of(rule), before)


def test_without_validation_the_last_rule_is_returned() -> None:
    learner = learner_of(pool=4, val_tasks=0)
    rule = lmo.MetaLoop(max_epochs=3, **QUIET).fit(learner)
    twin = learner_of(pool=4)
    fit(twin, max_epochs=3)
    assert torch.equal(phi_of(rule), phi_of(twin.rule))


def test_logs(tmp_path: Path) -> None:
    learner = learner_of(pool=8, metagrad=lmo.Unrolled(steps=3))
    fit(learner, max_epochs=4, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = [row for row in rows if row["meta/loss"]]
    assert [int(row["step"]) for row in logged] == [3, 7]
    for name in ("meta/grad_norm", "rule/lr", "rule/momentum", "cost/seconds", "guard/restores"):
        assert all(math.isfinite(float(row[name])) for row in logged), name
    assert sum(bool(row["val/loss"]) for row in rows) == 4
    per_step = lmo.Unrolled(steps=3).gradient_evaluations * 4
    assert float(logged[-1]["cost/gradient_evaluations"]) == 8 * per_step + 4 * 3 * 3
    assert learner.cost.gradient_evaluations == 8 * per_step + 5 * 3 * 3
    steps = [row["step"] for row in learner.history]
    assert steps == [0, 2, 4, 6, 8]
    assert all({"val_loss", "rule/lr"} <= row.keys() for row in learner.history)
    assert all({"meta_loss", "grad_norm"} <= row.keys() for row in learner.history[1:])
    seconds = [row["cost/seconds"] for row in learner.history]
    assert seconds == sorted(seconds)
    assert learner.cost.seconds >= seconds[-1] > 0


def test_phi_is_projected_after_every_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = momentum()
    seen: list[Tensor] = []

    def project() -> None:
        seen.append(phi_of(rule))
        with torch.no_grad():
            rule.log_lr.clamp_(max=-4.0)

    monkeypatch.setattr(rule, "project_", project)
    fit(learner_of(rule, lr=1.0), max_steps=3, accumulate_grad_batches=2)
    assert len(seen) == 3
    assert all(float(phi[0]) > -4.0 for phi in seen)
    assert float(rule.log_lr.detach()) == -4.0


def test_bf16_mixed_trains_the_rule_in_full_precision() -> None:
    family = lmo.tasks.LeastSquares(dim=8, rows=8)
    curves = {}
    for precision in ("32-true", "bf16-mixed"):
        rule = lmo.rules.GradientDescent(lr=0.002)
        learner = lmo.MetaLearner(rule, family, lmo.Unrolled(steps=3), optimizer=partial(torch.optim.Adam, lr=0.1), tasks=8)
        fit(learner, max_steps=10, precision=precision)
        assert rule.log_lr.dtype == torch.float32
        curves[precision] = [row["val_loss"] for row in learner.history if "val_loss" in row]
        assert curves[precision][-1] < 0.9 * curves[precision][0]
    assert curves["bf16-mixed"] == pytest.approx(curves["32-true"], rel=0.05)
    assert curves["bf16-mixed"] != curves["32-true"]  # autocast was on


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="GradScaler"):
        lmo.MetaLoop(max_epochs=1, precision="16-mixed")
    with pytest.raises(ValueError, match="bf16-mixed"):
        fit(learner_of(), max_epochs=1, plugins=[MixedPrecision("16-mixed", device="cpu")])


class Sharding(SingleDeviceStrategy):
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy='ddp'"):
        fit(learner_of(), max_epochs=1, strategy=Sharding(torch.device("cpu")), accelerator="auto")
    with pytest.raises(ValueError, match="first-order optimizer"):
        fit(learner_of(optimizer=torch.optim.LBFGS), max_epochs=1)
    with pytest.raises(ValueError, match="10 problems do not split into minibatches of 4"):
        learner_of(pool=10)
    with pytest.raises(ValueError, match="3 steps do not split into unrolls of 2"):
        learner_of(horizon=3)
    with pytest.raises(ValueError, match="val_tasks at least 0"):
        learner_of(val_tasks=-1)
    with pytest.raises(ValueError, match="guard_factor must be larger than 1"):
        learner_of(guard_factor=0.5)
    with pytest.raises(ValueError, match="nothing to meta-learn"):
        learner_of(rule=NoParameters())
    with pytest.raises(TypeError, match="no argument max_epoch"):
        lmo.MetaLoop(max_epochs=1, max_epoch=2)
    with pytest.raises(ValueError, match="say when meta-training ends"):
        lmo.MetaLoop()
    with pytest.raises(ValueError, match="keep must be"):
        lmo.MetaLoop(max_epochs=1, keep="worst")  # type: ignore[arg-type]  # that is the test


class NoParameters(lmo.Rule):
    @property
    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, grads: Any, state: Any, params: Any, loss: Tensor | None = None) -> tuple[Any, Any]:
        return {name: -grad for name, grad in grads.items()}, state


def test_a_plain_trainer_takes_the_learner() -> None:
    learner = learner_of(pool=4)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(learner)
    twin = learner_of(pool=4)
    fit(twin, max_epochs=3)
    assert torch.equal(phi_of(learner.rule), phi_of(twin.rule))
    assert len(learner.history) == len(twin.history) == 4
