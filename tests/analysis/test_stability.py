"""Dynamics against the optimizers that they describe, and norms against plain products."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from contracts import NETS

import lightning_metaopt as lmo
from lightning_metaopt.analysis import (
    Stability,
    controlled_dynamics,
    descent_dynamics,
    hessian,
    momentum_dynamics,
    plot_stability,
    product_norms,
    sequential_stability,
    spectral_radius,
)
from lightning_metaopt.episode import start, unroll

D = torch.float64
H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=D)
X = torch.tensor([1.0, -2.0], dtype=D)


def test_heavy_ball_and_its_buffer() -> None:
    x = torch.nn.Parameter(X.clone())
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.8)
    state, matrix = torch.cat([X, torch.zeros(2, dtype=D)]), momentum_dynamics(H, 0.1, 0.8)
    for _ in range(10):
        x.grad = H @ x.detach()
        optimizer.step()
        state = matrix @ state
        torch.testing.assert_close(state[:2], x.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_gradient_perturbation_and_its_buffer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = lmo.rules.GradientPerturbation(3, 0.1, 0.05, kind, {"x": (2,)}).double()
    with torch.no_grad():
        for value in rule.parameters():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator, dtype=D))
    params = {"x": X[None]}
    rule_state, z = rule.init(params), torch.cat([X, torch.zeros(4, dtype=D)])
    matrix = controlled_dynamics(H, next(iter(rule.parameters())).detach(), 0.1, 0.05)
    for _ in range(10):
        updates, rule_state = rule({"x": params["x"] @ H}, rule_state, params)
        params = {"x": (params["x"] + updates["x"]).detach()}
        z = matrix @ z
        torch.testing.assert_close(z[:2], params["x"][0], rtol=1e-10, atol=1e-12)


def test_descent_dynamics_is_the_system_of_the_full_controller() -> None:
    rule = lmo.rules.DisturbanceFeedback({"x": (2,)}, 1, lr=0.1, decay=0.05).double()
    params = {"x": X[None]}
    state, matrix = rule.init(params), descent_dynamics(H, 0.1, 0.05)
    z = torch.cat([X, X, torch.zeros(2, dtype=D)])
    for _ in range(10):
        updates, state = rule({"x": params["x"] @ H}, state, params)
        params = {"x": (params["x"] + updates["x"]).detach()}
        z = matrix @ z + torch.cat([torch.zeros(4, dtype=D), H @ z[2:4]])  # w = grad f(x_{s-1})
        torch.testing.assert_close(z[:2], params["x"][0], rtol=1e-10, atol=1e-12)


def test_spectral_radius_tells_convergence() -> None:
    for lr in (0.5, 1.5):  # gradient descent on H converges below 2 / its largest eigenvalue, 0.905
        radius = spectral_radius(controlled_dynamics(H, torch.zeros(1, dtype=D), lr))
        assert float(radius) == pytest.approx(float(torch.linalg.eigvalsh(torch.eye(2) - lr * H).abs().max()), rel=1e-10)
        assert (radius < 1) == (lr < 0.9)


def test_norms_and_constants_against_numpy() -> None:
    matrices = 0.6 * torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    norms = product_norms(matrices)
    stability = Stability(norms)
    mean, spread, largest = stability.by_length()
    for length in range(1, 6):
        found = np.array(
            [
                [
                    np.linalg.norm(np.linalg.multi_dot([np.eye(3), *matrices[s : s + length, trial].numpy()[::-1]]), 2)
                    for trial in range(2)
                ]
                for s in range(6 - length)
            ]
        )
        np.testing.assert_allclose(norms.diagonal(length - 1).T.numpy(), found, rtol=1e-10)
        assert float(mean[length - 1]) == pytest.approx(found.mean(), rel=1e-10)
        assert float(spread[length - 1]) == pytest.approx(found.mean(0).std(ddof=1), rel=1e-10)
        assert float(largest[length - 1]) == pytest.approx(found.max(), rel=1e-10)
        for gamma in (0.0, 0.3):
            assert found.max() <= stability.kappa(gamma) ** 2 * (1 - gamma) ** length * (1 + 1e-9)
    assert torch.isnan(norms[1, 0]).all()
    assert any(float(largest[n - 1]) == pytest.approx(stability.kappa(0.3) ** 2 * 0.7**n, rel=1e-9) for n in range(1, 6))


def test_second_derivatives_of_a_network_and_the_path() -> None:
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = start(rule, NETS.draw(seed=0, size=2))
    found = hessian(episode.task, episode.params, episode.buffers, episode.task.batch(0))
    layout, step = lmo.tree.Layout.of(NETS.shapes), 1e-5

    def slope(flat: torch.Tensor) -> torch.Tensor:
        params = {n: leaf.detach().requires_grad_() for n, leaf in layout.unflatten(flat).items()}
        loss = episode.task.loss(params, {"seen": torch.zeros(2, 1)}, episode.task.batch(0)).sum()
        return layout.flatten(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))

    here = layout.flatten(episode.params)
    for index in (0, 7, 12):
        shift = step * torch.eye(layout.size, dtype=D)[index]
        torch.testing.assert_close(found[:, index], (slope(here + shift) - slope(here - shift)) / (2 * step), rtol=1e-6, atol=1e-8)

    plain = sequential_stability(rule, episode, 3, partial(descent_dynamics, lr=0.1))
    pulled = sequential_stability(rule, episode, 3, partial(descent_dynamics, lr=0.1), beta=0.5)
    last = unroll(rule, episode, 2)[0]
    curvature = hessian(last.task, last.params, last.buffers, last.task.batch(2))
    for stability, extra in ((plain, 0.0), (pulled, 1.0)):
        expected = descent_dynamics(curvature + extra * torch.eye(layout.size, dtype=D), 0.1)
        torch.testing.assert_close(stability.norms[2, 2], torch.linalg.matrix_norm(expected, ord=2), rtol=1e-8, atol=1e-10)


def test_the_plot(tmp_path) -> None:
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = start(rule, NETS.draw(seed=0, size=2))
    plot_stability({"one": sequential_stability(rule, episode, 3, partial(descent_dynamics, lr=0.1))}, tmp_path / "a.svg")
    assert "steps in the product" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 5000
