"""Weights from a file into a network, for fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_metaopt.models.resnet import ResNet18, ResNet50

__all__ = ["pretrained"]


def pretrained(model: nn.Module, path: str | Path, new: str = "head") -> nn.Module:
    """The network, started from the weights in a file, all but those of the part ``new``: what fine-tuning begins with.

    In a recipe in the place of the network: ``class_path: lightning_metaopt.models.pretrained`` with ``init_args`` ``model`` and
    ``path``. Nothing is downloaded.

    Args:
        model: the network, freshly initialised; it is changed in place and returned. :class:`ResNet18` and :class:`ResNet50`
            also take files with torchvision's names.
        path: ``.safetensors``, or what ``torch.save`` wrote: a state dict, or a dictionary with one under ``"state_dict"``, such as
            a Lightning checkpoint. It is read with ``weights_only=True``: nothing in it is executed.
        new: name of the part that keeps its own initial weights, since its classes are others; ``""`` for none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if weights are missing, left over, or of another shape; the model is as it was then.

    >>> import tempfile
    >>> from lightning_metaopt.models import MLP
    >>> trained = MLP([3, 2])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(trained.state_dict(), f"{folder}/weights.pt")
    ...     fresh = pretrained(MLP([3, 2]), f"{folder}/weights.pt", new="")
    >>> all(torch.equal(one, other) for one, other in zip(trained.parameters(), fresh.parameters()))
    True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights at {path}: nothing is downloaded, so put a file with pretrained weights there"
        )
    found = _read(path)
    if isinstance(model, (ResNet18, ResNet50)) and "conv1.weight" in found:
        found = {_our_name(name, _STAGES[type(model)]): value for name, value in found.items()}
    wanted = {name: value for name, value in model.state_dict().items() if not (new and name.startswith(f"{new}."))}
    found = {name: value for name, value in found.items() if not (new and name.startswith(f"{new}."))}
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    left_over = [name for name in found if name not in wanted]
    if missing or left_over:
        raise ValueError(
            f"the weights in {path} are not those of {type(model).__name__}: "
            f"missing {', '.join(missing[:3]) or 'nothing'}; left over {', '.join(left_over[:3]) or 'nothing'}"
        )
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in {path} and {tuple(wanted[name].shape)} in {type(model).__name__}: give "
                "the network the same widths and stem, and name a part with other classes with new="
            )
    with torch.no_grad():
        for name, value in found.items():
            wanted[name].copy_(value)
    return model


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
        if found and all(name.startswith("model.") for name in found):  # that of a LightningModule around the network
            found = {name.removeprefix("model."): value for name, value in found.items()}
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict: save model.state_dict() with torch.save or safetensors")
    return found


# torchvision counts blocks by stage; ours are counted through.
_STAGES = {ResNet18: (0, 2, 4, 6), ResNet50: (0, 3, 7, 13)}
_PARTS = {"conv1": "residual.0", "bn1": "residual.1", "conv2": "residual.3", "bn2": "residual.4", "conv3": "residual.6"} | {
    "bn3": "residual.7",
    "downsample": "shortcut",
}
_OUTSIDE = {"conv1": "stem.0", "bn1": "stem.1", "fc": "head"}


def _our_name(name: str, first: tuple[int, ...]) -> str:
    # layer2.0.downsample.1.bias is blocks.2.shortcut.1.bias of a ResNet-18.
    match = re.fullmatch(r"layer([1-4])\.(\d+)\.(\w+)\.(.*)", name)
    if match is None:
        part, _, rest = name.partition(".")
        return f"{_OUTSIDE.get(part, part)}.{rest}"
    stage, block, part, rest = match.groups()
    return f"blocks.{first[int(stage) - 1] + int(block)}.{_PARTS.get(part, part)}.{rest}"
