"""Runs of one seed see the same initial weights, batches and dropout, whatever the optimizer does."""

import hashlib
from functools import partial
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_metaopt as lmo
from lightning_metaopt.data import ImageData
from lightning_metaopt.models import MLP
from lightning_metaopt.modules import ImageClassifier
from lightning_metaopt.study.evaluation import Candidate
from lightning_metaopt.study.training import TrainerEvaluation
from lightning_metaopt.tasks.images import ImageSet

IMAGES = ImageSet(torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte(), torch.arange(20) % 10)


def hashed(*tensors):
    return hashlib.blake2b(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


class Seen(Callback):
    """What a run was given: initial weights, batches, masks of dropout."""

    def __init__(self):
        self.weights, self.batches, self.masks = "", [], []

    def on_fit_start(self, trainer, pl_module):
        self.weights = hashed(*pl_module.parameters())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(hashed(*batch))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.masks.append(hashed(pl_module.model.dropped))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.dropout = MLP([16, 10]), nn.Dropout(0.5)

    def forward(self, images):
        self.dropped = self.dropout(torch.ones(64)) if self.training else torch.ones(64)
        return self.inner(images) * self.dropped.mean()


class Shaken(Dataset):
    """Augmentation from the global generator, as in many a data set of users."""

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return IMAGES.images[row] / 255 + 0.1 * torch.rand(1, 4, 4), IMAGES.labels[row]


class Plain(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Shaken(), batch_size=4, shuffle=True)

    def test_dataloader(self):
        return DataLoader(Shaken(), batch_size=10)

    val_dataloader = test_dataloader


class Drawing(torch.optim.SGD):
    """Draws from the global generator when it is made and at every step, and asks for the loss twice."""

    def __init__(self, parameters, lr):
        torch.rand(3)
        super().__init__(parameters, lr)

    def step(self, closure=None):
        loss = closure()
        torch.rand(5)
        closure()
        super().step()
        return loss


class DrawingRule(lmo.rules.GradientDescent):
    def init(self, params):
        torch.rand(3)
        return super().init(params)

    def update(self, *args, **options):
        torch.rand(5)
        return super().update(*args, **options)


def run(data, seed=3, rule=None, callbacks=lambda: [], **candidate):
    """What an optimizer is given in 20 steps: several epochs."""
    options = {"steps": 20, "smooth": 5, "validate_every": 5, "trainer": {"accelerator": "cpu"}}
    evaluation = TrainerEvaluation(lambda: ImageClassifier(Dropping()), data, data, **options)
    seen = Seen()
    evaluation.run(None, Candidate(**candidate, callbacks=lambda: [*callbacks(), seen]), rule, seed, "test")
    assert len(seen.batches) == len(seen.masks) == 20
    return seen


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


DATA = {"of the package": partial(ImageData, IMAGES, IMAGES, batch_size=4, crop=1, flip=True), "of a user": Plain}


@pytest.fixture(params=DATA.values(), ids=DATA)
def data(request):
    return request.param


@pytest.mark.filterwarnings("ignore:.*training images")
@pytest.mark.parametrize(
    "other",
    [
        {"rule": lmo.rules.GradientDescent(lr=0.01)},
        {"rule": lmo.rules.Adam()},
        {"rule": DrawingRule()},
        {"optimizer": torch.optim.AdamW},
        {"optimizer": partial(Drawing, lr=0.01)},
        {"optimizer": sgd, "callbacks": lambda: torch.rand(2) is None or []},
    ],
    ids=["swapped", "swapped Adam", "swapped, drawing", "AdamW", "drawing", "callbacks that draw"],
)
def test_optimizers_differ_in_nothing_but_the_optimizer(data, other):
    first, second = run(data, optimizer=sgd), run(data, **other)
    assert second.weights == first.weights
    assert second.batches == first.batches
    drawn_twice = getattr(other.get("optimizer"), "func", None) is Drawing
    assert drawn_twice or second.masks == first.masks
    assert len(set(first.batches)) == 20  # augmented: no batch is there twice


class Seeing(ImageClassifier):
    """Sees what it is given without any callback, which alone would change how the random numbers are looked after."""

    seen: ClassVar[list] = []

    def training_step(self, batch, batch_idx):
        if (mark := (batch_idx, hashed(*batch))) not in Seeing.seen[-1:]:  # LBFGS comes several times
            Seeing.seen.append(mark)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training images")
@pytest.mark.parametrize(
    "other",
    [torch.optim.AdamW, partial(torch.optim.LBFGS, lr=1e-3, max_iter=3), partial(Drawing, lr=0.01)],
    ids=["AdamW", "LBFGS", "drawing"],
)
def test_without_any_callback_the_data_are_the_same_too(data, other, monkeypatch):
    options = {"steps": 20, "smooth": 5, "trainer": {"accelerator": "cpu"}}
    evaluation = TrainerEvaluation(lambda: Seeing(Dropping()), data, data, **options)
    found = []
    for optimizer in (sgd, other):
        monkeypatch.setattr(Seeing, "seen", [])
        evaluation.run(None, Candidate(optimizer=optimizer, callbacks=list), None, 3, "test")
        found.append(Seeing.seen)
    assert len(found[0]) == 20
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:.*training images")
def test_seeds_differ_in_everything(data):
    first, second = run(data, optimizer=sgd), run(data, optimizer=sgd, seed=4)
    assert first.weights != second.weights
    assert not set(first.batches) & set(second.batches)
    assert first.masks != second.masks


@pytest.mark.filterwarnings("ignore:.*training images")
def test_a_schedule_of_the_module_acts_on_no_optimizer():
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: step / 4000)
    module = partial(ImageClassifier, schedule=warm_up, schedule_every="step")
    options = {"steps": 20, "smooth": 5, "trainer": {"accelerator": "cpu"}}
    evaluation = TrainerEvaluation(lambda: module(MLP([16, 10])), DATA["of the package"], DATA["of the package"], **options)
    rule = lmo.rules.GradientDescent(lr=0.1)
    swapped = evaluation.run(None, Candidate(rule=lambda: rule, callbacks=list), rule, 0, "test")
    plain = evaluation.run(None, Candidate(optimizer=sgd, callbacks=list), None, 0, "test")
    for one, other in zip(swapped.curves["training loss"], plain.curves["training loss"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
