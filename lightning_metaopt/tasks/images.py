"""Image classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor, nn

from lightning_metaopt.tasks.supervised import FromSupervised, Supervised

__all__ = ["ImageClassification", "ImageSet"]


class ImageSet:
    """Labelled images in memory.

    Args:
        images: ``(N, channels, height, width)``, ``uint8`` pixel values or floating point.
        labels: class numbers, ``(N,)``.
        source: where they come from, for the record of a result.

    Raises:
        ValueError: for shapes that do not fit.
    """

    def __init__(self, images: Tensor, labels: Tensor, source: str = "tensors") -> None:
        if images.dim() != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "images must have shape (N, channels, height, width) and labels (N,), got "
                f"{tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images, self.labels, self.source = images, labels, source

    def __len__(self) -> int:
        return len(self.labels)


@final
class ImageClassification(FromSupervised):
    """Training an image classifier: each problem has a fresh network and its own order of minibatches.

    ``val_loss`` is the loss on a minibatch of images that no problem trains on.

    Args:
        data: the images, for example ``lightning_metaopt.data.Digits(split="meta")``.
        model: maps ``(n, channels, height, width)`` to ``(n, classes)``: a module, or a function that builds one.
        batch_size: images of one inner step.
        held_out: fraction of the images for validation.
        val_batch_size: images of the validation minibatch; default: as ``batch_size``.
        classes: each problem has this many classes, drawn and numbered at random; default: all, as they are.
        shared_init: all networks start at one point instead of each at its own.

    Raises:
        ValueError: as :class:`Supervised` does.

    >>> import torch
    >>> images = ImageSet(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 10)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> task = ImageClassification(images, model, batch_size=16).draw(seed=0, size=2)
    >>> task.batch(0)["inputs"].shape
    torch.Size([2, 16, 1, 8, 8])
    """

    def __init__(
        self,
        data: ImageSet,
        model: nn.Module | Callable[[], nn.Module],
        *,
        batch_size: int = 128,
        held_out: float = 0.2,
        val_batch_size: int | None = None,
        classes: int | None = None,
        shared_init: bool = False,
    ) -> None:
        super().__init__(
            Supervised(
                model,
                data.images,
                data.labels,
                batch_size=batch_size,
                held_out=held_out,
                val_batch_size=val_batch_size,
                classes=classes,
                shared_init=shared_init,
            ),
            data.source,
        )
