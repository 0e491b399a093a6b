"""Bandit feedback (Algorithms 5 and 6) against plain loops, closed forms and finite differences."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.objectives import FinalLoss, Objective

D = torch.float64
RATE = 1e-3  # of meta-steps in the test of Algorithm 5
FAMILY = lmo.tasks.LeastSquares(dim=2, rows=5, mean=True, double=True, start_std=1.0)


class Spy(Objective):
    """The final loss; records the meta-parameters that were played."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, rule: lmo.Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        self.seen.append({name: value.detach().clone() for name, value in rule.named_parameters()})
        return FinalLoss()(rule, start, end, losses)


class Above(Objective):
    """The final loss above a constant."""

    def __init__(self, constant: float) -> None:
        self.constant = constant

    def __call__(self, rule: lmo.Rule, start: Episode, end: Episode, losses: Tensor) -> Tensor:
        return FinalLoss()(rule, start, end, losses) - self.constant


def drawn(seed: int, call: int, *shape: int) -> Tensor:
    """The direction of a call. (Read off the played values it would lose digits, of which the loops have none to spare.)"""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{call}").getrandbits(63))
    found = torch.randn(shape, generator=generator).double()
    return found / found.norm()


def learn(rule: lmo.Rule, how: lmo.MetaGradient, episode: Episode, steps: int, rate: Callable[[int], float], spy: Objective):
    """Projected gradient descent by hand; yields the episode and the meta-parameters after every step."""
    for k in range(1, steps + 1):
        estimate = how(rule, episode, spy)
        episode = estimate.episode
        with torch.no_grad():
            for name, value in rule.named_parameters():
                value.sub_(rate(k) * estimate.grads[name])
            rule.project_()
        yield episode, {name: value.detach().clone() for name, value in rule.named_parameters()}


def test_algorithm_6_is_a_plain_loop() -> None:
    # Scalar M in a box, 100 steps: y_t = x_t + delta u_t, g_t = d/delta f_t sum u_{t-i}, x_{t+1} = P[x_t - eta_t g_{t-L+1}].
    memory, radius, box, history = 4, 0.1, 0.3, 3
    rule = lmo.rules.GradientPerturbation(history, lr=0.05, bound=box).double()
    episode, spy = start(rule, FAMILY.draw(seed=0, size=2)), Spy()
    how = lmo.ZerothOrder(pairs=0, sigma=radius, noise="sphere", memory=memory, delay=memory - 1, seed=3)
    design, target, theta = episode.task.data["design"], episode.task.data["target"], episode.params["theta"]

    def loss_and_grad(at: Tensor) -> tuple[Tensor, Tensor]:
        residual = torch.einsum("brd,bd->br", design, at) - target
        return residual.square().mean(1).mean(), 2 * torch.einsum("brd,br->bd", design, residual) / 5

    center, met, directions, estimates = torch.zeros(history, dtype=D), [], [], []
    for k, (reached, phi) in enumerate(learn(rule, how, episode, 100, lambda k: 0.02 * k**-0.75, spy), start=1):
        directions.append(drawn(3, k - 1, history))
        played = center + radius * directions[-1]
        torch.testing.assert_close(spy.seen[-1]["coefficients"], played, rtol=1e-9, atol=1e-10)
        met.insert(0, loss_and_grad(theta)[1])
        theta = theta - 0.05 * met[0] - sum(played[h] * g for h, g in enumerate(met[:history]))
        loss = loss_and_grad(theta)[0]
        whole = k >= memory
        estimates.append(history / radius * loss * torch.stack(directions[-memory:]).sum(0) if whole else torch.zeros(history))
        if k >= memory:
            center = (center - 0.02 * k**-0.75 * estimates[k - memory]).clamp(-box, box)
        torch.testing.assert_close(reached.params["theta"], theta, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(phi["coefficients"], center, rtol=1e-9, atol=1e-10)
    assert center.abs().max() > 0.05


def dynamics(hessian: Tensor, lr: float, decay: float) -> Tensor:
    """Eq. 2, written out."""
    eye, zero = torch.eye(2, dtype=D), torch.zeros(2, 2, dtype=D)
    rows = [[(1 - decay) * eye, zero, -lr * eye], [eye, zero, zero], [hessian, -hessian, zero]]
    return torch.cat([torch.cat(row, 1) for row in rows])


@pytest.mark.parametrize("restart", ["average", "start"])
def test_algorithm_5_is_the_linear_system_of_the_paper(restart: str) -> None:
    # z+ = A z + B u + w with matrices, restarts as disturbances (Eq. 8), and the update of M, over 100 steps.
    lags, length, radius, lr, decay = 2, 8, 0.05, 0.1, 0.02
    rule = lmo.rules.DisturbanceFeedback(FAMILY.shapes, lags, lr, decay, kappa=1.0, gamma=0.4, shrink=0.2).double()
    episode, spy = start(rule, FAMILY.draw(seed=1, size=1)), Spy()
    bandit = lmo.ZerothOrder(pairs=0, sigma=radius, noise="sphere", memory=lags, delay=lags + 1)
    how = lmo.metagrads.Epochs(bandit, length, beta=0.3, restart=restart, jump=True)
    design, target, first = episode.task.data["design"][0], episode.task.data["target"][0], episode.params["theta"][0]
    hessian = 2 * design.T @ design / 5 + 2 * 0.3 * torch.eye(2, dtype=D)  # of the regularised objective
    matrix, begin = dynamics(hessian, lr, decay), first

    def loss(x: Tensor, center: Tensor) -> Tensor:
        return (design @ x - target).square().mean() + 0.3 * (x - center).square().sum()

    def slope(x: Tensor, center: Tensor) -> Tensor:
        return 2 * design.T @ (design @ x - target) / 5 + 0.6 * (x - center)

    z, past, epsilons, estimates = torch.cat([first, first, torch.zeros(2, dtype=D)]), [], [], []
    center, walked, moved = torch.zeros(lags, 6, 6, dtype=D), [], 0.0
    past = [torch.zeros(6, dtype=D)] * lags
    for k, (reached, phi) in enumerate(learn(rule, how, episode, 104, lambda k: RATE * k**-0.75, spy), start=1):
        epsilons.append(drawn(0, k - 1, lags, 6, 6))
        played = center + radius * epsilons[-1]
        torch.testing.assert_close(spy.seen[-1]["controller"], played, rtol=1e-8, atol=1e-9)
        control = sum(played[lag] @ past[lag] for lag in range(lags))
        control = torch.cat([control[:2], torch.zeros(4, dtype=D)])
        x, before = z[:2], z[2:4]
        walked.append(x)
        # The gradient at x_{s-1} in the state is that of the objective that ran then; after a restart it is 0, as printed.
        late = z[4:] if len(walked) > 1 else torch.zeros(2, dtype=D)
        # The third row, with w_s = grad f(x_{s-1}), makes grad f(x_s) whatever x_{s-1} was.
        usual = torch.cat([torch.zeros(4, dtype=D), slope(before, begin)])
        nxt = matrix @ z + control + usual
        torch.testing.assert_close(nxt[4:], slope(x, begin), rtol=1e-9, atol=1e-10)
        value = loss(nxt[:2], begin)
        full = len(walked) >= lags
        estimates.append(72.0 * value / radius * (epsilons[-1] + epsilons[-2]) if full else torch.zeros(lags, 6, 6, dtype=D))
        noise = torch.cat([torch.zeros(4, dtype=D), late])
        if len(walked) == length:
            goal = torch.stack(walked).mean(0) if restart == "average" else first
            noise = torch.cat([goal - nxt[:2], goal - x, late - slope(x, begin)])
            nxt, begin, walked = torch.cat([goal, goal, torch.zeros(2, dtype=D)]), goal, []
        past, z = [noise, *past][:lags], nxt
        if k > lags + 1:
            center = center - RATE * k**-0.75 * estimates[k - lags - 2]
            for lag in range(lags):
                u, s, v = torch.linalg.svd(center[lag])
                center[lag] = u @ torch.diag(s.clamp(max=0.8 * 0.6 ** (lag + 1))) @ v
                moved = max(moved, float(s.max()) / (0.8 * 0.6 ** (lag + 1)))
        torch.testing.assert_close(reached.params["theta"][0], z[:2], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(phi["controller"], center, rtol=1e-8, atol=1e-9)
    assert moved > 1, "the projection was never needed"


@pytest.mark.parametrize(("noise", "pairs"), [("sphere", 0), ("normal", 0), ("sphere", 5)])
def test_unbiased_where_smoothing_changes_nothing(noise: str, pairs: int) -> None:
    # The final loss of one step is quadratic in a full matrix, so that the smoothed gradient is the gradient.
    rule = lmo.rules.DCOGeneralDescent(FAMILY.shapes, matrix_scale=0.05).double()
    episode = start(rule, FAMILY.draw(seed=1, size=4))
    end, _ = unroll(rule, episode, 1, order="second")
    (exact,) = torch.autograd.grad(FinalLoss()(rule, episode, end, torch.zeros(0)).mean(), [rule.matrix])
    how = lmo.ZerothOrder(pairs=pairs, sigma=1.0, noise=noise)  # wide: the variance of one point falls with sigma
    samples = torch.stack([how(rule, episode, FinalLoss()).grads["matrix"] for _ in range(1500 if not pairs else 200)])
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.3 * exact.abs().max()).all()


def test_with_memory_it_is_the_gradient_for_all_remembered_steps() -> None:
    # Two steps with one M. A constant taken off the objective leaves the expectation; it makes room for a small radius.
    rule = lmo.rules.GradientPerturbation(1, lr=0.05).double()
    episode = start(rule, FAMILY.draw(seed=1, size=4))

    def run(value: float) -> float:
        phi = {"coefficients": torch.tensor([value], dtype=D)}
        return float(FinalLoss()(rule, episode, unroll(rule, episode, 2, phi)[0], torch.zeros(0)).mean())

    exact = (run(1e-5) - run(-1e-5)) / 2e-5
    how = lmo.ZerothOrder(pairs=0, sigma=0.01, noise="sphere", memory=2)
    samples, objective = [], Above(run(0.0))
    for _ in range(400):
        middle = how(rule, episode, objective)
        assert float(middle.grads["coefficients"]) == 0  # one direction is not yet two
        samples.append(how(rule, middle.episode, objective).grads["coefficients"])
    mean, error = torch.stack(samples).mean(), torch.stack(samples).std() / math.sqrt(len(samples))
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * abs(exact)


def test_the_baseline_is_the_mean_of_earlier_episodes_and_takes_variance() -> None:
    rule = lmo.rules.GradientPerturbation(2, lr=0.05).double()
    begin = start(rule, FAMILY.draw(seed=1, size=4))
    plain, based = (lmo.ZerothOrder(pairs=0, sigma=0.02, noise="sphere", baseline=b) for b in (None, 0.75))
    means: dict[int, float] = {}
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(40):
        episode = begin
        for step in (1, 2):
            one, two = plain(rule, episode, FinalLoss()), based(rule, episode, FinalLoss())
            mean = means.get(step, float(two.loss))
            means[step] = 0.75 * mean + 0.25 * float(two.loss)
            expected = one.grads["coefficients"] * (1 - mean / float(one.loss))
            torch.testing.assert_close(two.grads["coefficients"], expected, rtol=1e-9, atol=1e-9)
            found[0].append(one.grads["coefficients"])
            found[1].append(two.grads["coefficients"])
            episode = two.episode
    assert torch.stack(found[1]).var(0).sum() < 0.05 * torch.stack(found[0]).var(0).sum()


def test_resume_in_mid_episode_is_exact() -> None:
    def make() -> tuple[lmo.Rule, lmo.MetaGradient]:
        how = lmo.ZerothOrder(pairs=0, sigma=0.1, noise="sphere", memory=3, delay=2, baseline=0.9)
        return lmo.rules.GradientPerturbation(2, lr=0.05, bound=0.5).double(), lmo.metagrads.Epochs(how, 5, restart="start")

    rule, how = make()
    episode = start(rule, FAMILY.draw(seed=1, size=2))
    for reached, _ in learn(rule, how, episode, 13, lambda k: 1e-3, FinalLoss()):
        episode = reached
    file = io.BytesIO()
    torch.save({"episode": episode.state_dict(), "how": how.state_dict(), "rule": rule.state_dict()}, file)
    straight = list(learn(rule, how, episode, 20, lambda k: 1e-3, FinalLoss()))[-1]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rule, how = make()
    rule.load_state_dict(saved["rule"])
    how.load_state_dict(saved["how"])
    again = Episode.from_state_dict(saved["episode"], FAMILY.draw(seed=1, size=2))
    resumed = list(learn(rule, how, again, 20, lambda k: 1e-3, FinalLoss()))[-1]
    assert torch.equal(straight[0].params["theta"], resumed[0].params["theta"])
    assert torch.equal(straight[1]["coefficients"], resumed[1]["coefficients"])


def test_it_trains_in_a_meta_learner() -> None:
    rule = lmo.rules.GradientPerturbation(2, lr=0.01, bound=0.05)
    family = lmo.tasks.LeastSquares(dim=2, rows=5, mean=True, start_std=1.0)
    how = lmo.ZerothOrder(pairs=0, sigma=0.02, noise="sphere", memory=2, delay=1, baseline=0.9)
    sgd = partial(torch.optim.SGD, lr=1e-4)
    learner = lmo.MetaLearner(rule, family, how, optimizer=sgd, tasks=4, pool=4, horizon=10, steps_per_epoch=300)
    loop = lmo.MetaLoop(max_epochs=1, accelerator="cpu", enable_progress_bar=False, keep="last")
    loop.fit(learner)
    assert learner.history[-1]["val_loss"] < 0.97 * learner.history[0]["val_loss"]
    assert rule.coefficients.abs().max() <= 0.05


def test_refusals() -> None:
    for options, message in [
        ({"pairs": -1}, "pairs and delay at least 0"),
        ({"memory": 2}, "belong to bandit feedback"),
        ({"baseline": 0.9}, "belong to bandit feedback"),
        ({"pairs": 0, "persistent": True}, "persistent needs pairs"),
        ({"pairs": 0, "baseline": 1.0}, "weight in"),
        ({"noise": "box"}, "noise must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            lmo.ZerothOrder(**options)
