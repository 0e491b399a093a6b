"""Pretrained weights from files of several kinds."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_metaopt.models import MLP, ResNet18, ResNet50, pretrained


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def torchvision_names(model, stages):
    """The state dict under torchvision's names, from the order of the layers in its own source."""
    names = ["conv1", "bn1"]
    shortcuts = iter(part.shortcut for part in model.blocks)
    convolutions = 3 if isinstance(model, ResNet50) else 2
    for stage, depth in enumerate(stages, 1):
        for block in range(depth):
            for number in range(1, convolutions + 1):
                names += [f"layer{stage}.{block}.conv{number}", f"layer{stage}.{block}.bn{number}"]
            if not isinstance(next(shortcuts), nn.Identity):
                names += [f"layer{stage}.{block}.downsample.0", f"layer{stage}.{block}.downsample.1"]
    parts = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    names.append("fc")
    assert len(parts) == len(names)
    return {f"{name}.{key}": value for name, part in zip(names, parts, strict=True) for key, value in part.state_dict().items()}


def other(make, seed=3):
    torch.manual_seed(seed)
    model = make()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.mark.parametrize(("make", "stages"), [(ResNet18, (2, 2, 2, 2)), (ResNet50, (3, 4, 6, 3))])
def test_a_file_with_torchvisions_names(make, stages, tmp_path):
    source = other(lambda: make(classes=7, width=2, stem="imagenet"))
    save_file(torchvision_names(source, stages), tmp_path / "a.safetensors")
    torch.manual_seed(1)
    model = make(classes=3, width=2, stem="imagenet")
    head = state(model.head)
    assert pretrained(model, tmp_path / "a.safetensors") is model
    for name, value in source.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(model.state_dict()[name], value), name
    assert all(torch.equal(value, head[name]) for name, value in model.head.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    source.head = model.head
    torch.testing.assert_close(model.eval()(images), source.eval()(images))


def test_state_dicts_and_checkpoints(tmp_path):
    source, path = other(lambda: MLP([3, 4, 2])), tmp_path / "a.ckpt"
    for content in (
        source.state_dict(),
        {"state_dict": source.state_dict(), "epoch": 3},
        {"state_dict": {f"model.{name}": value for name, value in source.state_dict().items()}},
    ):
        torch.save(content, path)
        model = pretrained(MLP([3, 4, 2]), path, new="")
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model, path = MLP([3, 4, 2]), tmp_path / "a.pt"
    before = state(model)
    good = state(other(lambda: MLP([3, 4, 2])))
    name = next(iter(good))
    for content, match in (
        ({key: value for key, value in good.items() if key != name}, f"missing {name}; left over nothing"),
        ({**good, "more.weight": torch.ones(1)}, "missing nothing; left over more.weight"),
        ({**good, list(good)[-1]: torch.ones(5)}, r"has shape \(5,\) in .*new="),
        ({"weights": [1, 2]}, "holds no state dict"),
        ([1], "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            pretrained(model, path, new="")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="put a file with pretrained weights there"):
        pretrained(model, tmp_path / "none.pt")


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "a.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        pretrained(MLP([3, 2]), tmp_path / "a.pt", new="")
    assert not (tmp_path / "executed").exists()
