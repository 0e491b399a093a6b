"""Small classifiers of many shapes, to meta-train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lightning_metaopt.models.mlp import MLP

__all__ = ["SmallNetwork"]


class SmallNetwork(nn.Module):
    """Average pooling, convolutions of 3x3 with stride 2, then a perceptron; PyTorch's default initialisation.

    Args:
        pool: side of the squares that are averaged first; 1 for none.
        channels: of the convolutions, none by default.
        widths: of the perceptron's hidden layers, none by default.
        classes: number of outputs.
        in_channels: channels of the images.
        size: height and width of the images.
        activation: after every convolution and hidden layer.

    Raises:
        ValueError: for images that pooling and convolutions leave nothing of, or sizes below 1.

    >>> import torch
    >>> net = SmallNetwork(pool=2, channels=[4, 8], widths=[12])
    >>> net(torch.zeros(5, 1, 28, 28)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([5, 10]), 862)
    """

    def __init__(
        self,
        pool: int = 2,
        channels: Sequence[int] = (),
        widths: Sequence[int] = (),
        classes: int = 10,
        in_channels: int = 1,
        size: int = 28,
        activation: Literal["relu", "tanh"] = "relu",
    ) -> None:
        super().__init__()
        if pool < 1 or min([classes, in_channels, *channels, *widths]) < 1:
            raise ValueError("pool, classes, in_channels, channels and widths must all be at least 1")
        layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
        side, before = size // pool, in_channels
        for count in channels:
            layers += [nn.Conv2d(before, count, 3, stride=2), nn.Tanh() if activation == "tanh" else nn.ReLU()]
            side, before = (side - 3) // 2 + 1, count
        if side < 1:
            raise ValueError(f"{len(channels)} convolutions after pooling by {pool} leave nothing of images of {size} pixels")
        self.layers = nn.Sequential(*layers, MLP([before * side * side, *widths, classes], activation))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, in_channels, size, size)``."""
        logits: Tensor = self.layers(images)
        return logits
