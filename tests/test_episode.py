import pytest
import torch
from contracts import NETS
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.episode import Episode, start, step, unroll
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import Task
from lightning_metaopt.tree import tree_map


def by_hand(task, params, steps, rate, mu):
    """Momentum as one would write it down, with everything in the graph."""
    velocity = tree_map(torch.zeros_like, params)
    losses = []
    for index in range(steps):
        loss = task.loss(params, {"seen": torch.zeros(task.size, 1)}, task.batch(index))
        grads = torch.autograd.grad(loss.sum(), list(params.values()), create_graph=True)
        velocity = {name: mu * velocity[name] + grad for name, grad in zip(params, grads, strict=True)}
        params = {name: params[name] - rate * velocity[name] for name in params}
        losses.append(loss)
    return params, torch.stack(losses)


def test_unroll_is_the_loop_written_by_hand():
    rule, task = lmo.rules.HeavyBall(lr=0.05, momentum=0.7).double(), NETS.draw(0, 3)
    episode = start(rule, task)
    log_lr, logit = rule.log_lr.detach().requires_grad_(), rule.momentum_logit.detach().requires_grad_()
    begin = tree_map(lambda leaf: leaf.clone().requires_grad_(), episode.params)
    params, losses = by_hand(task, begin, 6, log_lr.exp(), logit.sigmoid())
    end, found = unroll(rule, episode, 6, order="second")
    torch.testing.assert_close(found, losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(end.params, params, rtol=1e-13, atol=1e-15)
    weights = torch.rand(6, 3, dtype=torch.float64)
    expected = torch.autograd.grad((weights * losses).sum() + params["values"].sum(), [log_lr, logit])
    grads = torch.autograd.grad((weights * found).sum() + end.params["values"].sum(), [rule.log_lr, rule.momentum_logit])
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("order", ["none", "first", "second", "forward"])
def test_every_order_computes_the_same_values(order):
    rule = lmo.rules.Adam(lr=0.05).double()
    episode = start(rule, NETS.draw(0, 2))
    end, losses = unroll(rule, episode, 4, order=order)
    plain, expected = unroll(rule, episode, 4)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(end.params, plain.params, rtol=1e-14, atol=0)
    graph = order in ("first", "second")
    assert all(leaf.requires_grad == graph for leaf in end.params.values())
    assert losses[1:].requires_grad == graph
    assert not any(leaf.requires_grad for leaf in end.buffers.values())
    assert not any(leaf.requires_grad for leaf in end.detach().params.values())


def test_grad_mode_of_the_caller_does_not_matter():
    rule = lmo.rules.GradientDescent().double()
    episode = start(rule, NETS.draw(0, 2))
    with torch.no_grad():
        inside = unroll(rule, episode, 2)[0]
        learned = lmo.Unrolled(2)(rule, episode, lmo.objectives.FinalLoss())
    assert not any(leaf.requires_grad for leaf in unroll(rule, episode, 2)[0].params.values())
    assert all(torch.equal(leaf, unroll(rule, episode, 2)[0].params[name]) for name, leaf in inside.params.items())
    again = lmo.Unrolled(2)(rule, episode, lmo.objectives.FinalLoss())
    assert learned.grads["log_lr"] != 0
    assert torch.equal(learned.grads["log_lr"], again.grads["log_lr"])


def test_steps_add_up_and_zero_steps_are_allowed():
    rule = lmo.rules.HeavyBall().double()
    episode = start(rule, NETS.draw(0, 2))
    one, first = unroll(rule, episode, 2)
    two, second = unroll(rule, one, 3)
    all_at_once, losses = unroll(rule, episode, 5)
    assert torch.equal(torch.cat([first, second]), losses)
    assert all(torch.equal(two.params[name], leaf) for name, leaf in all_at_once.params.items())
    assert (one.step, two.step) == (2, 5)
    assert two.origin is episode.origin
    still, none = unroll(rule, episode, 0)
    assert still.step == 0
    assert none.shape == (0, 2)


def test_steps_use_their_own_batches_and_copies_of_the_buffers():
    rule = lmo.rules.GradientDescent().double()
    episode = start(rule, NETS.draw(0, 2))
    end, losses = unroll(rule, episode, 3)
    assert end.buffers["seen"].tolist() == [[3.0], [3.0]]
    assert episode.buffers["seen"].tolist() == [[0.0], [0.0]]
    after, loss = step(rule, episode)
    assert torch.equal(loss, losses[0])
    fresh = {"seen": torch.zeros(2, 1)}
    assert torch.equal(losses[1], episode.task.loss(after.params, fresh, episode.task.batch(1)))
    assert not torch.equal(losses[1], episode.task.loss(after.params, fresh, episode.task.batch(0)))


def test_phi_takes_the_place_of_the_rules_own():
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = start(rule, NETS.draw(0, 2))
    other = lmo.rules.GradientDescent(lr=0.3).double()
    moved = unroll(rule, episode, 3, {"log_lr": other.log_lr})[0]
    assert all(torch.equal(leaf, unroll(other, episode, 3)[0].params[name]) for name, leaf in moved.params.items())
    assert rule.log_lr.exp().item() == pytest.approx(0.1)


class Partial(Task):
    """Its loss does not touch one of the parameters; the other enters linearly."""

    def init(self, generator):
        return {"used": self.data["used"], "idle": torch.ones(self.size, 2)}, {}

    def loss(self, params, buffers, batch):
        return (3 * params["used"]).sum(1)


@pytest.mark.parametrize("how", [lmo.Unrolled(3), lmo.Unrolled(3, first_order=True), lmo.ForwardMode(3)])
def test_parameters_that_the_loss_does_not_touch(how):
    rule = lmo.rules.HeavyBall(lr=0.1)
    estimate = how(rule, start(rule, Partial({"used": torch.zeros(2, 3)})), lmo.objectives.FinalLoss())
    assert torch.equal(estimate.episode.params["idle"], torch.ones(2, 2))
    # The loss is -3 * 9 * lr * (sum of velocities' weights), so d loss / d log lr is the loss itself.
    torch.testing.assert_close(estimate.grads["log_lr"], estimate.loss)


class Shifting(Task):
    """A task that changes its buffers by what depends on the parameters."""

    def init(self, generator):
        return {"theta": self.data["theta"]}, {"mean": torch.zeros_like(self.data["theta"])}

    def loss(self, params, buffers, batch):
        loss = (params["theta"] - buffers["mean"]).square().sum(1)
        buffers["mean"].mul_(0.5).add_(0.5 * params["theta"])
        return loss


@pytest.mark.parametrize("how", [lmo.Unrolled(4, checkpoint=2), lmo.ForwardMode(4)])
def test_buffers_are_constants_in_every_order(how):
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = start(rule, Shifting({"theta": torch.randn(2, 3, dtype=torch.float64)}))
    expected = lmo.Unrolled(4)(rule, episode, lmo.objectives.MeanLoss())
    found = how(rule, episode, lmo.objectives.MeanLoss())
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=0)
    assert not expected.episode.buffers["mean"].requires_grad


def test_first_order_losses_have_their_exact_derivative():
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = start(rule, NETS.draw(0, 2))
    params = tree_map(lambda leaf: leaf.clone().requires_grad_(), episode.params)
    begin = Episode(**{**vars(episode), "params": params})
    losses = step(rule, begin, "first")[1]
    found = torch.autograd.grad(losses.sum(), list(params.values()))
    value = episode.task.loss(params, {"seen": torch.zeros(2, 1)}, episode.task.batch(0))
    assert torch.equal(value, losses)
    torch.testing.assert_close(found, torch.autograd.grad(value.sum(), list(params.values())), rtol=1e-14, atol=0)


class Learned(Rule):
    """A rule with a learned initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    @property
    def config(self):
        return {}

    def init(self, params):
        return {"memory": tree_map(self.first.expand_as, params)}

    def forward(self, grads, state, params, loss=None):
        return {name: -0.1 * (grad + state["memory"][name]) for name, grad in grads.items()}, state


def test_start_can_take_phi_and_a_generator():
    rule = Learned()
    episode = start(rule, NETS.draw(0, 1), phi={"first": torch.tensor(2.0, dtype=torch.float64)})
    assert (episode.state["memory"]["values"] == 2).all()
    assert (start(rule, NETS.draw(0, 1)).state["memory"]["values"] == 0.5).all()
    end = unroll(rule, start(rule, NETS.draw(0, 1)), 1, order="second")[0]
    assert torch.autograd.grad(end.params["gain"].sum(), rule.first)[0].item() == pytest.approx(-0.1)


def test_join_and_resume_refuse_what_does_not_fit():
    rule = lmo.rules.HeavyBall().double()
    episode = start(rule, NETS.draw(0, 3))
    later = step(rule, episode)[0]
    with pytest.raises(ValueError, match=r"same step.*\[0, 1\]"):
        Episode.join([episode, later])
    with pytest.raises(ValueError, match=r"has 3 problems .* the task has 2.*seed and size"):
        Episode.from_state_dict(later.state_dict(), NETS.draw(0, 2))
    parts = [later.select(slice(0, 2)), later.select(slice(2, 3))]
    joined = Episode.join(parts)
    assert joined.size == 3
    assert joined.step == 1
    for name in ("params", "buffers", "origin"):
        assert all(torch.equal(getattr(joined, name)[key], leaf) for key, leaf in getattr(later, name).items())
    assert all(torch.equal(joined.state["momentum"][key], leaf) for key, leaf in later.state["momentum"].items())
    assert Episode.join([later]) is later
