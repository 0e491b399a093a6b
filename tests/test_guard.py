"""The divergence guard: what it restores, halves and forgets."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode
from lightning_metaopt.guard import Best, halve_learning_rates, too_large
from lightning_metaopt.metagrads import Estimate, MetaGradient
from lightning_metaopt.objectives import Objective

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, double=True)


class Scripted(MetaGradient):
    """Gradients from a list, steps of nothing; notes at which inner step it was called and the meta learning rate."""

    def __init__(self, script: list[float]) -> None:
        self.script = script
        self.seen: list[int] = []

    @property
    def exact_of(self) -> str:
        return "nothing"

    @property
    def inner_steps(self) -> int:
        return 1

    @property
    def gradient_evaluations(self) -> int:
        return 1

    def __call__(self, rule: lmo.Rule, episode: Episode, objective: Objective) -> Estimate:
        grads = {name: torch.full_like(value, self.script[len(self.seen)]) for name, value in rule.named_parameters()}
        self.seen.append(episode.step)
        end, losses = lmo.episode.unroll(rule, episode, 1)
        return Estimate(losses.mean(), grads, end)


def run(script: list[float], optimizer: Any, val_tasks: int = 0, **options: Any) -> tuple[lmo.MetaLearner, list[float], Scripted]:
    metagrad = Scripted(script)
    rule = lmo.rules.GradientDescent(lr=0.01).double()
    learner = lmo.MetaLearner(
        rule, FAMILY, metagrad, optimizer=optimizer, tasks=2, horizon=100, steps_per_epoch=1, val_tasks=val_tasks, **options
    )
    loop = lmo.MetaLoop(keep="last", max_epochs=len(script), accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1)
    loop.fit(learner)
    return learner, [row["rule/lr"] for row in learner.history], metagrad


def test_a_gradient_that_is_not_finite_restores_the_last_good_rule() -> None:
    with pytest.warns(UserWarning, match="meta-gradient is not finite: restored the rule of meta-step 2") as caught:
        learner, rates, metagrad = run([1.0, 1.0, math.nan, 1.0, math.inf, 1.0], partial(torch.optim.SGD, lr=0.1))
    assert len([warning for warning in caught if "restored" in str(warning.message)]) == 1
    logs = [math.log(rate / 0.01) for rate in rates]
    assert logs == pytest.approx([-0.1, -0.2, -0.2, -0.25, -0.25, -0.275], rel=1e-5)  # halved twice, no step on a bad one
    assert metagrad.seen == [0, 1, 2, 0, 1, 0]  # episodes start afresh
    assert [row["guard/restores"] for row in learner.history] == [0, 0, 1, 1, 2, 2]


def test_moments_are_forgotten_and_schedules_halved() -> None:
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    with pytest.warns(UserWarning, match="restored"):
        learner, rates, _ = run([1.0, math.nan, -1.0], partial(torch.optim.SGD, lr=0.1, momentum=0.9), scheduler=schedule)
    logs = [math.log(rate / 0.01) for rate in rates]
    assert logs == pytest.approx([-0.1, -0.1, -0.05], rel=1e-5)  # with the old moment: -0.1 - 0.05 * (0.9 - 1)
    (scheduler,) = [config.scheduler for config in learner.trainer.lr_scheduler_configs]
    assert scheduler.base_lrs == [0.05]
    assert scheduler.get_last_lr() == [0.05]


def test_a_validation_loss_that_explodes_restores_the_best_rule() -> None:
    # Step sizes of 0.01, 0.01 e, 0.01 e^9: the last diverges.
    with pytest.warns(UserWarning, match=r"validation loss is .* restored the rule of meta-step 1"):
        learner, _, metagrad = run([-1.0, -8.0, -1.0], partial(torch.optim.SGD, lr=1.0), val_tasks=2, val_steps=1)
    values = [row["val_loss"] for row in learner.history]
    assert values[1] < values[0]
    assert values[2] > 100 * values[1]
    phi = float(learner.rule.get_parameter("log_lr").detach())
    assert phi == pytest.approx(math.log(0.01) + 1.0 + 0.5, rel=1e-5)  # from the best, with half the rate
    assert metagrad.seen == [0, 1, 0]
    assert learner.best.step == int(min(learner.history, key=lambda row: row["val_loss"])["step"])


def test_no_guard_against_finite_values_if_not_wanted() -> None:
    # Any warning would be an error here.
    learner, _, _ = run([-1.0, -8.0], partial(torch.optim.SGD, lr=1.0), val_tasks=2, val_steps=1, guard_factor=None)
    assert learner.history[-1]["val_loss"] > 100 * learner.history[0]["val_loss"]


def test_a_rule_that_diverges_by_itself_ends_with_the_remedy() -> None:
    with pytest.raises(FloatingPointError, match="Start from smaller inner steps"), pytest.warns(UserWarning, match="restored"):
        run([math.nan] * 30, partial(torch.optim.SGD, lr=0.1))


def test_rates_in_groups_and_nested_schedules() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": torch.tensor(0.2)}])
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimizer, total_iters=4), schedulers.ExponentialLR(optimizer, 0.9)]
    nested = schedulers.SequentialLR(optimizer, parts, milestones=[4])
    rule = lmo.rules.GradientDescent()
    best = Best()
    best.offer(rule, 1.0, 0)
    base = list(parts[0].base_lrs)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match="because"):
        best.restore_(rule, [optimizer], [nested], "because")
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in rates])
    assert [float(rate) for rate in parts[0].base_lrs] == pytest.approx([float(rate) / 2 for rate in base])


def test_a_one_cycle_schedule_stays_halved() -> None:
    def rates(halve: bool) -> list[Tensor | float]:
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
        seen: list[Tensor | float] = []
        for index in range(8):
            optimizer.step()
            cycle.step()
            if halve and index == 2:
                halve_learning_rates(optimizer)
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    assert rates(True)[2:] == pytest.approx([rate / 2 for rate in rates(False)[2:]])


def test_what_is_too_large() -> None:
    assert too_large(3.0, best=1.0, factor=2.0)
    assert not too_large(1.9, best=1.0, factor=2.0)
    assert too_large(math.inf, best=1.0, factor=math.inf)
    assert not too_large(1e9, best=1.0, factor=math.inf)
    assert not too_large(1.0, best=math.inf, factor=2.0)
    assert too_large(0.5, best=-1.0, factor=2.0)  # a negative best: as far above it
    assert not too_large(-0.5, best=-1.0, factor=2.0)
