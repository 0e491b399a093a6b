"""Evolution strategies against closed forms, finite differences and reverse mode."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start, step, unroll
from lightning_metaopt.objectives import FinalLoss, Objective

FAMILY = lmo.tasks.LeastSquares(dim=3, rows=5, double=True, start_std=1.0)


def episode_of(rule: lmo.Rule, size: int = 4) -> Episode:
    return start(rule, FAMILY.draw(seed=1, size=size))


def mean_and_error(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = torch.stack(samples)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(stacked))


def test_unbiased_on_a_quadratic_with_a_wide_perturbation() -> None:
    # theta_1 = theta_0 - B g is linear in B, so that the final loss is quadratic in B and smoothing keeps its gradient:
    # d/dB mean_i |X_i theta_1 - y_i|^2 = - mean_i 2 X_i'(X_i theta_1 - y_i) g_i'.
    rule = lmo.rules.DCOGeneralDescent(FAMILY.shapes, matrix_scale=0.05).double()
    episode = episode_of(rule)
    design, target, theta = episode.task.data["design"], episode.task.data["target"], episode.params["theta"]

    def slope(at: torch.Tensor) -> torch.Tensor:
        return 2 * torch.einsum("brd,br->bd", design, torch.einsum("brd,bd->br", design, at) - target)

    grad = slope(theta)
    exact = -torch.einsum("bi,bj->bij", slope(theta - grad @ rule.matrix.detach().mT), grad).mean(0)
    estimator = lmo.ZerothOrder(steps=1, pairs=40, sigma=0.5)
    samples = [estimator(rule, episode, FinalLoss()).grads["matrix"] for _ in range(20)]
    mean, error = mean_and_error(samples)
    assert ((mean - exact).abs() < 4 * error).all()
    assert (error < 0.5 * exact.abs().max()).all()


class Spy(Objective):
    """The final loss; records under which meta-parameters it was asked for."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, rule: lmo.Rule, start: Episode, end: Episode, losses: torch.Tensor) -> torch.Tensor:
        self.seen.append({name: value.detach().clone() for name, value in rule.named_parameters()})
        return FinalLoss()(rule, start, end, losses)


def final_loss(rule: lmo.Rule, phi: dict[str, torch.Tensor], episode: Episode, steps: int) -> float:
    """A plain twin: a copy of the rule with other meta-parameters, stepped by hand."""
    other = copy.deepcopy(rule)
    other.load_state_dict(phi)
    for _ in range(steps):
        episode, _ = step(other, episode)
    return float(episode.task.loss(episode.params, {}, episode.task.batch(steps)).mean())


def test_two_point_estimate_is_the_directional_finite_difference() -> None:
    rule = lmo.rules.HeavyBall(lr=0.01).double()
    episode, spy, sigma = episode_of(rule), Spy(), 0.05
    estimate = lmo.ZerothOrder(steps=3, pairs=1, sigma=sigma)(rule, episode, spy)
    phi, plus, minus = spy.seen
    direction = {name: (plus[name] - phi[name]) / sigma for name in phi}
    difference = (final_loss(rule, plus, episode, 3) - final_loss(rule, minus, episode, 3)) / (2 * sigma)
    assert float(estimate.loss) == pytest.approx(final_loss(rule, phi, episode, 3), rel=1e-12)
    for name, grad in estimate.grads.items():
        torch.testing.assert_close(minus[name], phi[name] - sigma * direction[name])
        torch.testing.assert_close(grad, difference * direction[name], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("persistent", [False, True])
def test_small_perturbations_agree_with_reverse_mode(persistent: bool) -> None:
    rule = lmo.rules.GradientDescent(lr=0.02).double()
    episode = episode_of(rule)
    exact = lmo.Unrolled(steps=5)(rule, episode, FinalLoss()).grads["log_lr"]
    estimator = lmo.ZerothOrder(steps=5, pairs=50, sigma=1e-4, persistent=persistent)
    mean, error = mean_and_error([estimator(rule, episode, FinalLoss()).grads["log_lr"] for _ in range(8)])
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * abs(exact)


def summed_over_windows(estimator: lmo.MetaGradient, rule: lmo.Rule, episode: Episode, windows: int) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(windows):
        estimate = estimator(rule, episode, FinalLoss())
        total, episode = total + estimate.grads["log_lr"], estimate.episode
    return total


def test_persistent_is_unbiased_over_windows_where_truncation_is_not() -> None:
    # The sum over windows of their final losses, as a function of phi through the whole unroll.
    rule = lmo.rules.GradientDescent(lr=0.02).double()
    begin, windows, length = episode_of(rule), 4, 2
    total, current = torch.zeros((), dtype=torch.float64), begin
    for _ in range(windows):
        current, _ = unroll(rule, current, length, order="second")
        total = total + FinalLoss()(rule, begin, current, torch.zeros(0)).mean()
    (exact,) = torch.autograd.grad(total, [rule.log_lr])

    results = {}
    for persistent in (False, True):
        estimator = lmo.ZerothOrder(length, pairs=40, sigma=1e-3, persistent=persistent)
        results[persistent] = mean_and_error([summed_over_windows(estimator, rule, begin, windows) for _ in range(12)])
    (truncated, truncated_error), (mean, error) = results[False], results[True]
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * abs(exact)
    assert abs(truncated - exact) > 8 * max(error, truncated_error)


def test_particles_follow_their_own_perturbed_rules() -> None:
    # Plain twin of two windows with one pair: each particle keeps its own iterates and the sum of its directions.
    rule = lmo.rules.HeavyBall(lr=0.01).double()
    begin, sigma, spy = episode_of(rule), 0.1, Spy()
    estimator = lmo.ZerothOrder(steps=2, pairs=1, sigma=sigma, persistent=True)
    first = estimator(rule, begin, spy)
    second = estimator(rule, first.episode, spy)
    phi, plus1, minus1, _, plus2, minus2 = spy.seen

    def run(phi1: dict[str, torch.Tensor], phi2: dict[str, torch.Tensor]) -> torch.Tensor:
        episode = begin
        for values in (phi1, phi2):
            other = copy.deepcopy(rule)
            other.load_state_dict(values)
            for _ in range(2):
                episode, _ = step(other, episode)
        return FinalLoss()(rule, begin, episode, torch.zeros(0)).mean()

    difference = (run(plus1, plus2) - run(minus1, minus2)) / (2 * sigma)
    for name, grad in second.grads.items():
        total = (plus1[name] - phi[name] + plus2[name] - phi[name]) / sigma
        torch.testing.assert_close(grad, difference * total, rtol=1e-9, atol=0.0)


def test_particles_start_anew_with_the_episode_and_can_be_split_and_joined() -> None:
    rule = lmo.rules.HeavyBall(lr=0.01).double()
    begin = episode_of(rule)
    carried = lmo.ZerothOrder(steps=2, pairs=2, persistent=True)(rule, begin, FinalLoss()).episode

    def fresh() -> lmo.ZerothOrder:
        return lmo.ZerothOrder(steps=2, pairs=2, persistent=True, seed=3)

    whole = fresh()(rule, carried, FinalLoss()).grads
    joined = Episode.join([carried.select(slice(0, 1)), carried.select(slice(1, 4))])
    parts = [fresh()(rule, carried.select(slice(at, at + 2)), FinalLoss()).grads for at in (0, 2)]
    anew = fresh()(rule, replace(begin, history=carried.history), FinalLoss()).grads
    for name, grad in whole.items():
        torch.testing.assert_close(fresh()(rule, joined, FinalLoss()).grads[name], grad)
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, grad)  # as two processes would
        torch.testing.assert_close(anew[name], fresh()(rule, begin, FinalLoss()).grads[name], rtol=0.0, atol=0.0)


def test_resume_is_exact() -> None:
    rule = lmo.rules.HeavyBall(lr=0.01).double()
    estimator = lmo.ZerothOrder(steps=2, pairs=2, persistent=True)
    first = estimator(rule, episode_of(rule), FinalLoss())
    buffer = io.BytesIO()
    torch.save((estimator.state_dict(), first.episode.state_dict()), buffer)
    expected = estimator(rule, first.episode, FinalLoss())
    buffer.seek(0)
    state, saved = torch.load(buffer, weights_only=True)
    other = lmo.ZerothOrder(steps=2, pairs=2, persistent=True)
    other.load_state_dict(state)
    resumed = other(rule, Episode.from_state_dict(saved, first.episode.task), FinalLoss())
    for name, grad in expected.grads.items():
        assert torch.equal(resumed.grads[name], grad)
    assert torch.equal(resumed.episode.params["theta"], expected.episode.params["theta"])


def test_cost_is_what_is_stated() -> None:
    calls = 0

    class Counting(FinalLoss):
        def __call__(self, rule: lmo.Rule, start: Episode, end: Episode, losses: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += len(losses) + 1
            return super().__call__(rule, start, end, losses)

    rule = lmo.rules.GradientDescent(lr=0.01).double()
    estimator = lmo.ZerothOrder(steps=3, pairs=2)
    info = estimator(rule, episode_of(rule), Counting()).info
    assert calls == estimator.gradient_evaluations
    assert info == {"sigma": 0.01, "particles": 4.0}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="pairs and delay at least 0"):
        lmo.ZerothOrder(pairs=-1)
    with pytest.raises(ValueError, match="sigma must be positive"):
        lmo.ZerothOrder(sigma=0.0)
    rule = lmo.rules.GradientDescent(lr=0.01).double()
    carried = lmo.ZerothOrder(steps=1, pairs=1, persistent=True)(rule, episode_of(rule), FinalLoss()).episode
    with pytest.raises(ValueError, match="fewer pairs"):
        lmo.ZerothOrder(steps=1, pairs=2, persistent=True)(rule, carried, FinalLoss())
