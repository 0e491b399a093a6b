"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

__all__ = ["MLP"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """A multi-layer perceptron, :math:`x \\mapsto W_k\\,\\sigma(\\dots\\sigma(W_1 x + b_1)\\dots) + b_k`, with PyTorch's
    default initialisation.

    Args:
        sizes: widths of all layers, input and output included.
        activation: :math:`\\sigma`, ``"relu"`` or ``"tanh"``; none after the last layer.
        flatten: flatten everything behind the batch axis first, so that images of shape ``(n, 1, 28, 28)`` enter as
            784 numbers. Without it the layers act on the last axis.

    Raises:
        ValueError: for fewer than two sizes, a size below 1, or an unknown activation.

    >>> import torch
    >>> MLP([784, 32, 10])(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int], activation: Literal["relu", "tanh"] = "relu", flatten: bool = True) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must hold at least an input and an output width, all positive; got {list(sizes)}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, _ACTIVATIONS))}; got {activation!r}")
        layers: list[nn.Module] = [nn.Flatten()] if flatten else []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            if index:
                layers.append(_ACTIVATIONS[activation]())
            layers.append(nn.Linear(inputs, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of shape ``(n, sizes[-1])`` for inputs of shape ``(n, ...)``."""
        outputs: Tensor = self.layers(inputs)
        return outputs
