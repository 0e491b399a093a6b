import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.models import MLP
from lightning_metaopt.tasks import Supervised
from lightning_metaopt.tasks.module import resolve_criterion

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(60, 3, generator=GENERATOR, dtype=torch.float64)
TARGETS = INPUTS.sin().sum(1, keepdim=True)


def family(*layers, **options):
    options = {"loss": "mse", "batch_size": 8, **options}
    return Supervised(nn.Sequential(*layers).double(), INPUTS, TARGETS, **options)


def losses_and_gradients(task, params, buffers, batch):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    loss = task.loss(leaves, buffers, batch)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))


def tiny(*middle, **options):
    return family(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 1), **options)


@pytest.mark.parametrize(
    ("make", "random"),
    [
        (tiny, False),
        (lambda: tiny(nn.BatchNorm1d(4)), False),
        (lambda: tiny(nn.Dropout(0.5)), True),
        (lambda: tiny(vmap=False), False),
    ],
    ids=["plain", "BatchNorm", "dropout", "vmap=False"],
)
def test_a_batch_of_problems_is_the_modules_trained_one_by_one(make, random):
    task = make().draw(seed=1, size=3)
    params, buffers = task.init(torch.Generator().manual_seed(2))
    batch = task.batch(4)
    after = {name: leaf.clone() for name, leaf in buffers.items()}
    loss, grads = losses_and_gradients(task, params, after, batch)
    for index in range(3):
        module = make().network.module.train()  # the slow twin: an ordinary module and backward()
        module.load_state_dict({name: leaf[index] for name, leaf in {**params, **buffers}.items()})
        with torch.random.fork_rng():
            if random:
                torch.manual_seed(int(batch["seed"][index]))
            expected = nn.functional.mse_loss(module(batch["inputs"][index]), batch["targets"][index])
        expected.backward()
        torch.testing.assert_close(loss[index], expected.detach())
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name][index], parameter.grad)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(after[name][index], buffer)


def test_unrolling_matches_higher():
    higher = pytest.importorskip("higher")
    task = tiny(nn.BatchNorm1d(4)).draw(seed=1, size=1)
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = lmo.episode.start(rule, task)
    estimate = lmo.Unrolled(steps=3)(rule, episode, lmo.objectives.FinalLoss())
    module = task.network.module.train()
    module.load_state_dict({name: leaf[0] for name, leaf in {**episode.params, **episode.buffers}.items()})
    rate = rule.log_lr.detach().clone().requires_grad_()
    with higher.innerloop_ctx(module, torch.optim.SGD(module.parameters(), 0.1), override={"lr": [rate.exp()]}) as (net, steps):

        def loss(step):
            batch = task.batch(step)
            return nn.functional.mse_loss(net(batch["inputs"][0]), batch["targets"][0])

        for step in range(3):
            steps.step(loss(step))
        final = loss(3)
    torch.testing.assert_close(estimate.loss, final.detach())
    torch.testing.assert_close(estimate.grads["log_lr"], torch.autograd.grad(final, rate)[0])


def test_one_problem_pays_nothing_for_the_batch(monkeypatch):
    task = tiny().draw(seed=0, size=2)
    params, buffers = task.init(torch.Generator())
    part = {name: leaf[:1] for name, leaf in params.items()}
    together = task.loss(params, buffers, task.batch(0))

    def refuse(*args, **kwargs):
        raise AssertionError("vmap")

    monkeypatch.setattr(torch, "vmap", refuse)
    torch.testing.assert_close(task.select(slice(0, 1)).loss(part, buffers, task.select(slice(0, 1)).batch(0)), together[:1])
    with pytest.raises(AssertionError, match="vmap"):
        task.loss(params, buffers, task.batch(0))


def test_dropout_depends_on_problem_and_step_only():
    family = tiny(nn.Dropout(0.5), shared_init=True)
    rule = lmo.rules.GradientDescent(lr=0.05).double()
    episode = lmo.episode.start(rule, family.draw(seed=0, size=2))
    losses = {}
    for name, options in {"plain": {}, "checkpoint": {"checkpoint": 2}, "one by one": {"chunk": 1}}.items():
        torch.manual_seed(len(name))
        losses[name] = lmo.Unrolled(steps=4, **options)(rule, episode, lmo.objectives.MeanLoss())
    assert episode.task.preferred_chunk == 1
    for name in ("checkpoint", "one by one"):
        torch.testing.assert_close(losses[name].loss, losses["plain"].loss)
        torch.testing.assert_close(losses[name].grads, losses["plain"].grads)
    seeds = torch.cat([episode.task.batch(step)["seed"] for step in range(50)])
    assert seeds.unique().numel() == 100
    assert seeds.min() >= 0
    # Validation is in evaluation mode: no masks.
    first, second = (episode.task.val_loss(episode.params, episode.buffers) for _ in range(2))
    assert first.equal(second)


def test_validation_uses_running_statistics_and_leaves_them_alone():
    task = tiny(nn.BatchNorm1d(4)).draw(seed=0, size=2)
    params, buffers = task.init(torch.Generator())
    before = {name: leaf.clone() for name, leaf in buffers.items()}
    values = task.val_loss(params, buffers)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0)
    moved = {**buffers, "1.running_mean": buffers["1.running_mean"] + 1}
    assert not torch.isclose(task.val_loss(params, moved), values).any()


def test_frozen_parts_stay_and_a_buffer_that_is_replaced_is_kept():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, inputs):
            self.count = self.count + 1
            return inputs

    for size in (1, 3):
        task = family(nn.Linear(3, 4).requires_grad_(False), Counter(), nn.Linear(4, 1)).draw(seed=0, size=size)
        episode = lmo.episode.start(lmo.rules.GradientDescent(), task)
        assert list(episode.params) == ["2.weight", "2.bias"]
        end, _ = lmo.episode.unroll(lmo.rules.GradientDescent(), episode, 5)
        assert end.buffers["1.count"].tolist() == [5.0] * size
        assert "frozen.0.weight" in task.to("cpu").shared


def test_problems_are_chunked_by_their_size():
    inputs, labels = torch.zeros(300, 784), torch.zeros(300, dtype=torch.long)
    small = Supervised(MLP([784, 32, 10]), inputs, labels, batch_size=64).draw(0, 4)
    many_samples = Supervised(MLP([784, 50, 10]), inputs, labels, batch_size=128).draw(0, 4)
    many_parameters = Supervised(MLP([784, 100, 100, 10]), inputs, labels, batch_size=16).draw(0, 4)
    assert (small.preferred_chunk, many_samples.preferred_chunk, many_parameters.preferred_chunk) == (None, 1, 1)
    assert tiny(vmap=False).draw(0, 4).preferred_chunk == 1
    rule = lmo.rules.GradientDescent()
    for task, expected in ((small, 4.0), (many_samples, 1.0)):
        estimate = lmo.Unrolled()(rule, lmo.episode.start(rule, task), lmo.objectives.FinalLoss())
        assert estimate.info["chunk"] == expected


def test_a_module_that_vmap_does_not_support_says_what_to_do():
    class Item(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * (1.0 if inputs.sum().item() > 0 else 2.0)

    task = family(Item(3, 1)).draw(seed=0, size=2)
    params, buffers = task.init(torch.Generator())
    with pytest.raises(RuntimeError) as error:
        task.loss(params, buffers, task.batch(0))
    assert any("vmap=False" in note for note in error.value.__notes__)
    other = family(Item(3, 1), vmap=False).draw(seed=0, size=2)
    assert other.loss(params, buffers, other.batch(0)).shape == (2,)


def test_losses_have_names():
    assert resolve_criterion("mse") is nn.functional.mse_loss
    assert resolve_criterion(nn.functional.l1_loss) is nn.functional.l1_loss
    with pytest.raises(ValueError, match="cross_entropy, mse"):
        resolve_criterion("nll")


def test_starting_points_come_from_the_generator_alone():
    fresh, shared = tiny(), tiny(shared_init=True)
    torch.manual_seed(0)
    one = fresh.draw(0, 3).init(torch.Generator().manual_seed(5))[0]["0.weight"]
    torch.manual_seed(1)
    assert fresh.draw(7, 3).init(torch.Generator().manual_seed(5))[0]["0.weight"].equal(one)
    assert not one[0].equal(one[1])
    same = shared.draw(0, 3).init(torch.Generator().manual_seed(5))[0]["0.weight"]
    assert same[0].equal(same[2])
    assert shared.draw(3, 1).init(torch.Generator().manual_seed(6))[0]["0.weight"][0].equal(same[0])
