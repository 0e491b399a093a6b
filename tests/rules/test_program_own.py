"""Programs that the user states, from the first step to the rule file, and the mistakes in them that are named."""

import pytest
import torch

from lightning_metaopt.rules import ConvexProgram
from lightning_metaopt.storage import RuleFileError, load_rule, save_rule

cp = pytest.importorskip("cvxpy")


def own_program(n=3):
    """A program in the iterate itself, with a computed parameter, an equality, a state and a domain."""
    theta, gradient = cp.Variable(n), cp.Parameter(n, name="velocity")
    scale, target = cp.Parameter(n, name="scale", pos=True), cp.Parameter(n, name="target")
    objective = gradient @ theta + cp.sum_squares(cp.multiply(scale, theta) - target) / 2
    return {
        "problem": cp.Problem(cp.Minimize(objective), [cp.sum(theta) == 1]),
        "shapes": {"w": (n,)},
        "variable": theta,
        "phi": {"scale": torch.full((n,), 2.0), "decay": torch.tensor(0.5)},
        "inputs": {"target": lambda x: x.phi["scale"] * x.current},
        "state": {"velocity": lambda x: x.phi["decay"] * x.state["velocity"] + x.gradient},
    }


def test_own_program():
    rule = ConvexProgram(**own_program())
    params, grads = {"w": torch.zeros(2, 3)}, {"w": torch.tensor([[4.0, 0.0, -4.0], [0.0, 0.0, 0.0]])}
    state = rule.init(params)
    updates, state = rule(grads, state, params)
    assert updates["w"].dtype == torch.float32
    expected = -grads["w"] / 4
    expected = expected + (1 - expected.sum(1, keepdim=True)) / 3
    assert torch.allclose(updates["w"], expected, atol=1e-6)
    assert torch.equal(state["velocity"]["w"], grads["w"])
    updates, state = rule(grads, state, params)
    assert torch.allclose(state["velocity"]["w"], 1.5 * grads["w"])
    torch.autograd.grad(updates["w"].square().sum(), list(rule.parameters()))
    with torch.no_grad():
        assert torch.allclose(rule(grads, rule.init(params), params)[0]["w"], expected, atol=1e-6)
        rule.phi["scale"].fill_(-1.0)
    rule.project_()
    assert (rule.phi["scale"] > 0).all()


def test_own_program_from_a_rule_file(tmp_path):
    rule = ConvexProgram(**own_program())
    with torch.no_grad():
        rule.phi["decay"].fill_(0.25)
    save_rule(rule, tmp_path / "rule.safetensors")
    with pytest.raises(RuleFileError, match=r"problem=\.\.\., variable="):
        load_rule(tmp_path / "rule.safetensors")
    again = load_rule(tmp_path / "rule.safetensors", **own_program())
    params = {"w": torch.ones(2, 3)}
    one, other = (r(params, r.init(params), params)[0]["w"] for r in (rule, again))
    assert torch.equal(one, other)
    assert again.phi["decay"] == 0.25


def test_domains_from_the_attributes_of_parameters():
    theta, metric, shift = cp.Variable(2), cp.Parameter((2, 2), name="metric", PSD=True), cp.Parameter(2, name="shift", nonpos=True)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(theta - shift) + cp.Parameter(2, name="gradient") @ theta + cp.sum(metric @ theta))
    )
    rule = ConvexProgram(
        problem, {"w": (2,)}, theta, phi={"metric": torch.tensor([[1.0, 4.0], [0.0, -1.0]]), "shift": torch.ones(2)}
    )
    rule.project_()
    assert torch.equal(rule.phi["shift"], torch.zeros(2))
    assert torch.linalg.eigvalsh(rule.phi["metric"]).min() >= -1e-6
    assert torch.allclose(rule.phi["metric"], rule.phi["metric"].mT)


def not_dpp():
    theta, scale, current = cp.Variable(2), cp.Parameter(2, name="scale"), cp.Parameter(2, name="current")
    gradient = cp.Parameter(2, name="gradient")
    problem = cp.Problem(cp.Minimize(gradient @ theta + cp.sum_squares(cp.multiply(scale, theta - current)) / 2))
    return ConvexProgram(problem, {"w": (2,)}, theta, phi={"scale": torch.ones(2)})


def without(name, **changes):
    arguments = own_program()
    arguments[name] = changes.get("value")
    return lambda: ConvexProgram(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_dpp, r"the objective is not DPP.*returns='step'.*inputs="),
        (without("phi", value={}), "nothing fills the program's parameter 'scale'"),
        (
            without("phi", value={"scale": torch.ones(2), "decay": torch.tensor(0.5)}),
            r"'scale' has shape \(3,\), but is filled with",
        ),
        (without("variable", value=cp.Variable(2)), r"shape \(3,\)"),
        (without("problem"), "load_state_dict"),
        (lambda: ConvexProgram.gradient({"w": (2,)}, solver="ECOS"), "solver must be one of"),
        (lambda: ConvexProgram.gradient({"w": (2,)}, mode="lpgd"), "mode must be one of"),
        (lambda: ConvexProgram({"class": "newton"}, {"w": (2,)}), "unknown program 'newton'"),
        (lambda: ConvexProgram.polytope({"w": (2,)}), "needs inequality"),
        (lambda: ConvexProgram.polytope({"w": (2,)}, inequality=(torch.eye(3), torch.ones(3))), r"must be a matrix \(m, 2\)"),
    ],
)
def test_bad_programs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_computed_parameter_of_the_wrong_shape():
    arguments = own_program()
    arguments["inputs"] = {"target": lambda x: x.current[:, :2]}
    rule = ConvexProgram(**arguments)
    params = {"w": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"'target' has shape \(3,\), but was filled with \(2, 2\)"):
        rule(params, rule.init(params), params)
