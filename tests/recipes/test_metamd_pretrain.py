"""Weights for the recipe of fine-tuning: they are trained ones, and go into the network that the recipe tests."""

import torch
from recipe_script import load_script

from lightning_metaopt.models import ResNet18, pretrained
from lightning_metaopt.tasks.images import ImageSet


def test_weights_for_fine_tuning(monkeypatch, tmp_path):
    script = load_script("metamd/pretrain.py")
    asked = []

    def images(path, split, size):
        asked.append((path, split, size))
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(64) % 2
        pixels = torch.randint(0, 100, (64, 3, 16, 16), generator=generator) + 150 * labels[:, None, None, None]
        return ImageSet(pixels.byte(), labels)

    monkeypatch.setattr(script, "load_images", images)
    monkeypatch.setattr(script, "STEPS", 20)
    script.main([str(tmp_path)])
    assert asked == [(name, split, 16) for name in ("photo_crops", "emoji") for split in ("train", "test")]
    torch.manual_seed(5)
    fresh = ResNet18(classes=10, width=4)
    head = {name: value.clone() for name, value in fresh.state_dict().items() if name.startswith("head.")}
    network = pretrained(fresh, tmp_path / "emoji.pt")
    saved = torch.load(tmp_path / "emoji.pt", weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, head.get(name, saved[name]))
    network.load_state_dict(saved)  # with the head it was trained with, dark and bright are told apart
    dark, bright = (images("", "other", 16).images[kind::2].float() / 255 for kind in (0, 1))
    network.eval()
    assert (network(dark).argmax(1) == 0).all()
    assert (network(bright).argmax(1) == 1).all()
