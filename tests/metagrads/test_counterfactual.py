"""Counterfactual rollouts against a naive loop with lists of gradients and double backward."""

import pytest
import torch
from contracts import NETS

import lightning_metaopt as lmo
from lightning_metaopt.episode import start
from lightning_metaopt.objectives import FinalLoss, MeanLoss
from lightning_metaopt.rules import GradientPerturbation

ETA, DECAY, HISTORY = 0.1, 0.02, 3


def slopes(task, number, point, graph=False):
    leaves = {n: p if p.requires_grad and graph else p.detach().requires_grad_() for n, p in point.items()}
    loss = task.loss(leaves, {"seen": torch.zeros(task.size, 1)}, task.batch(number)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), create_graph=graph), strict=True))


def lag(m, name, h):
    return m[name][h] if isinstance(m, dict) else m[h]


def naive(task, begin, m, rate, steps, rollout, *, common=False, constant=False):
    """Algorithm 1 with a gradient step of ``rate`` on M: for each t, M and its meta-gradient; M may be a dictionary."""
    single = not isinstance(m, dict)
    xs, met, seen = [begin], [], []
    for t in range(1, steps + 1):
        met.append(slopes(task, t - 1, xs[-1]))  # g_{t-1}
        mixture = {n: sum(lag(m, n, h) * met[-1 - h][n] for h in range(min(HISTORY, t))) for n in xs[-1]}
        xs.append({n: (1 - DECAY) * x - ETA * met[-1][n] - mixture[n] for n, x in xs[-1].items()})
        if t < HISTORY + rollout - 1:
            seen.append((m, None))
            continue
        own = m.clone().requires_grad_() if single else {n: v.clone().requires_grad_() for n, v in m.items()}
        point = xs[t - rollout]
        for s in range(t - rollout, t):
            g = slopes(task, t if common else s, point, graph=not constant)
            point = {
                n: (1 - DECAY) * x - ETA * g[n] - sum(lag(own, n, h) * met[s - h][n] for h in range(HISTORY))
                for n, x in point.items()
            }
        loss = task.loss(point, {"seen": torch.zeros(task.size, 1)}, task.batch(t)).mean()
        found = torch.autograd.grad(loss, [own] if single else list(own.values()))
        grad = found[0] if single else dict(zip(own, found, strict=True))
        seen.append((m, grad))
        m = m - rate * grad if single else {n: v - rate * grad[n] for n, v in m.items()}
    return seen


@pytest.mark.parametrize("rollout", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
def test_algorithm_1_is_a_naive_loop_with_double_backward(rollout, kind):
    task, rate, steps = NETS.draw(0, 2), 0.05, 14
    rule = GradientPerturbation(HISTORY, ETA, DECAY, kind, NETS.shapes).double()
    episode = start(rule, task)
    m = torch.zeros(HISTORY, dtype=torch.float64)
    if kind == "diagonal":
        m = {n: torch.zeros(HISTORY, *shape, dtype=torch.float64) for n, shape in NETS.shapes.items()}
    met = naive(task, episode.params, m, rate, steps, rollout)
    how, optimizer = lmo.Counterfactual(rollout), torch.optim.SGD(rule.parameters(), rate)
    names = {"coefficients." + lmo.tree.escape(n): n for n in NETS.shapes}
    for m, grad in met:
        values = dict(rule.named_parameters())
        for name, value in values.items():
            torch.testing.assert_close(value.detach(), m[names[name]] if kind == "diagonal" else m, rtol=1e-12, atol=1e-13)
        estimate = how(rule, episode, FinalLoss())
        episode = estimate.episode
        for name, value in values.items():
            wanted = torch.zeros_like(value) if grad is None else grad[names[name]] if kind == "diagonal" else grad
            torch.testing.assert_close(estimate.grads[name], wanted, rtol=1e-12, atol=1e-13)
            value.grad = estimate.grads[name]
        assert ("counterfactual" in estimate.info) == (grad is not None)
        optimizer.step()
    assert any(value.abs().max() > 1e-3 for value in rule.parameters())


@pytest.mark.parametrize("options", [{"common_batch": True}, {"first_order": True}])
def test_the_other_forms(options):
    task, m = NETS.draw(0, 2), torch.tensor([0.03, 0.02, -0.01], dtype=torch.float64)
    rule = GradientPerturbation(HISTORY, ETA, DECAY).double()
    with torch.no_grad():
        rule.coefficients.copy_(m)
    episode, how = start(rule, task), lmo.Counterfactual(2, **options)
    own = naive(task, episode.params, m, 0.0, 8, 2)
    expected = naive(task, episode.params, m, 0.0, 8, 2, common="common_batch" in options, constant="first_order" in options)
    for (_, grad), (_, plain) in zip(expected, own, strict=True):
        estimate = how(rule, episode, FinalLoss())
        episode = estimate.episode
        if grad is not None:
            torch.testing.assert_close(estimate.grads["coefficients"], grad, rtol=1e-12, atol=1e-13)
            assert not torch.allclose(grad, plain, rtol=1e-6)


def test_a_rollout_of_one_step_is_multi_lag_hypergradient_descent():
    task = NETS.draw(0, 1)
    rule = GradientPerturbation(HISTORY, ETA).double()
    episode, how, met = start(rule, task), lmo.Counterfactual(1), []
    for _ in range(6):
        met.append(slopes(task, episode.step, episode.params))
        estimate = how(rule, episode, FinalLoss())
        episode = estimate.episode
    now = slopes(task, 6, episode.params)
    expected = [-sum((now[n] * met[-h][n]).sum() for n in now) for h in range(1, HISTORY + 1)]
    torch.testing.assert_close(estimate.grads["coefficients"], torch.stack(expected), rtol=1e-12, atol=1e-13)


def test_any_objective_of_the_rollout():
    # The mean loss of the rollout contains that of its start, a constant, and that of its end.
    task = NETS.draw(0, 2)
    rule = GradientPerturbation(HISTORY, ETA).double()
    episode, how = start(rule, task), lmo.Counterfactual(1)
    for _ in range(5):
        final, mean = (how(rule, episode, objective) for objective in (FinalLoss(), MeanLoss()))
        torch.testing.assert_close(2 * mean.grads["coefficients"], final.grads["coefficients"])
        episode = final.episode
    assert final.grads["coefficients"].abs().max() > 0


def test_meta_training_with_a_trainer():
    family = lmo.tasks.LeastSquares(dim=4, rows=8, mean=True, start_std=1.0)
    rule = GradientPerturbation(history=3, lr=0.05)
    learner = lmo.MetaLearner(
        rule, family, lmo.Counterfactual(2), objective="final", optimizer=lambda p: torch.optim.Adam(p, 0.01), tasks=4, horizon=20
    )
    trained = lmo.MetaLoop(max_epochs=1, enable_progress_bar=False, logger=False, enable_checkpointing=False).fit(learner)
    assert float(trained.profile().sum()) > 0.06  # larger steps than at first


def test_refusals():
    with pytest.raises(ValueError, match="at least 1"):
        lmo.Counterfactual(0)
    rule = lmo.rules.GradientDescent().double()
    with pytest.raises(TypeError, match="cannot be set back"):
        lmo.Counterfactual()(rule, start(rule, NETS.draw(0, 1)), FinalLoss())
