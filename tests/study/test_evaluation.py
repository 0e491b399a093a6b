"""Torch optimizers on task families: the same problems, starting points and steps as rules."""

from functools import partial

import pytest
import torch
import yaml
from tiny_recipe import carry_out

import lightning_metaopt as lmo
from lightning_metaopt import rules, tasks
from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.evaluation import Candidate, TaskEvaluation

FAMILY = tasks.LeastSquares(dim=4, rows=6, start_std=1.0, double=True)
NETS = tasks.SystemIdentification()


def minibatches():
    """Another batch at every step, and a buffer for each problem."""
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    return tasks.Supervised(net, inputs, inputs.sin().sum(1, keepdim=True), loss="mse", batch_size=8)


FAMILIES = {"float64": FAMILY, "networks": NETS, "minibatches": minibatches()}

PAIRS = {
    "SGD": (partial(torch.optim.SGD, lr=0.01), rules.GradientDescent(0.01)),
    "Nesterov": (partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True), rules.HeavyBall(0.01, 0.9, nesterov=True)),
    "Adam": (partial(torch.optim.Adam, lr=0.1), rules.Adam(0.1)),
}


def curve(family, candidate, rule=None, steps=12):
    return TaskEvaluation(steps=steps, tasks=3).run(family, candidate, rule, 5, "test").curves["validation loss"]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pair", PAIRS)
def test_twins(kind, pair):
    family, (make, rule) = FAMILIES[kind], PAIRS[pair]
    found = curve(family, Candidate(optimizer=make))
    expected = curve(family, Candidate(rule=lambda: rule), rule.float() if kind == "networks" else rule.double())
    assert [step for step, _ in found] == list(range(13))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-3 if kind == "networks" else 1e-6)
    assert found[-1][1] < found[0][1]


def test_optimizers_that_ask_for_the_loss_and_schedules():
    class Halving(torch.optim.SGD):
        def step(self, closure):
            losses.append(closure())
            return super().step(closure)

    losses = []
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    found = curve(FAMILY, Candidate(optimizer=partial(Halving, lr=0.01), scheduler=schedule), steps=3)
    assert sum(losses[:3]) / 3 == pytest.approx(found[0][1])  # one problem after another
    theta = FAMILY.draw(0, 1).data["start"]
    assert theta.shape == (1, 4)
    by_hand = curve(FAMILY, Candidate(optimizer=partial(torch.optim.SGD, lr=0.01)), steps=1)
    assert found[1] == by_hand[1]  # the first step has the initial rate
    constant = curve(FAMILY, Candidate(optimizer=partial(torch.optim.SGD, lr=0.01)), steps=3)
    assert found[3][1] != constant[3][1]


def test_every_problem_has_an_optimizer_of_its_own():
    # AdaGrad's sums would be shared otherwise: three problems at once are three problems one by one.
    make = partial(torch.optim.Adagrad, lr=0.5)
    together = curve(FAMILY, Candidate(optimizer=make))
    task = FAMILY.draw(lmo.study.evaluation.stream("test", 5), 3)
    alone = []
    for b in range(3):
        theta = torch.nn.Parameter(task.data["start"][b].clone())
        optimizer = make([theta])
        for _ in range(12):
            loss = (task.data["design"][b] @ theta - task.data["target"][b]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        alone.append(float((task.data["design"][b] @ theta.detach() - task.data["target"][b]).square().sum()))
    assert together[-1][1] == pytest.approx(sum(alone) / 3, rel=1e-12)


def test_what_does_not_belong_to_tasks():
    evaluation = TaskEvaluation(steps=1, tasks=1)
    with pytest.raises(RecipeError, match="no Trainer"):
        evaluation.check(Candidate(optimizer=torch.optim.SGD, callbacks=lambda: []))
    with pytest.raises(RecipeError, match="its own step sizes"):
        evaluation.check(Candidate(rule=rules.Adam, scheduler=torch.optim.lr_scheduler.ConstantLR))
    with pytest.raises(RecipeError, match="'family'"):
        evaluation.run(None, Candidate(optimizer=torch.optim.SGD), None, 0, "test")


RECIPE = """
title: Quadratics
family: {class_path: ConvexQuadratic, init_args: {double: true}}
evaluation: {class_path: TaskEvaluation, init_args: {steps: 5, tasks: 2, objective: mean}}
seeds: [0]
trials: 2
methods:
  descent: {optimizer: {class_path: torch.optim.SGD}, search: {optimizer.init_args.lr: [0.001, 0.004]}}
  rule: {rule: {class_path: GradientDescent}, search: {rule.init_args.lr: [0.001, 0.004]}}
  Meta-Momentum:
    optimizer:
      class_path: OptimisticFTRL
      init_args:
        lr: 1.0e-8
        weights: 0
        averaging: false
        hint: none
        rule: {class_path: ElementwiseScale, init_args: {shapes: {param0: [2]}, form: raw}}
    search: {optimizer.init_args.rule.init_args.lr: [0.001, 0.004]}
"""


def test_in_a_recipe_with_a_rule_inside_an_optimizer(tmp_path):
    found = carry_out(yaml.safe_load(RECIPE), tmp_path)[""]
    ends = {name: method.runs[0].scores["loss@5"] for name, method in found.items()}
    assert ends["descent"] == pytest.approx(ends["rule"], rel=1e-5)
    assert ends["Meta-Momentum"] == pytest.approx(ends["descent"], rel=0.05)
    assert ends["Meta-Momentum"] != ends["descent"]
    assert {method.chosen[next(iter(method.chosen))] for method in found.values()} == {0.004}
