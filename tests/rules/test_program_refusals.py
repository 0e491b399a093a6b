"""What the solver must refuse: second derivatives, and problems without a solution or with an inaccurate one."""

import pytest
import torch

from lightning_metaopt.rules import ConvexProgram, Simplex

cp = pytest.importorskip("cvxpy")


def test_second_order_forward_mode_and_transforms_are_refused():
    rule = ConvexProgram.gradient({"w": (3,)})
    params, grads = {"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)}
    updates, _ = rule(grads, {}, params)
    with pytest.raises(RuntimeError, match=r"second derivative.*DCOGradient"):
        torch.autograd.grad(updates["w"].square().sum(), rule.phi["scale"], create_graph=True)
    value = updates["w"].square().sum()  # the graph is still good for a first derivative, and for another
    one, again = (torch.autograd.grad(value, rule.phi["scale"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, again)
    assert one.abs().min() > 0
    for enabled in (True, False):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(enabled):
            dual = {"w": torch.autograd.forward_ad.make_dual(grads["w"], torch.ones(2, 3))}
            with pytest.raises(RuntimeError, match="first derivatives in reverse mode only"):
                rule(dual, {}, params)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda g: rule({"w": g}, {}, params)[0]["w"])(torch.ones(2, 2, 3))
    with pytest.raises(RuntimeError, match="reverse mode only"):
        torch.func.jvp(lambda g: rule({"w": g}, {}, params)[0]["w"], (grads["w"],), (grads["w"],))


def box_between(solver):
    step, low = cp.Variable(2), cp.Parameter(2, name="low")
    objective = cp.Parameter(2, name="gradient") @ step + cp.sum_squares(step)
    problem = cp.Problem(cp.Minimize(objective), [step >= low, cp.sum(step) <= 1])
    inputs = {"low": lambda x: x.gradient}  # infeasible where the gradient sums to more than 1
    return ConvexProgram(problem, {"w": (2,)}, step, inputs=inputs, returns="step", solver=solver)


@pytest.mark.parametrize("solver", ["SCS", "Clarabel"])
@pytest.mark.parametrize("differentiable", [True, False])
def test_an_infeasible_problem_is_named(solver, differentiable):
    rule = box_between(solver)
    params = {"w": torch.zeros(3, 2)}
    grads = {"w": torch.tensor([[0.1, 0.2], [0.4, -0.3], [2.0, 3.0]], requires_grad=differentiable)}
    with pytest.raises(RuntimeError, match=r"problem 2 of the batch of 3.*infeasible.*contradict"):
        rule(grads, {}, params)


@pytest.mark.parametrize("solver", ["SCS", "Clarabel"])
@pytest.mark.parametrize("bounded", [True, False])
def test_an_unbounded_problem_is_named(solver, bounded):
    step = cp.Variable(2)
    constraints = [cp.sum(step) <= 5] + ([step >= -10] if bounded else [])
    problem = cp.Problem(cp.Minimize(cp.Parameter(2, name="gradient") @ step), constraints)
    rule = ConvexProgram(problem, {"w": (2,)}, step, returns="step", solver=solver)
    grads, params = {"w": torch.tensor([[-1.0, -1.0], [1.0, 2.0]])}, {"w": torch.zeros(2, 2)}
    if bounded:
        assert torch.allclose(rule(grads, {}, params)[0]["w"][1], torch.tensor([-10.0, -10.0]), atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match=r"problem 1 of the batch of 2.*unbounded"):
            rule(grads, {}, params)


def test_an_inaccurate_solution_and_a_gradient_that_is_not_finite_are_named():
    rule = ConvexProgram.gradient({"w": (3,)}, constraint=Simplex(), solver_options={"max_iters": 2})
    params = {"w": torch.full((2, 3), 1 / 3)}
    with pytest.raises(RuntimeError, match=r"problem 0 of the batch of 2.*max_iters"):
        rule({"w": torch.randn(2, 3)}, {}, params)
    rule = ConvexProgram.gradient({"w": (3,)})
    with pytest.raises(RuntimeError, match="'gradient' of problem 1 of the batch is not finite"):
        rule({"w": torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 0.0]])}, {}, params)


def test_the_callers_problem_keeps_its_values():
    rule = box_between("Clarabel")
    low = next(p for p in rule.solver.problem.parameters() if p.name() == "low")
    low.value = [7.0, 8.0]
    with torch.no_grad():
        rule({"w": torch.tensor([[0.1, 0.2]])}, {}, {"w": torch.zeros(1, 2)})
    assert low.value.tolist() == [7.0, 8.0]
