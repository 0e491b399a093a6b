"""Exponentiated gradient and p-norms: closed forms against the program that they solve, given to a solver."""

import math

import cvxpy as cp
import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.rules import ConvexProgram, EntropyMirror, GradientDescent, KroneckerMirror, PNormMirror

D = torch.float64
SHAPES = {"w": (2, 2), "b": ()}


def tree(seed, low=None, size=3):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(size, 5, generator=generator, dtype=D)
    if low is not None:
        flat = flat.abs() + low
        flat = flat / flat.sum(1, keepdim=True)
    return lmo.tree.Layout.of(SHAPES).unflatten(flat)


def close(found, expected, precision):
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=precision, atol=precision)


@pytest.mark.parametrize("total", [1.0, 2.5, None])
def test_exponentiated_gradient_solves_its_program(total):
    # min eta <g, x> + sum x log x - x log y - x: the part in y goes in as a vector that is computed in torch.
    rule = EntropyMirror(SHAPES, lr=0.7, total=total).double()
    x, slope = cp.Variable(5), cp.Parameter(5, name="slope")
    constraints = [] if total is None else [cp.sum(x) == total]
    problem = cp.Problem(cp.Minimize(slope @ x - cp.sum(cp.entr(x)) - cp.sum(x)), constraints)
    twin = ConvexProgram(problem, SHAPES, x, inputs={"slope": lambda given: 0.7 * given.gradient - given.current.log()})
    grads = tree(0)
    params = {name: (total or 2.0) * leaf for name, leaf in tree(1, low=0.1).items()}
    found, _ = rule(grads, rule.init(params), params)
    close(found, twin(grads, twin.init(params), params)[0], 1e-5)
    after = {name: params[name] + found[name] for name in params}
    assert rule.layout.flatten(after).min() > 0
    if total is not None:
        torch.testing.assert_close(rule.layout.flatten(after).sum(1), torch.full((3,), total, dtype=D), rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", [1.25, 1.5, 3.0])
def test_the_p_norm_step_solves_its_program(p):
    rule = PNormMirror(SHAPES, lr=0.7, p=p).double()
    x, slope = cp.Variable(5), cp.Parameter(5, name="slope")
    problem = cp.Problem(cp.Minimize(slope @ x + cp.square(cp.pnorm(x, p)) / 2))

    def linear(given):  # eta g - the gradient of |y|_p^2 / 2, by automatic differentiation
        y = given.current.detach().requires_grad_()
        with torch.enable_grad():
            value = torch.linalg.vector_norm(y, p, dim=1).square().sum() / 2
        return 0.7 * given.gradient - torch.autograd.grad(value, y)[0]

    twin = ConvexProgram(problem, SHAPES, x, inputs={"slope": linear}, solver="Clarabel")
    grads, params = tree(0), tree(1)
    close(rule(grads, {}, params)[0], twin(grads, {}, params)[0], 1e-4)


def test_the_kronecker_step_solves_its_program():
    rule = KroneckerMirror({"w": (2, 2), "b": ()}, lr=0.7, norm=1.0).double()
    a, b = rule.inputs["w"].detach(), rule.outputs["w"].detach()
    matrix = torch.block_diag(torch.kron(torch.eye(2) + b @ b.T, torch.eye(2) + a @ a.T), torch.eye(1, dtype=D)) / 0.7
    twin = ConvexProgram.polytope(SHAPES, inequality=(torch.eye(5), torch.full((5,), 100.0)))  # nothing binds
    with torch.no_grad():
        twin.phi["factor"] = torch.nn.Parameter(torch.linalg.cholesky(matrix).mT)
    grads, params = tree(0), tree(1)
    close(rule(grads, {}, params)[0], twin(grads, {}, params)[0], 1e-6)


def test_two_is_gradient_descent():
    grads, params = tree(0), tree(1)
    ours, plain = PNormMirror(SHAPES, lr=0.3, p=2.0).double(), GradientDescent(lr=0.3).double()
    close(ours(grads, {}, params)[0], plain(grads, {}, params)[0], 1e-6)  # the rates are stored in float32


def by_definition(potential, x, y):
    y = y.detach().requires_grad_()
    value = potential(y)
    slope = torch.autograd.grad(value.sum(), y)[0]
    return potential(x) - value.detach() - (slope * (x - y.detach())).sum(1)


def test_divergences_are_those_of_the_definition():
    x, y = tree(1, low=0.1), tree(2, low=0.2)
    flat = lmo.tree.Layout.of(SHAPES).flatten
    entropy = EntropyMirror(SHAPES).double()
    expected = by_definition(lambda v: (v * v.log() - v).sum(1), flat(x), flat(y))
    torch.testing.assert_close(entropy.divergence(x, y), expected, rtol=1e-10, atol=1e-12)
    zero = {name: torch.zeros_like(leaf) for name, leaf in x.items()}
    torch.testing.assert_close(entropy.divergence(zero, y), flat(y).sum(1), rtol=1e-12, atol=0)
    x, y = tree(1), tree(2)
    for p in (1.3, 4.0):
        rule = PNormMirror(SHAPES, p=p).double()
        exponent = rule.describe()["p"]
        expected = by_definition(lambda v, p=exponent: torch.linalg.vector_norm(v, p, dim=1).square() / 2, flat(x), flat(y))
        torch.testing.assert_close(rule.divergence(x, y), expected, rtol=1e-9, atol=1e-10)


def test_zeros_and_extremes_stay_finite():
    rule = PNormMirror(SHAPES, p=1.2).double()
    for scale in (0.0, 1e-200, 1e150):
        params = {name: (scale * leaf).requires_grad_() for name, leaf in tree(1).items()}
        updates, _ = rule(tree(0), {}, params)
        assert all(leaf.isfinite().all() for leaf in updates.values())
    simplex = EntropyMirror(SHAPES).double()
    params = tree(1, low=0.1)
    grads = {name: 1e6 * leaf for name, leaf in tree(0).items()}
    for _ in range(3):  # most coordinates underflow to 0 and must not become NaN
        params = {name: leaf + simplex(grads, {}, params)[0][name] for name, leaf in params.items()}
    assert all(leaf.isfinite().all() for leaf in params.values())


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="positive parameters only, and the smallest is -.*PNormMirror"):
        EntropyMirror(SHAPES).init(tree(0))
    with pytest.raises(ValueError, match="sum to 2, not to total=1; start on the simplex"):
        EntropyMirror(SHAPES).init({name: 2 * leaf for name, leaf in tree(0, low=0.1).items()})
    for bad in ({"lr": 0.0}, {"total": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EntropyMirror(SHAPES, **bad)
    for bad in ({"lr": math.inf}, {"p": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PNormMirror(SHAPES, **bad)
