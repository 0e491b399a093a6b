import pytest
import torch
from torch import nn

import lightning_metaopt as lmo
from lightning_metaopt.models import MLP
from lightning_metaopt.tasks import ImageClassification, ImageSet


def bars(count=200):
    """Images whose label is the row that is bright."""
    labels = torch.arange(count) % 4
    images = torch.randint(0, 60, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(count), 0, labels] += 180
    return ImageSet(images, labels, source="bars")


@pytest.mark.parametrize("model", [MLP([16, 8, 4]), lambda: MLP([16, 8, 4])], ids=["module", "factory"])
def test_classifiers_learn_from_images(model):
    family = ImageClassification(bars(), model, batch_size=16)
    assert family.source == "bars"
    assert family.shapes == {"layers.1.weight": (8, 16), "layers.1.bias": (8,), "layers.3.weight": (4, 8), "layers.3.bias": (4,)}
    rule = lmo.rules.GradientDescent(lr=0.5)
    task = family.draw(seed=0, size=3)
    start = lmo.episode.start(rule, task)
    end, losses = lmo.episode.unroll(rule, start, 80)
    assert losses[0].min() > 1.0
    assert task.val_loss(end.params, end.buffers).max() < 0.3


def test_convolutions_are_trained_together_as_one_by_one():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    family = ImageClassification(bars(), net, batch_size=8, classes=2)
    rule = lmo.rules.GradientDescent(lr=0.1).double()
    episode = lmo.episode.start(rule, family.draw(seed=0, size=3))
    assert episode.task.preferred_chunk is None
    together, apart = (lmo.Unrolled(3, chunk=chunk)(rule, episode, lmo.objectives.ValidationLoss()) for chunk in (None, 1))
    torch.testing.assert_close(together.loss, apart.loss)
    torch.testing.assert_close(together.grads, apart.grads)
    torch.testing.assert_close(together.episode.buffers, apart.episode.buffers)


def test_images_need_labels_and_channels():
    with pytest.raises(ValueError, match="channels"):
        ImageSet(torch.zeros(3, 4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        ImageSet(torch.zeros(3, 1, 4, 4), torch.zeros(2))
