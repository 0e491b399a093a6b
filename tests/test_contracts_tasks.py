"""What every task must fulfil; the table is in ``contracts_tasks.py``."""

import inspect

import pytest
import torch
from contracts_tasks import TASKS, TaskRow
from oracles import slope

import lightning_metaopt as lmo
from lightning_metaopt import tasks
from lightning_metaopt.task import Task, TaskFamily
from lightning_metaopt.tree import cat, select, tree_map

every_task = pytest.mark.parametrize("row", TASKS, ids=lambda row: row.name)


def flat(value) -> list[torch.Tensor]:
    """The tensors of a batch, whatever containers it is made of."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [leaf for part in parts for leaf in flat(part)]


def same(one, two) -> bool:
    return len(flat(one)) == len(flat(two)) and all(torch.equal(a, b) for a, b in zip(flat(one), flat(two), strict=True))


def setting(row: TaskRow, size: int = 3, seed: int = 0) -> tuple[Task, dict, dict]:
    task = row.make().draw(seed, size)
    params, buffers = task.init(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    params = tree_map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), params)
    return task, params, buffers


def losses(task: Task, params, buffers, step: int = 1) -> dict[str, torch.Tensor]:
    copies = [tree_map(torch.clone, buffers) for _ in range(2)]
    return {"loss": task.loss(params, copies[0], task.batch(step)), "val_loss": task.val_loss(params, copies[1])}


@every_task
def test_shapes_are_those_announced(row: TaskRow):
    task, params, buffers = setting(row)
    assert task.size == 3
    assert {name: tuple(leaf.shape[1:]) for name, leaf in params.items()} == dict(row.make().shapes)
    assert all(leaf.shape[0] == 3 for leaf in [*params.values(), *buffers.values()])
    assert all(leaf.is_floating_point() for leaf in params.values())
    for value in losses(task, params, buffers).values():
        assert value.shape == (3,)
        assert value.isfinite().all()
    assert task.preferred_chunk is None or task.preferred_chunk >= 1


@every_task
def test_a_problem_depends_on_its_own_slice_only(row: TaskRow):
    task, params, buffers = setting(row)
    params = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
    for value in losses(task, params, buffers).values():
        for index in range(3):
            grads = torch.autograd.grad(value[index], list(params.values()), retain_graph=True)
            size = torch.stack([grad.reshape(3, -1).norm(dim=1) for grad in grads]).sum(0)
            assert size[index] > 0
            assert (size[torch.arange(3) != index] == 0).all()


@every_task
def test_a_batch_is_a_loop_over_its_problems(row: TaskRow):
    task, params, buffers = setting(row)
    moved = tree_map(torch.clone, buffers)
    together = task.loss(params, moved, task.batch(1)), task.val_loss(params, tree_map(torch.clone, buffers))
    for index in range(3):
        part = slice(index, index + 1)
        alone, own = task.select(part), tree_map(torch.clone, select(buffers, part))
        assert alone.size == 1
        torch.testing.assert_close(alone.loss(select(params, part), own, alone.batch(1)), together[0][part])
        torch.testing.assert_close(own, select(moved, part))
        fresh = tree_map(torch.clone, select(buffers, part))
        torch.testing.assert_close(alone.val_loss(select(params, part), fresh), together[1][part])


@every_task
def test_select_and_join_are_inverse(row: TaskRow):
    task, params, buffers = setting(row)
    joined = type(task).join([task.select(slice(0, 1)), task.select(slice(1, 3))])
    assert joined.size == 3
    assert same(joined.data, task.data)
    assert same(joined.batch(1), task.batch(1))
    assert same(losses(joined, params, buffers), losses(task, params, buffers))
    other = row.make().draw(seed=5, size=2)  # tasks of one family join, whatever they were drawn with
    both = type(task).join([task, other])
    more, buffer = other.init(torch.Generator().manual_seed(1))
    found = both.loss(cat([params, more]), tree_map(torch.clone, cat([buffers, buffer])), both.batch(0))
    torch.testing.assert_close(found[3:], other.loss(more, tree_map(torch.clone, buffer), other.batch(0)))


@every_task
def test_the_same_seed_gives_the_same_problems(row: TaskRow):
    family = row.make()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = family.draw(seed=3, size=2)
    first = one.init(torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), state), "everything random comes from the generator"
    torch.manual_seed(8)
    two, other = row.make().draw(seed=3, size=2), family.draw(seed=4, size=2)
    assert same(one.data, two.data)
    assert not same(one.data, other.data)
    assert same(first, two.init(torch.Generator().manual_seed(4)))


@every_task
def test_nothing_random_happens_after_the_draw(row: TaskRow):
    task, params, buffers = setting(row)
    data = tree_map(torch.clone, task.data)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    late, first = task.batch(5), losses(task, params, buffers)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    task.batch(0)
    assert same(task.batch(5), late)
    assert same(losses(task, params, buffers), first)
    assert same(task.data, data)


@every_task
def test_arguments_stay_as_they_are_but_for_buffers(row: TaskRow):
    task, params, buffers = setting(row)
    before, kept = tree_map(torch.clone, params), tree_map(torch.clone, buffers)
    batch = task.batch(1)
    rows = [leaf.clone() for leaf in flat(batch)]
    task.loss(params, tree_map(torch.clone, buffers), batch)
    task.val_loss(params, tree_map(torch.clone, buffers))
    assert same(params, before)
    assert same(buffers, kept)
    assert all(torch.equal(one, two) for one, two in zip(flat(batch), rows, strict=True))


@every_task
def test_gradients_agree_with_finite_differences(row: TaskRow):
    task, params, buffers = setting(row)
    assert all(leaf.dtype == torch.float64 for leaf in params.values()), "rows of this table compute in float64"
    leaf = tree_map(lambda value: value.detach().requires_grad_(), params)
    for which, value in losses(task, leaf, buffers).items():
        grads = dict(zip(params, torch.autograd.grad(value.sum(), list(leaf.values())), strict=True))
        direction = tree_map(torch.randn_like, params)

        def along(t, which=which, direction=direction):
            return losses(task, {name: params[name] + t * direction[name] for name in params}, buffers)[which].sum()

        found = sum((grads[name] * direction[name]).sum() for name in params)
        size = sum((grads[name] * direction[name]).abs().sum() for name in params)
        assert abs(found - slope(along, row.wiggle)) <= row.precision * size


@every_task
def test_to_keeps_the_values(row: TaskRow):
    task, params, buffers = setting(row)
    moved = task.to("cpu")
    assert moved is not task
    assert same(moved.data, task.data)
    assert same(losses(moved, params, buffers), losses(task, params, buffers))
    away = task.to("meta")
    assert {leaf.device.type for leaf in [*away.data.values(), *away.shared.values()]} == {"meta"}
    assert {leaf.device.type for leaf in [*task.data.values(), *task.shared.values()]} == {"cpu"}


@every_task
def test_gradient_descent_on_it_can_be_differentiated(row: TaskRow):
    # End to end: the meta-gradient of a step size, against finite differences through the whole loop. Running statistics
    # are constants to it.
    family = row.make()
    rule = lmo.rules.GradientDescent(lr=1e-3).double()
    episode = lmo.episode.start(rule, family.draw(seed=0, size=2))
    estimate = lmo.Unrolled(steps=3)(rule, episode, lmo.objectives.ValidationLoss())

    def run(t):
        end = lmo.episode.unroll(rule, episode, 3, {"log_lr": rule.log_lr.detach() + t})[0]
        return end.task.val_loss(end.params, tree_map(torch.clone, estimate.episode.buffers)).mean()

    torch.testing.assert_close(estimate.grads["log_lr"], slope(run, row.wiggle).detach(), rtol=10 * row.precision, atol=1e-12)


def test_every_public_family_is_in_the_table():
    public = {getattr(tasks, name) for name in tasks.__all__}
    public = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, TaskFamily) and not inspect.isabstract(cls)}
    assert public <= {type(row.make()) for row in TASKS}
    assert all(getattr(cls, "__final__", False) for cls in public), "a family is abstract or final"
