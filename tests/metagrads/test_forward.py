import io

import pytest
import torch
from contracts import NETS, QUADRATICS, RULES, SmallNetTask
from oracles import finite_differences, values_of
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import lightning_metaopt as lmo
from lightning_metaopt import objectives, tasks
from lightning_metaopt.episode import Episode, start, step, unroll
from lightning_metaopt.metagrads import ForwardMode, Unrolled
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import tree_map


def rule_and_episode(size=3, seed=0):
    rule = lmo.rules.HeavyBall(lr=0.05, momentum=0.7).double()
    return rule, start(rule, NETS.draw(seed, size))


def exact(found, expected, tolerance=1e-12):
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


@pytest.mark.parametrize("row", [row for row in RULES if row.few], ids=lambda row: row.name)
@pytest.mark.parametrize("objective", ["final", "sum", "mean", "log", "validation"])
def test_equals_reverse_mode(row, objective):
    rule = row.rule()
    episode = start(rule, row.family.draw(seed=0, size=2))
    objective = objectives.resolve_objective(objective)
    forward, reverse = ForwardMode(4)(rule, episode, objective), Unrolled(4)(rule, episode, objective)
    exact(forward.grads, reverse.grads)
    torch.testing.assert_close(forward.loss, reverse.loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "layers", [(nn.ReLU(),), (nn.Tanh(), nn.BatchNorm1d(5)), (nn.GELU(), nn.LayerNorm(5)), (nn.SiLU(), nn.Dropout(0.4))]
)
def test_equals_reverse_mode_on_networks(layers):
    inputs = torch.randn(24, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)).double()
    family = tasks.Supervised(net, inputs, torch.arange(24) % 3, batch_size=8)
    rule = lmo.rules.Adam(lr=0.05, beta1=0.8, beta2=0.9).double()
    episode = start(rule, family.draw(seed=0, size=2))
    forward = ForwardMode(4)(rule, episode, objectives.MeanLoss())
    exact(forward.grads, Unrolled(4)(rule, episode, objectives.MeanLoss()).grads, 1e-11)


class Robust(SmallNetTask):
    """Its loss's gradient has no forward derivative in PyTorch."""

    def loss(self, params, buffers, batch):
        hidden = torch.tanh(batch["x"] @ params["layers.0.weight"].mT + params["layers.0.bias"].unsqueeze(1))
        found = (hidden * params["values"].unsqueeze(1)).sum(2) * params["gain"].unsqueeze(1)
        return F.huber_loss(found, batch["y"], reduction="none", delta=0.7).mean(1)


def gradient_with_tangents(task, params):
    with forward_ad.dual_level():
        dual = tree_map(lambda leaf: forward_ad.make_dual(leaf, torch.ones_like(leaf)).requires_grad_(), params)
        return torch.autograd.grad(task.loss(dual, {}, task.batch(0)).sum(), list(dual.values()))


def test_a_task_needs_no_forward_derivatives():
    rule = lmo.rules.HeavyBall(lr=0.05, momentum=0.7).double()
    episode = start(rule, Robust(NETS.draw(0, 2).data))
    with pytest.raises(NotImplementedError, match="huber_loss_backward"):
        gradient_with_tangents(episode.task, episode.params)
    forward = ForwardMode(3)(rule, episode, objectives.MeanLoss())
    exact(forward.grads, Unrolled(3)(rule, episode, objectives.MeanLoss()).grads, 1e-11)


def reverse_through_all(rule, episode, windows, steps, objective):
    """The gradient of the last window's objective through all windows, by one graph."""
    begin = unroll(rule, episode, steps * (windows - 1), order="second")[0]
    end, losses = unroll(rule, begin, steps, order="second")
    value = objective(rule, begin, end, losses).mean()
    found = torch.autograd.grad(value, list(rule.parameters()))
    return dict(zip([name for name, _ in rule.named_parameters()], found, strict=True))


def test_short_windows_see_the_whole_trajectory():
    rule, episode = rule_and_episode()
    how, current = ForwardMode(2), episode
    for window in range(1, 6):
        estimate = how(rule, current, objectives.MeanLoss())
        exact(estimate.grads, reverse_through_all(rule, episode, window, 2, objectives.MeanLoss()), 1e-11)
        current = estimate.episode
    truncated = Unrolled(2)(rule, current.select(slice(None)), objectives.MeanLoss())
    again = how(rule, current, objectives.MeanLoss())
    assert not torch.allclose(truncated.grads["log_lr"], again.grads["log_lr"], rtol=0.05)
    dropped = ForwardMode(2, carry=False)(rule, current, objectives.MeanLoss())
    exact(dropped.grads, truncated.grads)


def test_select_join_and_checkpoints_carry_the_tangents():
    rule, episode = rule_and_episode(size=3)
    how = ForwardMode(2)
    episode = how(rule, episode, objectives.FinalLoss()).episode
    assert {name: tuple(leaf.shape) for name, leaf in episode.history["tangents/params"].items()} == {
        "layers.0.weight": (3, 2, 3, 2),
        "layers.0.bias": (3, 2, 3),
        "values": (3, 2, 3),
        "gain": (3, 2),
    }
    expected = how(rule, episode, objectives.FinalLoss()).grads
    parts = [episode.select(slice(0, 1)), episode.select(slice(1, 3))]
    exact(how(rule, Episode.join(parts), objectives.FinalLoss()).grads, expected)
    alone = [how(rule, part, objectives.FinalLoss()).grads for part in parts]
    exact(tree_map(lambda a, b: (a + 2 * b) / 3, *alone), expected)
    file = io.BytesIO()
    torch.save(episode.state_dict(), file)
    file.seek(0)
    again = Episode.from_state_dict(torch.load(file, weights_only=True), NETS.draw(0, 3))
    exact(how(rule, again, objectives.FinalLoss()).grads, expected, 0.0)


def test_other_entries_of_the_history_are_kept():
    rule, episode = rule_and_episode()
    noted = {"notes": {"w": torch.ones(3, 1)}}
    for carry in (True, False):
        estimate = ForwardMode(1, carry=carry)(rule, Episode(**{**vars(episode), "history": noted}), objectives.FinalLoss())
        assert torch.equal(estimate.episode.history["notes"]["w"], noted["notes"]["w"])
        assert (len(estimate.episode.history) > 1) == carry


def test_when_phi_moves_it_is_the_derivative_of_a_common_shift():
    rule, episode = rule_and_episode()
    how, shift = ForwardMode(3), {"log_lr": 0.3, "momentum_logit": -0.4}
    before = values_of(rule)
    middle = how(rule, episode, objectives.FinalLoss()).episode
    with torch.no_grad():
        for name, value in rule.named_parameters():
            value.add_(shift[name])
    estimate = how(rule, middle, objectives.FinalLoss())

    def run(moved):
        first = unroll(rule, episode, 3, moved)[0]
        end, losses = unroll(rule, first, 3, {name: value + shift[name] for name, value in moved.items()})
        return objectives.FinalLoss()(rule, first, end, losses).mean().detach()

    exact(estimate.grads, finite_differences(run, before), 1e-8)


def test_too_large_is_refused_before_anything_is_computed():
    rule = lmo.rules.DCOMomentum(NETS.shapes, scale=3.0).double()
    task = NETS.draw(0, 5)
    episode = start(rule, task)
    # K = 2 * 13 meta-parameters; n = 5 problems * (13 iterates + 13 averages + 4 marks of a fresh start); 8 bytes each
    size = 26 * 5 * (13 + 13 + 4) * 8
    assert ForwardMode(1, max_bytes=size)(rule, episode, objectives.FinalLoss()).info["tangent_bytes"] == size
    task.loss = None  # would fail if it was called
    with pytest.raises(ValueError, match=rf"K = 26 .* n = 150 .* {size:,} bytes, .* max_bytes = {size - 1:,}. Use Unrolled"):
        ForwardMode(1, max_bytes=size - 1)(rule, episode, objectives.FinalLoss())


def test_tangents_that_do_not_belong_are_refused():
    rule, episode = rule_and_episode()
    after = ForwardMode(1)(rule, episode, objectives.FinalLoss()).episode
    other = lmo.rules.Adam().double()
    strange = Episode(**{**vars(start(other, after.task)), "step": 1, "history": after.history})
    with pytest.raises(ValueError, match="tangents of another rule"):
        ForwardMode(1)(other, strange, objectives.FinalLoss())
    lost = step(rule, episode)[0]
    with pytest.raises(ValueError, match="1 steps without its tangents.*carry=False"):
        ForwardMode(1)(rule, lost, objectives.FinalLoss())
    ForwardMode(1, carry=False)(rule, lost, objectives.FinalLoss())


class NoForward(Rule):
    """Uses an operation without forward derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    @property
    def config(self):
        return {}

    def forward(self, grads, state, params, loss=None):
        def far(leaf):
            return torch.cdist(leaf.flatten(1) * self.rate, torch.zeros(1, leaf[0].numel(), dtype=leaf.dtype), p=3.0)

        return {name: -leaf * far(leaf).view(-1, *[1] * (leaf.dim() - 1)) for name, leaf in grads.items()}, state


def test_an_operation_without_forward_derivative_is_named():
    rule = NoForward()
    episode = start(rule, QUADRATICS.draw(0, 2))
    Unrolled(1, first_order=True)(rule, episode, objectives.FinalLoss())  # reverse mode can
    with pytest.raises(NotImplementedError, match=r"_cdist_forward .* Use Unrolled"):
        ForwardMode(2)(rule, episode, objectives.FinalLoss())


class ByLoss(Rule):
    """A step that grows with the loss: the loss's tangent must reach the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.02, dtype=torch.float64))

    @property
    def config(self):
        return {}

    def forward(self, grads, state, params, loss=None):
        return {name: -self.rate * leaf * loss.sqrt().view(-1, *[1] * (leaf.dim() - 1)) for name, leaf in grads.items()}, state


def test_a_rule_that_uses_the_loss():
    rule = ByLoss()
    episode = start(rule, NETS.draw(0, 2))
    exact(ForwardMode(5)(rule, episode, objectives.MeanLoss()).grads, Unrolled(5)(rule, episode, objectives.MeanLoss()).grads)


def test_cost_options_and_claim():
    rule, episode = rule_and_episode()
    how = ForwardMode(4)
    how(rule, episode, objectives.FinalLoss())
    assert how.gradient_evaluations == 4 + 1 + 2 * 3 * 4
    assert "since the episode began" in how.exact_of
    assert "these steps" in ForwardMode(4, carry=False).exact_of
    with pytest.raises(ValueError, match="at least 1"):
        ForwardMode(0)
