"""Differences of tasks against closed forms, and the bounds against what an optimizer does."""

import math

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.analysis import Lipschitz, TaskShift, optimizer_gradient, shift_bounds, task_shift
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.task import Task


class Slopes(Task):
    """a |x|^2 / 2 + c x_1, from (1, 1)."""

    def init(self, generator):
        return {"x": torch.ones(self.size, 2, dtype=torch.float64)}, {}

    def loss(self, params, buffers, batch):
        return 0.5 * batch["a"] * params["x"].square().sum(1) + batch["c"] * params["x"][:, 0]


def slopes(a, c):
    return Slopes({"a": torch.tensor(a, dtype=torch.float64), "c": torch.tensor(c, dtype=torch.float64)})


def test_differences_are_those_of_the_mean_losses():
    first, second = slopes([1.0, 3.0], [0.0, 2.0]), slopes([5.0], [1.0])
    points = {"x": torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)}
    found = task_shift(first, second, points)
    # Mean curvatures 2 and 5, mean slopes 1 and 1.
    assert found.gradient == pytest.approx(3 * math.sqrt(5))
    assert found.hessian == pytest.approx(3.0)
    assert task_shift(first, second, {"x": points["x"][:1]}).gradient == pytest.approx(0.0, abs=1e-12)


def test_the_optimizers_gradient_is_flat_and_that_of_its_first_window():
    rule = lmo.rules.HeavyBall(0.1, 0.5).double()
    task = slopes([1.0], [0.5])
    found = optimizer_gradient(rule, task, lmo.Unrolled(3), lmo.objectives.FinalLoss())
    estimate = lmo.Unrolled(3)(rule, start(rule, task), lmo.objectives.FinalLoss())
    assert found.tolist() == [float(estimate.grads[name]) for name, _ in rule.named_parameters()]


def test_iterates_part_as_lemma_8_says_where_nothing_contracts():
    # Downwards from a summit every difference grows by Q = 1 + lr L at each step: the bound is met with equality.
    rule = lmo.rules.GradientDescent(0.1).double()
    rate = float(rule.log_lr.detach().exp())
    first, second = slopes([-2.0], [0.0]), slopes([-2.0], [0.7])
    one, other = (unroll(rule, start(rule, task), 6)[0].params["x"] for task in (first, second))
    constants = Lipschitz(0.0, 2.0, 0.0, rate, 0.0, 0.0, 0.0)
    bound, _ = shift_bounds(constants, TaskShift(0.7, 0.0), 6)
    assert float((one - other).norm()) == pytest.approx(bound, rel=1e-12)
    assert bound == pytest.approx(0.7 * (constants.growth**6 - 1) / 2)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_optimizer_gradients_part_no_further_than_proposition_1(steps, sign):
    rule = lmo.rules.GradientDescent(0.1).double()
    rate = float(rule.log_lr.detach().exp())
    first, second = slopes([sign * 2.0], [0.0]), slopes([sign * 2.3], [0.4])
    ends = [unroll(rule, start(rule, task), steps)[0].params["x"] for task in (first, second)]
    points = {"x": torch.cat([torch.ones(1, 2, dtype=torch.float64), *ends])}
    reach = float(points["x"].abs().max()) * math.sqrt(2)
    steepest = 2.3 * reach + 0.4
    shift = task_shift(first, second, {"x": reach * torch.ones(1, 2, dtype=torch.float64)})
    shift = TaskShift(max(shift.gradient, 0.3 * reach + 0.4), shift.hessian)
    # m = -exp(phi) z: its derivatives are -exp(phi) and -exp(phi) z.
    constants = Lipschitz(steepest, 2.3, 0.0, rate, rate * steepest, 0.0, rate)
    apart, bound = shift_bounds(constants, shift, steps)
    assert float((ends[0] - ends[1]).norm()) <= apart
    grads = [optimizer_gradient(rule, task, lmo.Unrolled(steps), lmo.objectives.FinalLoss()) for task in (first, second)]
    difference = float((grads[0] - grads[1]).norm())
    assert 0 < difference <= bound


def test_the_recursion_has_the_closed_form_with_T_times_Q_to_the_T_minus_1():
    step, gradient, along, hessian, loss, steps = 0.3, 2.0, 1.7, 0.6, 5.0, 7
    _, bound = shift_bounds(Lipschitz(loss, gradient, 0.0, step, along, 0.0, 0.0), TaskShift(0.0, hessian), steps)
    q = 1 + step * gradient
    assert bound == pytest.approx(loss * step * hessian * along * (steps * q ** (steps - 1) - (q**steps - 1) / (q - 1)) / (q - 1))
    # The other terms one at a time, after two steps, where they are written out easily.
    for name, value in {"hessian": 0.9, "slope": 0.8, "slope_phi": 0.7}.items():
        given = {"loss": loss, "gradient": gradient, "step": step, "step_phi": along}
        given |= {"hessian": 0.0, "slope": 0.0, "slope_phi": 0.0}
        shift = TaskShift(0.5, 0.0)
        without = shift_bounds(Lipschitz(**given), shift, 2)[1]
        added = shift_bounds(Lipschitz(**given | {name: value}), shift, 2)[1] - without
        apart = step * 0.5  # after one step
        met = gradient * apart + 0.5
        differ = {"hessian": step * value * apart * along, "slope": gradient * value * met * along}
        differ["slope_phi"] = q * value * 0.5 + value * met
        assert added == pytest.approx(loss * differ[name])
