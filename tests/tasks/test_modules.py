"""Problems that train a user's LightningModule on the data of several LightningDataModules."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_metaopt as lmo
from lightning_metaopt.tasks import ModuleFamily


class Regression(pl.LightningModule):
    """A user's module: two losses, a buffer, logging, and the number of the batch."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.register_buffer("seen", torch.zeros(()).double())
        self.unused = nn.Parameter(torch.ones(2).double(), requires_grad=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += len(x)
        loss = (self.net(x) - y).square().mean() + 0.1 * self.net[0].weight.square().sum() + 0.01 * batch_idx
        self.log("loss", loss)
        return {"loss": loss}


def tensors(scale: float, rows: int = 40):
    x = scale * torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x.sin().sum(1, keepdim=True)


class Domain(pl.LightningDataModule):
    """Shuffled batches of 8, a validation set, and a hook."""

    def __init__(self, scale: float, validation: bool = True):
        super().__init__()
        self.scale, self.prepared = scale, []
        if validation:
            self.val_dataloader = lambda: DataLoader(self.data, batch_size=40)

    def prepare_data(self):
        self.prepared.append("prepare")

    def setup(self, stage):
        self.prepared.append(stage)
        self.data = TensorDataset(*tensors(self.scale))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


def by_hand(params, x, y, row):
    """The training step's loss of one problem, written out."""
    first = torch.tanh(x @ params["net.0.weight"].T + params["net.0.bias"])
    out = first @ params["net.3.weight"].T + params["net.3.bias"]
    return (out - y).square().mean() + 0.1 * params["net.0.weight"].square().sum() + 0.01 * row


def test_the_loss_is_the_training_step_on_the_domain_of_each_problem():
    domains = {"small": Domain(0.5), "large": Domain(3.0)}
    family = ModuleFamily(Regression(), domains)
    assert family.names == ["small", "large"]
    assert domains["small"].prepared == ["prepare", "fit"]
    task = family.draw(seed=0, size=6)
    assert set(task.data["domain"].tolist()) == {0, 1}
    params, buffers = task.init(torch.Generator().manual_seed(0))
    assert "unused" not in params
    losses = task.loss(params, buffers, task.batch(3))
    held = task.val_loss(params, {name: leaf.clone() for name, leaf in buffers.items()})
    for index in range(6):
        domain, row = int(task.data["domain"][index]), int(task.data["order"][index, 3])
        own = {name: leaf[index] for name, leaf in params.items()}
        x, y = family.steps.training[domain][row]
        torch.testing.assert_close(losses[index], by_hand(own, x, y, row))
        scale = (0.5, 3.0)[domain]
        everything, targets = tensors(scale)
        torch.testing.assert_close(held[index], by_hand(own, everything + 1, targets, 0))
    assert buffers["seen"].tolist() == [8.0] * 6


def test_each_problem_walks_through_all_batches_in_its_own_order():
    family = ModuleFamily(Regression(), [Domain(1.0), Domain(2.0)])
    task = family.draw(seed=0, size=4)
    rows = torch.stack([task.batch(step)["row"] for step in range(10)])
    for index in range(4):
        assert sorted(rows[:5, index].tolist()) == sorted(rows[5:, index].tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(rows[:, index].tolist()) for index in range(4)}) > 1
    batches = [batch[0] for batch in family.steps.training[0]]
    assert torch.equal(torch.cat(batches).sort(0).values, (tensors(1.0)[0] + 1).sort(0).values)


def test_without_validation_data_the_first_batch_is_held_out():
    loader = DataLoader(TensorDataset(*tensors(1.0)), batch_size=8)
    for data in (loader, Domain(1.0, validation=False)):
        family = ModuleFamily(Regression(), [data])
        assert len(family.steps.training[0]) == 4
        kept = family.steps.held_out[0][0]
        assert not any(torch.equal(kept, batch[0]) for batch in family.steps.training[0])
    assert torch.equal(ModuleFamily(Regression(), [loader]).steps.held_out[0][0], tensors(1.0)[0][:8])


def test_batches_are_few_copied_and_the_same_in_every_family():
    domain = Domain(1.0)
    one, other = (ModuleFamily(Regression(), [domain], batches=3).steps.training[0] for _ in range(2))
    assert len(one) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True)), "shuffled by a seed of the family's own"

    def reusing():  # as loaders with pinned memory may
        batch = [torch.zeros(8, 3, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)]
        for number in range(3):
            batch[0].fill_(number)
            yield batch

    kept = ModuleFamily(Regression(), [reusing()]).steps
    assert [float(batch[0].mean()) for batch in (kept.held_out[0], *kept.training[0])] == [0.0, 1.0, 2.0]


def test_hooks_of_the_data_come_before_those_of_the_module():
    class Hooked(Regression):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 100, batch[1]]

    x = tensors(1.0)[0]
    family = ModuleFamily(Hooked(), [Domain(1.0, validation=False)])
    found = torch.cat([batch[0] for batch in (family.steps.held_out[0], *family.steps.training[0])])
    assert torch.equal(found.sort(0).values, (2 * x + 1).sort(0).values), "the module's first hook, the data's second"


def test_frozen_parameters_travel_with_the_task():
    class Scaled(Regression):
        def training_step(self, batch, batch_idx):
            return self.unused.sum() * super().training_step(batch, 0)["loss"]

    task = ModuleFamily(Scaled(), [Domain(1.0)]).draw(seed=0, size=2)
    params, buffers = task.init(torch.Generator().manual_seed(0))
    before = task.loss(params, buffers, task.batch(0))
    task.shared["frozen.unused"] = 3 * task.shared["frozen.unused"]
    torch.testing.assert_close(task.loss(params, buffers, task.batch(0)), 3 * before)


def test_dropout_is_of_problem_and_step_and_off_in_validation():
    family = ModuleFamily(Regression(dropout=0.5), [Domain(1.0)], shared_init=True)
    task = family.draw(seed=0, size=2)
    task.data["order"][1] = task.data["order"][0]
    params, buffers = task.init(torch.Generator().manual_seed(0))
    assert all(torch.equal(leaf[0], leaf[1]) for leaf in params.values())
    one, again = (task.loss(params, buffers, task.batch(0)) for _ in range(2))
    assert torch.equal(one, again)
    assert one[0] != one[1]
    values = task.val_loss(params, buffers)
    whole = by_hand({name: leaf[0] for name, leaf in params.items()}, *family.steps.held_out[0], 0)
    torch.testing.assert_close(values, whole.expand(2))


def test_the_users_module_and_data_stay_as_they_are():
    module = Regression()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    family = ModuleFamily(module, [Domain(1.0)])
    rule = lmo.rules.MetaSGD(family.shapes, lr=0.05).double()
    lmo.Unrolled(steps=3)(rule, lmo.episode.start(rule, family.draw(0, 2)), lmo.objectives.MeanLoss())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())


def test_a_meta_trained_rule_trains_the_module_better_than_at_the_start():
    class User(Regression):
        def __init__(self):
            super().__init__()
            self.float()

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0].float()) - batch[1].float()).square().mean()

    family = ModuleFamily(User(), [Domain(0.5), Domain(1.0), Domain(2.0)])
    rule = lmo.rules.MetaSGD.for_module(User(), lr=0.01)
    options = {"tasks": 4, "val_tasks": 4, "val_steps": 20, "steps_per_epoch": 15, "optimizer": partial(torch.optim.Adam, lr=0.02)}
    learner = lmo.MetaLearner(rule, family, lmo.Unrolled(steps=8), "mean", **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trained = lmo.MetaLoop(max_epochs=1, accelerator="cpu", **quiet).fit(learner)

    def last_loss(rule):
        torch.manual_seed(5)
        module, losses = User(), []
        optimizer = lmo.LearnedOptimizer(module.named_parameters(), rule=rule)
        x, y = tensors(1.5)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (module.net((x + 1).float()) - y.float()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses[-1]

    assert last_loss(trained) < 0.8 * last_loss(lmo.rules.MetaSGD.for_module(User(), lr=0.01))


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Odd(Regression):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1).double())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ModuleFamily(nn.Linear(3, 1), [Domain(1.0)]), TypeError, "training_step"),
        (lambda: ModuleFamily(Manual(), [Domain(1.0)]), ValueError, "automatic"),
        (lambda: ModuleFamily(Odd(), [Domain(1.0)]), ValueError, "'gain'"),
        (lambda: ModuleFamily(Regression(), []), ValueError, "at least one"),
        (lambda: ModuleFamily(Regression(), [Domain(1.0)], batches=1), ValueError, "at least 2"),
        (lambda: ModuleFamily(Regression(), {"none": []}), ValueError, "'none' have no training batch"),
        (lambda: ModuleFamily(Regression(), {"one": [tensors(1.0)]}), ValueError, "val_dataloader"),
        (lambda: ModuleFamily(Regression(), [torch.zeros(3)]), TypeError, "LightningDataModule"),
    ],
)
def test_what_cannot_be_a_family_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
