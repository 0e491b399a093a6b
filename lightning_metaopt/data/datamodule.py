"""Images in memory as a LightningDataModule."""

from __future__ import annotations

from typing import final

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_metaopt.tasks.images import ImageSet

__all__ = ["ImageData"]


@final
class ImageData(LightningDataModule):
    """Training and test images, decoded in memory and fetched a whole batch at a time.

    Batches are ``(images, labels)`` with images as floats in [0, 1]. The order of the training images comes from torch's
    global generator, so that runs after the same ``seed_everything`` see the same batches.

    Args:
        train: images to train on.
        test: images to test on; ``None`` keeps the fraction ``held_out`` of the training images for that.
        batch_size: images in a training batch; the last incomplete one is dropped.
        held_out: see ``test``.

    >>> from lightning_metaopt.tasks.images import ImageSet
    >>> images = ImageSet(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50) % 10)
    >>> data = ImageData(images, batch_size=16)
    >>> len(data.train_dataloader()), next(iter(data.test_dataloader()))[0].shape
    (2, torch.Size([10, 1, 8, 8]))
    """

    def __init__(self, train: ImageSet, test: ImageSet | None = None, batch_size: int = 64, held_out: float = 0.2) -> None:
        super().__init__()
        self.source = train.source if test is None else f"{train.source}; {test.source}"
        self.batch_size = batch_size
        count = len(train) if test is not None else round(len(train) * (1 - held_out))
        if not batch_size <= count:
            raise ValueError(f"a batch of {batch_size} does not fit into {count} training images")
        self.train = TensorDataset(*_tensors(train, slice(0, count)))
        self.test = TensorDataset(*_tensors(train, slice(count, None)) if test is None else _tensors(test, slice(None)))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches in random order."""
        return DataLoader(self.train, sampler=BatchSampler(RandomSampler(self.train), self.batch_size, True), batch_size=None)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test images in batches of up to 1,000."""
        return DataLoader(self.test, sampler=BatchSampler(SequentialSampler(self.test), 1000, False), batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same as :meth:`test_dataloader`."""
        return self.test_dataloader()


def _tensors(images: ImageSet, part: slice) -> tuple[Tensor, Tensor]:
    pixels = images.images[part]
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels, images.labels[part]
