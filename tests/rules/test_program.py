"""The solver against closed forms, exact constrained solutions and optimality conditions.

Tolerances of the solver (absolute for iterates, relative to the largest entry for gradients) are stated in TOLERANCE; numbers
here are of order 1.
"""

import copy
import json
import pickle

import pytest
import torch

from lightning_metaopt.episode import start
from lightning_metaopt.metagrads import Unrolled
from lightning_metaopt.objectives import FinalLoss
from lightning_metaopt.rules import (
    Box,
    ConvexProgram,
    DCOGeneralDescent,
    DCOGradient,
    DCOMomentum,
    L1Ball,
    NonNegative,
    ProximalL1,
    Simplex,
    TrustRegion,
)
from lightning_metaopt.tasks import LeastSquares

pytest.importorskip("cvxpy")

# (solver, mode): (iterate, gradients)
TOLERANCE = {
    ("SCS", "lsqr"): (1e-8, 1e-5),
    ("SCS", "dense"): (1e-8, 1e-7),
    ("Clarabel", "lsqr"): (1e-4, 1e-3),
}
CONSTRAINTS = [None, Box(-0.3, 0.5), NonNegative(), Simplex(), L1Ball(1.0), TrustRegion(0.5), ProximalL1(0.3)]


def shapes_of(n):
    return {"a": (n - 2,), "b": (1, 2)}


def trees(n, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {name: torch.randn(size, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes_of(n).items()}

    return draw(), draw()


def pairs(n, constraint, **options):
    shapes = shapes_of(n)
    return {
        "gradient": (DCOGradient(shapes, constraint=constraint), ConvexProgram.gradient(shapes, constraint=constraint, **options)),
        "momentum": (DCOMomentum(shapes, constraint=constraint), ConvexProgram.momentum(shapes, constraint=constraint, **options)),
        "general": (
            DCOGeneralDescent(shapes, constraint=constraint),
            ConvexProgram.general_descent(shapes, constraint=constraint, **options),
        ),
    }


def randomise(closed, program, n, seed=0):
    """The same random meta-parameters in both, as leaves: by name for the closed form, flat for the program."""
    generator = torch.Generator().manual_seed(seed)
    closed.double()
    program.double()
    values = {}
    for name, value in program.named_parameters():
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.6
        if name == "phi.matrix":
            drawn = torch.eye(n).double() + 0.2 * (drawn - 1)
        if name == "phi.averaging":
            drawn = drawn / 2
        values[name] = drawn
        with torch.no_grad():
            value.copy_(drawn)
    with torch.no_grad():
        for name, value in closed.named_parameters():
            if name == "matrix":
                value.copy_(values["phi.matrix"])
            else:
                slot, part = name.split(".")
                flat = values[f"phi.{slot}"]
                value.copy_(flat[: n - 2] if part == "a" else flat[n - 2 :].view(1, 2))


def flat_gradients(rule, value, extra):
    names, parameters = zip(*rule.named_parameters(), strict=True)
    found = torch.autograd.grad(value, [*parameters, *extra], allow_unused=True, materialize_grads=True)
    own = dict(zip(names, found[: len(names)], strict=True))
    if not any(name.startswith("phi.") for name in own):
        slots = sorted({name.split(".")[0] for name in own})
        own = {f"phi.{s}": torch.cat([g.flatten() for n, g in own.items() if n.split(".")[0] == s]) for s in slots}
    return [own[name].flatten() for name in sorted(own)] + [g.flatten() for g in found[len(names) :]]


def two_steps(rule, grads, params):
    """Two steps with the same gradient tree times 1 and -0.5, so that the state matters; a scalar of all coordinates."""
    state = rule.init(params)
    iterates = []
    for factor in (1.0, -0.5):
        updates, state = rule({name: factor * g for name, g in grads.items()}, state, params)
        params = {name: params[name] + updates[name] for name in params}
        iterates.append(torch.cat([leaf.flatten(1) for leaf in params.values()], 1))
    weights = torch.linspace(0.5, 1.5, iterates[0].numel(), dtype=torch.float64).view_as(iterates[0])
    return iterates, (weights * sum(iterates).sin()).sum()


def agree(closed, program, n, tolerance):
    (at, slope) = tolerance
    results = []
    for rule in (closed, program):
        grads, params = trees(n)
        inputs = [leaf.requires_grad_() for tree in (grads, params) for leaf in tree.values()]
        iterates, value = two_steps(rule, grads, params)
        results.append((iterates, flat_gradients(rule, value, inputs)))
    (exact, exact_grads), (solved, solved_grads) = results
    for one, other in zip(exact, solved, strict=True):
        assert (one - other).abs().max() <= at
    for one, other in zip(exact_grads, solved_grads, strict=True):
        assert (one - other).abs().max() <= slope * one.abs().max().clamp(min=1)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("kind", ["gradient", "momentum", "general"])
def test_solver_agrees_with_exact_solutions(kind, constraint):
    closed, program = pairs(5, constraint)[kind]
    randomise(closed, program, 5)
    agree(closed, program, 5, TOLERANCE["SCS", "lsqr"])


@pytest.mark.parametrize(("solver", "mode"), TOLERANCE)
@pytest.mark.parametrize("constraint", [None, Simplex(), NonNegative()], ids=lambda c: type(c).__name__)
def test_solvers_in_twenty_dimensions(solver, mode, constraint):
    closed, program = pairs(20, constraint, solver=solver, mode=mode)["momentum"]
    randomise(closed, program, 20)
    agree(closed, program, 20, TOLERANCE[solver, mode])


def test_polytope_against_its_optimality_conditions_and_finite_differences():
    n, shapes = 4, {"theta": (4,)}
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(3, n, generator=generator, dtype=torch.float64)
    bound = torch.full((3,), 0.2).double()
    rule = ConvexProgram.polytope(shapes, 1.2, (matrix, bound), (torch.ones(1, n), [0.5])).double()
    with torch.no_grad():
        rule.phi["factor"].add_(0.3 * torch.randn(n, n, generator=generator))
    gradient = torch.randn(2, n, generator=generator, dtype=torch.float64)
    params = {"theta": torch.zeros(2, n).double()}

    def theta(factor, g):
        with torch.no_grad():
            rule.phi["factor"].copy_(factor)
        return rule({"theta": g}, {}, params)[0]["theta"]

    factor = rule.phi["factor"].detach().clone()
    solution = theta(factor, gradient)
    assert torch.allclose(solution.sum(1), torch.full((2,), 0.5).double(), atol=1e-8)
    assert (solution @ matrix.mT <= bound + 1e-8).all()
    # Stationary: the gradient of the objective is a combination of the constraints' normals, inequalities with a sign.
    slack = bound - solution.detach() @ matrix.mT
    for b in range(2):
        active = slack[b] < 1e-7
        normals = torch.cat([matrix[active], torch.ones(1, n).double()])
        force = -(gradient[b] + factor.mT @ factor @ solution[b].detach())
        multipliers = torch.linalg.lstsq(normals.mT, force.unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(normals.mT @ multipliers, force, atol=1e-6)
        assert (multipliers[: int(active.sum())] >= -1e-6).all()
    assert (slack.min(1).values < 1e-7).any()  # an inequality is active
    found = torch.autograd.grad((solution * gradient).sum(), rule.phi["factor"])[0]
    direction = torch.randn(n, n, generator=generator, dtype=torch.float64)
    ahead, behind = (theta(factor + sign * 1e-5 * direction, gradient).detach() for sign in (1, -1))
    assert (found * direction).sum() == pytest.approx(float(((ahead - behind) * gradient).sum() / 2e-5), rel=1e-4)


@pytest.mark.parametrize("kind", ["gradient", "momentum", "general_descent", "polytope"])
def test_config_deepcopy_and_pickle(kind):
    shapes = shapes_of(4)
    options = {"inequality": (torch.eye(4), torch.ones(4))} if kind == "polytope" else {"constraint": Box(-1, 1)}
    rule = getattr(ConvexProgram, kind)(shapes, 1.5, **options)
    rebuilt = ConvexProgram(**json.loads(json.dumps(rule.config)))
    rebuilt.load_state_dict(rule.state_dict())
    grads, params = trees(4)
    expected = rule(grads, rule.init(params), params)[0]
    for other in (rebuilt, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        found = other(grads, other.init(params), params)[0]
        assert all(torch.allclose(found[name], expected[name], atol=1e-9) for name in expected)


def test_meta_gradient_through_several_steps_is_that_of_the_closed_form():
    family = LeastSquares(dim=4, rows=8, mean=True, double=True)
    closed, program = (make(family.shapes, 1.6).double() for make in (DCOGradient, ConvexProgram.gradient))
    task = family.draw(seed=0, size=3)
    one, other = (Unrolled(steps=3)(rule, start(rule, task), FinalLoss()) for rule in (closed, program))
    assert torch.allclose(one.loss, other.loss, atol=1e-9)
    assert torch.allclose(one.grads["scale.theta"], other.grads["phi.scale"], rtol=1e-5)
