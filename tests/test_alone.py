"""A problem that is alone runs without the axis of problems under element-wise rules: the same numbers as with it."""

import pytest
import torch
from contracts import RULES
from contracts_tasks import TASKS

import lightning_metaopt as lmo
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.models import MLP
from lightning_metaopt.objectives import MeanLoss
from lightning_metaopt.task import Task
from lightning_metaopt.tasks import Supervised


def family():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    return Supervised(MLP([3, 4, 2], "tanh").double(), inputs, torch.arange(24) % 2, batch_size=8)


def rules():
    shapes = family().shapes
    return [
        lmo.rules.GradientDescent(lr=0.1),
        lmo.rules.HeavyBall(lr=0.1, nesterov=True),
        lmo.rules.RMSprop(lr=0.01),
        lmo.rules.DCOGradient(shapes, scale=3.0),
    ]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("order", ["none", "first", "second"])
def test_without_the_axis_the_numbers_are_the_same(index, order, monkeypatch):
    rule = rules()[index].double()
    episode = start(rule, family().draw(seed=1, size=1))
    calls = []
    plain = type(episode.task).loss_alone
    monkeypatch.setattr(type(episode.task), "loss_alone", lambda *args: calls.append(1) or plain(*args))
    assert rule.elementwise
    end, losses = unroll(rule, episode, 3, order=order)
    assert len(calls) == 3
    found = lmo.Unrolled(3, first_order=order == "first")(rule, episode, MeanLoss()).grads
    calls.clear()
    rule.elementwise = False
    other_end, other_losses = unroll(rule, episode, 3, order=order)
    expected = lmo.Unrolled(3, first_order=order == "first")(rule, episode, MeanLoss()).grads
    assert not calls
    torch.testing.assert_close(losses, other_losses, rtol=1e-12, atol=0)
    for name, leaf in other_end.params.items():
        torch.testing.assert_close(end.params[name], leaf, rtol=1e-12, atol=1e-14)
    for slot, tree in other_end.state.items():
        for name, leaf in tree.items():
            torch.testing.assert_close(end.state[slot][name], leaf, rtol=1e-12, atol=1e-14)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_rules_that_couple_coordinates_keep_the_axis(normalize):
    rule = lmo.rules.DCOGradient({"w": (2,)}, normalize=normalize, constraint=None if normalize else lmo.rules.Simplex())
    assert not rule.elementwise
    assert not lmo.rules.DCOMomentum({"w": (2,)}).elementwise  # its state counts problems
    assert not lmo.rules.Adam().elementwise


@pytest.mark.parametrize("row", [row for row in RULES if row.rule().elementwise], ids=lambda row: row.name)
def test_a_rule_that_calls_itself_elementwise_is(row):
    rule, shapes = row.rule(), row.family.shapes
    params = {name: torch.randn(1, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    state = rule.init(params)
    updates, after = rule(grads, state, params)

    def bare(tree):
        return {name: leaf.squeeze(0) for name, leaf in tree.items()}

    bare_updates, bare_after = rule(bare(grads), {slot: bare(tree) for slot, tree in state.items()}, bare(params))
    for name, leaf in updates.items():
        assert torch.equal(bare_updates[name], leaf.squeeze(0))
    for slot, tree in after.items():
        for name, leaf in tree.items():
            assert torch.equal(bare_after[slot][name], leaf.squeeze(0))


@pytest.mark.parametrize("row", TASKS, ids=lambda row: row.name)
def test_every_task_has_the_same_loss_with_and_without_the_axis(row):
    task = row.make().draw(seed=0, size=1)
    params, buffers = task.init(torch.Generator().manual_seed(0))
    bare = {name: leaf.squeeze(0) for name, leaf in params.items()}
    copies = [{name: leaf.clone() for name, leaf in buffers.items()} for _ in range(2)]
    alone, loss = task.loss_alone(bare, copies[0], task.batch(2)), task.loss(params, copies[1], task.batch(2))
    torch.testing.assert_close(alone, loss[0], rtol=1e-12, atol=0)


def test_the_default_for_a_task_is_its_loss():
    task = lmo.tasks.LeastSquares(dim=3, rows=4, start_std=1.0).draw(seed=0, size=1)
    params, buffers = task.init(torch.Generator())
    alone = Task.loss_alone(task, {name: leaf.squeeze(0) for name, leaf in params.items()}, buffers, task.batch(0))
    assert alone.shape == ()
    assert torch.equal(alone, task.loss(params, buffers, task.batch(0))[0])
