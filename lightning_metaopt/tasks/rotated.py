"""Rotated images: one data set seen at several angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_metaopt.tasks.images import ImageSet
from lightning_metaopt.tasks.supervised import FromSupervised, Supervised
from lightning_metaopt.tasks.variation import Variation
from lightning_metaopt.tree import Tree

__all__ = ["RotatedImages", "rotate", "rotated"]


def rotate(images: Tensor, degrees: Tensor, fill: float = 0.0) -> Tensor:
    """Images turned counterclockwise about their middle, with bilinear interpolation; the size stays.

    The same as ``scipy.ndimage.rotate(..., order=1, reshape=False)`` but for pixels at the border of what comes in.

    Args:
        images: floating point, ``(B, n, channels, height, width)``.
        degrees: one angle for each of the ``B`` stacks of images.
        fill: value of what comes in from outside.

    >>> picture = torch.eye(3).view(1, 1, 1, 3, 3)
    >>> rotate(picture, torch.tensor([90.0])).squeeze().round().int().tolist()
    [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    """
    count, size, channels, height, width = images.shape
    angle = torch.deg2rad(degrees.to(images.dtype))
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid counts in halves of height and width.
    theta = torch.stack([cos, -sin * (height / width), none, sin * (width / height), cos, none], 1).view(count, 2, 3)
    # All images of a stack turn alike: they are channels of one picture.
    stacks = images.reshape(count, size * channels, height, width) - fill
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    turned = F.grid_sample(stacks, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (turned + fill).view_as(images)


def darkest(images: Tensor) -> float:
    """The value of black: 0 for pixels, for standardised images the smallest that occurs."""
    return float(images.min()) if images.is_floating_point() else 0.0


def rotated(data: ImageSet, degrees: float) -> ImageSet:
    """All images of a set turned by one angle: a domain of RotatedMNIST, to test on.

    In a recipe: ``class_path: lightning_metaopt.tasks.rotated`` with ``init_args``, wherever an ``ImageSet`` is asked for.

    Args:
        data: the images.
        degrees: the angle, counterclockwise.

    Returns:
        The set, of the same type of numbers (pixel values are rounded); ``source`` says the angle.
    """
    fill = darkest(data.images)
    angle = torch.tensor([degrees], dtype=torch.float64 if data.images.dtype == torch.float64 else torch.float32)
    parts = [rotate(part.to(angle.dtype).unsqueeze(0), angle, fill).squeeze(0) for part in data.images.split(1000)]
    if not data.images.is_floating_point():
        parts = [part.round().to(data.images.dtype) for part in parts]
    return ImageSet(torch.cat(parts).to(data.images.dtype), data.labels, f"{data.source}, rotated by {degrees:g} degrees")


@final
class _Rotation(Variation):
    def __init__(self, angles: Sequence[float], between: tuple[float, float] | None, fill: float) -> None:
        self.angles, self.between, self.fill = torch.tensor(angles, dtype=torch.float64), between, fill

    def draw(self, generator: torch.Generator, size: int) -> Tree:
        if self.between is None:
            which = torch.randint(len(self.angles), (size,), generator=generator, device=generator.device)
            return {"angle": self.angles[which.cpu()]}
        low, high = self.between
        return {"angle": low + (high - low) * torch.rand(size, generator=generator, device=generator.device).cpu().double()}

    def change(self, inputs: Tensor, targets: Tensor, drawn: Tree) -> tuple[Tensor, Tensor]:
        return rotate(inputs, drawn["angle"], self.fill), targets


@final
class RotatedImages(FromSupervised):
    """Training classifiers on rotated images: each problem has its own angle, network and order of minibatches.

    RotatedMNIST (Ghifary et al. 2015) has the six angles 0, 15, ..., 75; MetaMD (section 5.2) meta-trains on five of them and
    trains on the sixth, a set that :func:`rotated` makes. Images are turned when a minibatch is fetched, in torch.

    Args:
        data: the upright images.
        model: maps ``(n, channels, height, width)`` to ``(n, classes)``: a module, or a function that builds one.
        angles: degrees, counterclockwise; each problem draws one of them.
        between: instead, the ends of a range, from which each problem's angle is drawn uniformly.
        batch_size: images of one inner step.
        held_out: fraction of the images for validation.
        val_batch_size: images of the validation minibatch; default: as ``batch_size``.
        shared_init: all networks start at one point instead of each at its own.

    Raises:
        ValueError: if there is no angle, or as :class:`Supervised` does.

    Reference: Ghifary, Kleijn, Zhang, Balduzzi. Domain generalization for object recognition with multi-task autoencoders.
    ICCV 2015.

    >>> images = ImageSet(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 10)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> task = RotatedImages(images, model, angles=[0, 15, 30], batch_size=16).draw(seed=0, size=4)
    >>> task.data["angle"].tolist()
    [15.0, 0.0, 30.0, 30.0]
    """

    def __init__(
        self,
        data: ImageSet,
        model: nn.Module | Callable[[], nn.Module],
        *,
        angles: Sequence[float] = (0, 15, 30, 45, 60, 75),
        between: tuple[float, float] | None = None,
        batch_size: int = 128,
        held_out: float = 0.2,
        val_batch_size: int | None = None,
        shared_init: bool = False,
    ) -> None:
        if between is None and not len(angles):
            raise ValueError("angles must hold at least one angle, or between= the ends of a range")
        turned = f"{', '.join(f'{angle:g}' for angle in angles)}" if between is None else f"{between[0]:g} to {between[1]:g}"
        super().__init__(
            Supervised(
                model,
                data.images,
                data.labels,
                batch_size=batch_size,
                held_out=held_out,
                val_batch_size=val_batch_size,
                variation=_Rotation(angles, between, darkest(data.images)),
                shared_init=shared_init,
            ),
            f"{data.source}, rotated by {turned} degrees",
        )
