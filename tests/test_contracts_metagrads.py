"""What every meta-gradient must fulfil; the table is in ``contracts_metagrads.py``."""

import copy
import inspect
import io

import pytest
import torch
from contracts import NETS
from contracts_metagrads import HEAVY_BALL, METAGRADS, MetaGradRow
from oracles import of_the_trajectory

import lightning_metaopt as lmo
from lightning_metaopt import metagrads
from lightning_metaopt.episode import Episode, start
from lightning_metaopt.metagrads import MetaGradient, surrogate_loss
from lightning_metaopt.objectives import MeanLoss, Objective, ValidationLoss
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import leaves, tree_map

every_metagrad = pytest.mark.parametrize("row", METAGRADS, ids=lambda row: row.name)


def setting(row: MetaGradRow, size: int = 4) -> tuple[Rule, MetaGradient, Episode, Episode]:
    """A rule, the meta-gradient, an episode's beginning, and the episode after ``row.begin`` estimates."""
    rule, how = row.rule().double(), row.make(row.steps)
    begin = episode = start(rule, NETS.draw(seed=0, size=size))
    for _ in range(row.begin):
        episode = how(rule, episode, MeanLoss()).episode
    return rule, how, begin, episode


def contents(episode: Episode) -> list[torch.Tensor]:
    return leaves([episode.params, episode.buffers, *episode.state.values(), episode.origin, *episode.history.values()])


class ByGeometry(Objective):
    """Depends on the meta-parameters directly, on where the window begins, and on the state it leaves."""

    def __call__(self, rule, start, end, losses):
        rate = rule.log_lr.exp() * rule.momentum_logit.sigmoid()
        travelled = sum((end.params[name] - start.params[name]).square().flatten(1).sum(1) for name in end.params if name != "gain")
        return rate * travelled + 0.01 * end.state["momentum"]["values"].square().sum(1) + losses[-1]


@every_metagrad
@pytest.mark.parametrize("objective", [MeanLoss(), ValidationLoss(), ByGeometry()], ids=lambda o: type(o).__name__)
def test_it_is_the_gradient_that_it_claims_to_be(row: MetaGradRow, objective: Objective):
    if row.rule is not HEAVY_BALL and isinstance(objective, ByGeometry):
        pytest.skip("needs a rule with momentum")
    rule, how, begin, episode = setting(row)
    estimate = how(rule, episode, objective)
    if row.whole:
        expected = of_the_trajectory(rule, begin, objective, row.steps, before=row.steps * row.begin)
    else:
        expected = row.reference(rule, episode, objective, row.steps)
    found, wanted = (torch.cat([tree[name].flatten() for name in expected]) for tree in (estimate.grads, expected))
    assert (found - wanted).norm() <= row.precision * wanted.norm()
    if "windows" not in row.name:
        end, losses = lmo.episode.unroll(rule, episode, row.steps)
        torch.testing.assert_close(estimate.loss, objective(rule, episode, end, losses).mean().detach())


@every_metagrad
def test_an_estimate_is_complete_and_free_of_graphs(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    estimate = how(rule, episode, MeanLoss())
    assert estimate.loss.shape == ()
    assert not estimate.loss.requires_grad
    assert {name: (grad.shape, grad.dtype) for name, grad in estimate.grads.items()} == {
        name: (value.shape, value.dtype) for name, value in rule.named_parameters()
    }
    assert not any(leaf.requires_grad for leaf in [*estimate.grads.values(), *contents(estimate.episode)])
    assert estimate.episode.step == episode.step + how.inner_steps == episode.step + row.steps
    assert all(len(leaf) == episode.size for leaf in contents(estimate.episode))
    assert all(isinstance(value, float) for value in estimate.info.values())
    assert how.exact_of
    assert type(how.gradient_evaluations) is int
    assert how.gradient_evaluations >= row.steps
    loss = surrogate_loss(rule, estimate)
    loss.backward()
    assert torch.equal(loss.detach(), estimate.loss)
    assert all(torch.allclose(value.grad, estimate.grads[name]) for name, value in rule.named_parameters())


@every_metagrad
def test_the_episode_that_goes_on_is_the_plain_unroll(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    found, expected = how(rule, episode, MeanLoss()).episode, lmo.episode.unroll(rule, episode, row.steps)[0]
    for one, two in [(found.params, expected.params), (found.buffers, expected.buffers), (found.origin, expected.origin)]:
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for slot, tree in expected.state.items():
        torch.testing.assert_close(found.state[slot], tree, rtol=1e-12, atol=1e-12)


@every_metagrad
def test_it_changes_neither_rule_nor_episode_and_repeats_itself(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    before, versions = copy.deepcopy(contents(episode)), [leaf._version for leaf in contents(episode)]
    phi, state = copy.deepcopy(rule.state_dict()), how.state_dict()
    first = how(rule, episode, MeanLoss())
    assert all(torch.equal(one, two) for one, two in zip(contents(episode), before, strict=True))
    assert [leaf._version for leaf in contents(episode)] == versions
    assert all(torch.equal(value, phi[name]) and value.grad is None for name, value in rule.named_parameters())
    how.load_state_dict(state)
    second = how(rule, episode, MeanLoss())
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in phi)


@every_metagrad
def test_a_batch_is_the_mean_over_its_problems(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    state = how.state_dict()
    together = how(rule, episode, MeanLoss())
    alone = []
    for index in range(episode.size):
        how.load_state_dict(state)
        alone.append(how(rule, episode.select(slice(index, index + 1)), MeanLoss()))
    torch.testing.assert_close(torch.stack([e.loss for e in alone]).mean(), together.loss, rtol=1e-12, atol=1e-12)
    mean = tree_map(lambda *parts: torch.stack(parts).mean(0), *[e.grads for e in alone])
    torch.testing.assert_close(mean, together.grads, rtol=1e-8, atol=1e-8)
    joined = Episode.join([e.episode for e in alone])
    for one, two in zip(contents(joined), contents(together.episode), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@every_metagrad
def test_resume_is_exact(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    file = io.BytesIO()
    torch.save({"episode": episode.state_dict(), "how": how.state_dict()}, file)
    straight = how(rule, episode, MeanLoss())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = row.make(row.steps)
    again.load_state_dict(saved["how"])
    resumed = again(rule, Episode.from_state_dict(saved["episode"], NETS.draw(seed=0, size=4)), MeanLoss())
    assert torch.equal(resumed.loss, straight.loss)
    assert all(torch.equal(resumed.grads[name], straight.grads[name]) for name in straight.grads)
    assert all(torch.equal(one, two) for one, two in zip(contents(resumed.episode), contents(straight.episode), strict=True))


@pytest.mark.parametrize("row", [row for row in METAGRADS if row.of_objective], ids=lambda row: row.name)
def test_an_objective_that_does_not_depend_on_phi_has_gradient_zero(row: MetaGradRow):
    rule, how, _, episode = setting(row)
    estimate = how(rule, episode, _Constant())
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in estimate.grads.values())


class _Constant(Objective):
    def __call__(self, rule, start, end, losses):
        return torch.zeros(end.size, dtype=torch.float64)


def test_every_public_meta_gradient_is_in_the_table():
    public = {getattr(metagrads, name) for name in metagrads.__all__}
    public = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, MetaGradient) and not inspect.isabstract(cls)}
    assert public == {type(row.make(row.steps)) for row in METAGRADS}
    assert all(getattr(cls, "__final__", False) for cls in public), "a meta-gradient is abstract or final"
    ours = {cls for cls in MetaGradient.__subclasses__() if cls.__module__.startswith("lightning_metaopt")}
    assert ours == public, "a meta-gradient that users cannot reach"
