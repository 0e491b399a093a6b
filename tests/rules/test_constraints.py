"""Exact constrained solutions against cvxpy, finite differences and slow, plain twins."""

import itertools
import json

import pytest
import torch

from lightning_metaopt.rules.constraints import (
    Box,
    Constraint,
    L1Ball,
    NonNegative,
    ProximalL1,
    Simplex,
    TrustRegion,
    resolve_constraint,
)

CONSTRAINTS = {
    "box": Box(-0.3, 0.4),
    "box below": Box(lower=torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)),
    "nonnegative": NonNegative(),
    "simplex": Simplex(1.5),
    "l1": L1Ball(1.2),
    "trust": TrustRegion(0.7),
    "prox": ProximalL1(0.4),
}


def problem(seed=0, size=5, n=6):
    generator = torch.Generator().manual_seed(seed)
    z, center = (torch.randn(size, n, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.2
    return z, weight, center


def by_solver(constraint, z, weight, center):
    cp = pytest.importorskip("cvxpy")
    rows = []
    for point, middle in zip(z.numpy(), center.numpy(), strict=True):
        theta = cp.Variable(len(point))
        constraints, penalty = constraint.express(theta, theta - middle)
        distance = cp.sum_squares(cp.multiply(weight.sqrt().numpy(), theta - point)) / 2
        cp.Problem(cp.Minimize(distance + penalty), constraints).solve(solver=cp.SCS, eps=1e-10, max_iters=100_000)
        rows.append(torch.from_numpy(theta.value))
    return torch.stack(rows)


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
@pytest.mark.parametrize("seed", range(3))
def test_solves_the_program(constraint, seed):
    z, weight, center = problem(seed)
    assert torch.allclose(constraint.project(z, weight, center), by_solver(constraint, z, weight, center), atol=1e-7)


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_batch_is_a_loop(constraint):
    z, weight, center = problem()
    rows = [constraint.project(z[b : b + 1], weight, center[b : b + 1]) for b in range(len(z))]
    assert torch.allclose(constraint.project(z, weight, center), torch.cat(rows), rtol=0, atol=1e-14)


def slow_simplex(point, weight, total):
    # Try every set of positive coordinates and keep the feasible candidate of least distance.
    best, answer = float("inf"), None
    for count in range(1, len(point) + 1):
        for active in itertools.combinations(range(len(point)), count):
            chosen = list(active)
            nu = (point[chosen].sum() - total) / (1 / weight[chosen]).sum()
            theta = torch.zeros_like(point)
            theta[chosen] = point[chosen] - nu / weight[chosen]
            distance = (weight * (theta - point).square()).sum()
            if (theta >= 0).all() and distance < best:
                best, answer = distance, theta
    return answer


def test_simplex_is_the_best_of_all_active_sets():
    z, weight, center = problem(seed=3)
    expected = torch.stack([slow_simplex(row, weight, 1.5) for row in z])
    assert torch.allclose(Simplex(1.5).project(z, weight, center), expected, atol=1e-12)


def test_trust_region_agrees_with_bisection():
    z, weight, center = problem(seed=4)
    step = z - center
    low, high = torch.zeros(len(z), 1).double(), torch.full((len(z), 1), 1e4).double()
    for _ in range(200):
        middle = (low + high) / 2
        long = (weight * step / (weight + middle)).norm(dim=1, keepdim=True) > 0.7
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    assert (step.norm(dim=1) > 0.7).any()
    expected = torch.where(step.norm(dim=1, keepdim=True) > 0.7, weight * step / (weight + low), step)
    assert torch.allclose(TrustRegion(0.7).project(z, weight, center), center + expected, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_trust_region_over_many_orders_of_magnitude(ratio):
    z, _, center = problem(seed=5, size=50)
    weight = torch.logspace(-4, 4, 6, dtype=torch.float64)
    radius = 0.1 * ratio
    step = TrustRegion(radius).project(center + ratio * (z - center), weight, center) - center
    assert torch.allclose(step.norm(dim=1), torch.full((50,), radius).double(), rtol=1e-9)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_first_and_second_derivatives(name):
    z, weight, center = (value.requires_grad_() for value in problem(seed=1, size=3))
    constraint = CONSTRAINTS[name]

    def compute(z, weight, center):
        return constraint.project(z, weight.square(), center)

    assert torch.autograd.gradcheck(compute, (z, weight, center))
    assert torch.autograd.gradgradcheck(compute, (z, weight, center))


@pytest.mark.parametrize("make", [Simplex, L1Ball, TrustRegion, ProximalL1, lambda bound: Box(-bound, bound)])
def test_derivatives_with_respect_to_the_bound(make):
    z, weight, center = problem(seed=2, size=3)
    bound = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def compute(bound):
        return make(bound).project(z, weight, center)

    assert torch.autograd.gradcheck(compute, (bound,))
    assert torch.autograd.gradgradcheck(compute, (bound,))
    assert torch.autograd.grad(compute(bound).square().sum(), bound)[0].abs() > 1e-3


@pytest.mark.parametrize("name", ["l1", "trust", "box", "prox"])
def test_points_inside_and_at_zero_have_finite_derivatives(name):
    center = torch.zeros(2, 6, dtype=torch.float64)
    z = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    constraint = {"prox": ProximalL1(0.0)}.get(name, CONSTRAINTS[name])
    found = constraint.project(z, torch.ones(6).double(), center)
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.autograd.grad(found.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_json_form(constraint):
    again = resolve_constraint(json.loads(json.dumps(constraint.spec, allow_nan=False)))
    z, weight, center = problem()
    assert type(again) is type(constraint)
    assert torch.equal(again.project(z, weight, center), constraint.project(z, weight, center))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), "empty"),
        (lambda: Simplex(0.0), "total must be positive"),
        (lambda: L1Ball(-1.0), "radius must be positive"),
        (lambda: TrustRegion(0.0), "radius must be positive"),
        (lambda: ProximalL1(-0.1), "must not be negative"),
        (lambda: resolve_constraint({"class": "Cone"}), "unknown constraint"),
        (lambda: Box(torch.zeros(3)).project(torch.zeros(1, 4), torch.ones(4), torch.zeros(1, 4)), "3 entries"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_constraint_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Constraint()
