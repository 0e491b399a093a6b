import pytest
import torch
from contracts import NETS
from implicit_cases import Ridges, close, moved, setting, spd

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start, unroll
from lightning_metaopt.metagrads import (
    ConjugateGradient,
    Dense,
    Displacement,
    ForwardMode,
    Implicit,
    Neumann,
    Regularised,
    Unrolled,
)
from lightning_metaopt.objectives import FinalLoss, MirrorBound, Objective, ValidationLoss

# The closed forms of MetaMD's indirect gradient, with the divergence as objective: dE/dM = factor * mean of Delta Delta^T.
FORMS = [("direct", -1, 0.5), ("indirect", -1, -1.0), ("indirect", 1, 1.0), ("both", -1, -0.5), ("both", 1, 1.5)]


@pytest.mark.parametrize(("terms", "sign", "factor"), FORMS)
@pytest.mark.parametrize("solver", [Dense(), ConjugateGradient(tolerance=1e-12), Neumann(terms=300), Neumann(300, alpha=0.3)])
def test_the_forms_of_metamd_in_closed_form(terms, sign, factor, solver):
    rule, episode = setting()
    estimate = Implicit(5, Displacement(), solver, terms, sign)(rule, episode, MirrorBound())
    delta = moved(rule, episode, 5)
    expected = factor * (delta.unsqueeze(2) * delta.unsqueeze(1)).mean(0)
    close(estimate.grads["entries"], expected, 1e-9)
    torch.testing.assert_close(estimate.loss, rule.divergence(rule.layout.unflatten(delta)).mean().detach())


def test_the_regularisers_belong_to_the_direct_term():
    rule, episode = setting()
    bound, plain = MirrorBound(k=0.7, gamma=0.3), MirrorBound()
    extra = {terms: Implicit(3, terms=terms)(rule, episode, bound).grads["entries"] for terms in ("both", "direct", "indirect")}
    without = {terms: Implicit(3, terms=terms)(rule, episode, plain).grads["entries"] for terms in extra}
    value = 0.7 / rule.smallest_eigenvalue() + 0.3 * rule.distance_from_identity()
    (own,) = torch.autograd.grad(value, [rule.entries])
    close(extra["both"] - without["both"], own, 1e-9)
    close(extra["direct"] - without["direct"], own, 1e-9)
    assert torch.equal(extra["indirect"], without["indirect"])


class ToTarget(Objective):
    """Depends on the meta-parameters directly, too."""

    def __call__(self, rule, start, end, losses):
        return ValidationLoss()(rule, start, end, losses) + 0.1 * rule.entries.square().sum()


@pytest.mark.parametrize("solver", [Dense(), ConjugateGradient(tolerance=1e-12), Neumann(terms=400)])
def test_exact_for_regularised_problems_against_the_closed_form(solver):
    rule, episode = setting(lr=0.3)
    weight, task = 0.5, episode.task
    implicit = Implicit(400, Regularised(weight), solver)
    estimate = implicit(rule, episode, ToTarget())
    origin = rule.layout.flatten(episode.params)
    # theta* = (Q + wM)^{-1} (b + wM theta_0), differentiated by autograd
    held = weight * rule.matrix()
    right = task.data["b"] + origin @ held
    solution = torch.linalg.solve(task.data["q"] + held, right.unsqueeze(2)).squeeze(2)
    value = (solution - task.data["target"]).square().sum(1).mean() + 0.1 * rule.entries.square().sum()
    close(estimate.grads["entries"], torch.autograd.grad(value, [rule.entries])[0], 1e-7)
    torch.testing.assert_close(estimate.loss, value.detach())
    assert estimate.info["stationarity"] < 1e-8
    assert estimate.info["residual"] < 1e-7
    assert "heuristic" not in implicit.exact_of


def test_exact_for_regularised_networks_against_a_long_unroll():
    # The same inner loop, through all of its steps: what the implicit gradient is to give without them.
    rule = lmo.rules.KroneckerMirror(NETS.shapes, lr=0.2, momentum=0.7, norm=1.0, seed=1).double()
    task = NETS.draw(0, 2)
    task.batch = lambda step: {"x": task.data["x"], "y": task.data["y"]}  # all rows at each step
    episode, stationarity = start(rule, task), Regularised(0.5)
    held = Episode(**{**vars(episode), "task": stationarity.task(rule, episode)})
    found = Implicit(300, stationarity, ConjugateGradient(tolerance=1e-12))(rule, episode, FinalLoss())

    class Loss(Objective):  # of the problem without its regulariser, for the unroll
        def __call__(self, rule, start, end, losses):
            return task.loss(end.params, dict(end.buffers), task.batch(0))

    expected = Unrolled(300)(rule, held, Loss())
    assert found.info["stationarity"] < 1e-6
    torch.testing.assert_close(found.loss, expected.loss)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert max(float(grad.abs().max()) for grad in expected.grads.values()) > 1e-3


def test_how_far_loop_and_solver_have_come():
    """The worst problem's gradient of F where the loop ends, and what the solver leaves of the slope, relative to it."""
    rule, episode = setting(lr=0.3)
    data, origin, weight = episode.task.data, rule.layout.flatten(episode.params), 0.5
    found = Implicit(3, Regularised(weight), Neumann(2, alpha=0.1))(rule, episode, ToTarget()).info
    matrix = rule.matrix().detach()
    curvature = data["q"] + weight * matrix

    def gradient(x):
        return torch.einsum("bij,bj->bi", curvature, x) - data["b"] - weight * origin @ matrix

    x = origin
    for _ in range(3):
        x = x - 0.3 * torch.linalg.solve(matrix, gradient(x).unsqueeze(2)).squeeze(2)
    assert found["stationarity"] == pytest.approx(float(gradient(x).norm(dim=1).max()), rel=1e-9)
    left = (2 * (x - data["target"])).unsqueeze(2)
    for _ in range(3):  # of the Neumann series, each term takes (I - alpha H) of what was left
        left = left - 0.1 * curvature @ left
    share = left.squeeze(2).norm(dim=1) / (2 * (x - data["target"])).norm(dim=1)
    assert found["residual"] == pytest.approx(float(share.max()), rel=1e-9)
    assert float(share.max()) > 1.1 * float(share.min())


def test_the_condition_is_that_of_the_batch_at_hand_and_leaves_buffers_alone():
    rule = lmo.rules.KroneckerMirror(NETS.shapes, lr=0.2, norm=1.0, seed=1).double()
    episode = unroll(rule, start(rule, NETS.draw(0, 2)), 3)[0]
    kept = {name: leaf.clone() for name, leaf in episode.buffers.items()}
    found = Regularised(0.5)(rule, episode)
    assert kept
    assert all(torch.equal(episode.buffers[name], leaf) for name, leaf in kept.items())
    difference = {name: leaf - episode.origin[name] for name, leaf in episode.params.items()}
    plain = [episode.task.loss(episode.params, dict(kept), episode.task.batch(step)) for step in (3, 0)]
    torch.testing.assert_close(found, plain[0] + 0.5 * rule.divergence(difference))
    assert not torch.allclose(plain[0], plain[1])


def test_neumann_needs_the_factor_alpha_and_an_alpha_that_is_small_enough():
    diagonal = torch.tensor([[0.5, 3.0], [1.0, 20.0]], dtype=torch.float64)

    def product(tree):
        return {"w": diagonal * tree["w"]}

    vector = {"w": torch.ones(2, 2, dtype=torch.float64)}
    torch.testing.assert_close(Neumann(2000)(product, vector)["w"], 1 / diagonal)
    twenty = Neumann(20, alpha=0.05)(product, vector)["w"]
    torch.testing.assert_close(twenty, (1 - (1 - 0.05 * diagonal) ** 21) / diagonal)
    with pytest.raises(FloatingPointError, match="Leave alpha out"):
        Neumann(20, alpha=0.2)(product, vector)


def test_conjugate_gradient_stops_problem_by_problem():
    matrices = torch.stack([spd(seed=1), torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    vector = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calls = []

    def product(tree):
        calls.append(1)
        return {"w": torch.einsum("bij,bj->bi", matrices, tree["w"])}

    found = ConjugateGradient(50, tolerance=1e-10)(product, {"w": vector})["w"]
    torch.testing.assert_close(found[:2], torch.linalg.solve(matrices[:2], vector[:2].unsqueeze(2)).squeeze(2))
    assert torch.equal(found[2], torch.zeros(4, dtype=torch.float64)), "negative curvature ends the search"
    assert len(calls) <= 6
    zero = ConjugateGradient()(product, {"w": torch.zeros(3, 4, dtype=torch.float64)})["w"]
    assert torch.equal(zero, torch.zeros_like(zero))


def test_the_dense_solver_refuses_many_coordinates():
    with pytest.raises(ValueError, match=r"30 coordinates is refused \(largest=20\): take ConjugateGradient"):
        Dense(largest=20)(lambda tree: tree, {"w": torch.ones(2, 30)})


def test_forward_mode_through_mirror_descent_is_reverse_mode():
    objective = MirrorBound(k=0.1, gamma=0.2)
    for made in (lmo.rules.KroneckerMirror(NETS.shapes, lr=0.2, momentum=0.6, norm=1.0), lmo.rules.DiagonalMirror(NETS.shapes)):
        rule = made.double()
        episode = start(rule, NETS.draw(0, 2))
        forward, reverse = ForwardMode(4)(rule, episode, objective), Unrolled(4)(rule, episode, objective)
        for name, grad in reverse.grads.items():
            torch.testing.assert_close(forward.grads[name], grad, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_refused():
    rule, episode = setting()
    for options, message in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"terms": "all"}, "terms must be"),
        ({"sign": 0}, "sign must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Implicit(**options)
    with pytest.raises(ValueError, match="weight must be positive"):
        Regularised(0.0)
    with pytest.raises(ValueError, match="alpha positive"):
        Neumann(alpha=-1.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ConjugateGradient(0)
    plain = lmo.rules.GradientDescent().double()
    with pytest.raises(TypeError, match="Implicit needs a rule with a Bregman divergence, such as .*; GradientDescent has none"):
        Implicit(1)(plain, start(plain, episode.task), FinalLoss())
    lost = Episode(**{**vars(episode), "origin": {}})
    for stationarity in (Displacement(), Regularised()):
        with pytest.raises(ValueError, match="does not know where it began"):
            Implicit(1, stationarity)(rule, lost, FinalLoss())


def test_it_says_what_it_is():
    assert (
        Implicit(3).exact_of == "the objective at the end of 3 steps, by the inverse Hessian of the rule's matrix M (a heuristic)"
    )
    assert "sign of its indirect term turned round" in Implicit(3, Regularised(), sign=1).exact_of
    assert Implicit(3, terms="direct").exact_of.startswith("the direct term of ")
    assert Implicit(3, Regularised(), Neumann(5, alpha=0.1)).gradient_evaluations == 3 + 1 + 1 + 10
    assert Implicit(3, Displacement()).gradient_evaluations == 4


def test_an_inner_loop_that_diverges_is_caught_by_the_learner():
    rule = lmo.rules.DiagonalMirror(Ridges.shapes, lr=1e150, metric=1.0).double()
    learner = lmo.MetaLearner(rule, Ridges(), Implicit(4), MirrorBound(), tasks=2, steps_per_epoch=2, val_tasks=0)
    before = {name: value.detach().clone() for name, value in rule.named_parameters()}
    with pytest.warns(UserWarning, match="the meta-gradient is not finite: restored"):
        lmo.MetaLoop(max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False).fit(learner)
    assert learner.best.restores == 2
    assert all(torch.equal(value, before[name]) for name, value in rule.named_parameters())
