"""Labelled images through Hugging Face ``datasets``, decoded once into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from lightning_metaopt.data.decode import Size, columns_of, to_label, to_pixels, undecoded
from lightning_metaopt.data.origin import RECORD, find_local, open_split, read_record
from lightning_metaopt.tasks.images import ImageSet

__all__ = ["load_images", "sample", "with_digest"]


def load_images(
    path: str,
    split: str = "train",
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    config: str | None = None,
    without: str | None = None,
) -> ImageSet:
    """One split of a data set of labelled images, decoded once to ``uint8``.

    In a recipe: ``class_path: lightning_metaopt.data.load_images`` with ``init_args``, wherever an ``ImageSet`` is asked for.

    Args:
        path: a local folder or file (parquet, json, images in one folder for each class, ``save_to_disk``), the name of a
            set made by ``lightning-metaopt data prepare``, or the id of a data set on the Hugging Face hub
            (``"ylecun/mnist"``); looked for in this order.
        split: name of the split; slices and sums work too: ``"train[:10%]"``, ``"train+test"``.
        size: height and width, or one number for both: every image is scaled until it covers them, and its middle cut out.
            Needed where images differ in size.
        channels: 1 for grey, 3 for RGB; by default RGB if any image has colour.
        limit: take so many images, drawn with a fixed seed (many data sets are sorted by class).
        columns: names of the columns of images and labels; by default the first image and the first class label.
        config: name of the data set's configuration, where it has several.
        without: another data set, all of whose images (compared after decoding, pixel by pixel) are left out: so a set and a
            part of it become two sets that share nothing.

    Returns:
        Images ``uint8 (N, channels, height, width)`` and labels ``(N,)``; ``source`` says where they came from, how many
        they are and a digest of their pixels and labels. Sets that are asked for again share memory: do not write to them.

    Raises:
        ImportError: if ``datasets`` or Pillow is missing.
        FileNotFoundError: if the data cannot be had, with what to do; it comes at once, without retries.
        ValueError: if there is no image or label column, a label is missing, or images differ in size.

    >>> load_images("sklearn_digits", "test", size=28).images.shape[1:]
    torch.Size([1, 28, 28])
    """
    size = size if size is None or isinstance(size, int) else (size[0], size[1])
    place = find_local(path)
    made = 0 if place is None or read_record(place) is None else (place / RECORD).stat().st_mtime_ns
    # What the hub has or data prepare made does not change under one's hands; other folders may be worked on.
    read = _read_again if place is None or made else _read
    loaded = read(path, split, size, channels, limit, None if columns is None else tuple(columns), config, (str(place), made))
    if without is None:
        return loaded
    other = load_images(without, "all", size=size, channels=channels)
    known = {pixels.numpy().tobytes() for pixels in other.images}
    kept = torch.tensor([pixels.numpy().tobytes() not in known for pixels in loaded.images])
    if not kept.any():
        raise ValueError(f"all images of split {split!r} of {path!r} are in {without!r} too, and nothing is left without these")
    source = f"{loaded.source}, without the {int((~kept).sum())} that are in {without} too"
    return ImageSet(loaded.images[kept], loaded.labels[kept], source)


def _read(
    path: str,
    split: str,
    size: Size,
    channels: int | None,
    limit: int | None,
    columns: tuple[str, ...] | None,
    config: str | None,
    place: tuple[str, int],
) -> ImageSet:
    if channels not in {None, 1, 3}:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    dataset, origin = open_split(path, split, config)
    image_column, label_column = columns_of(dataset.features, columns, path)
    dataset, drawn = sample(dataset.select_columns([image_column, label_column]), limit)
    if not len(dataset):
        raise ValueError(f"split {split!r} of {path!r} is empty")
    values = dataset[label_column][:]
    numbers = {name: number for number, name in enumerate(sorted({value for value in values if isinstance(value, str)}))}
    labels = torch.tensor([to_label(value, numbers) for value in values])
    decoded = [to_pixels(row[image_column], size, channels) for row in undecoded(dataset, image_column)]
    colours = max(len(pixels) for pixels in decoded)
    decoded = [pixels.expand(colours, -1, -1) for pixels in decoded]
    sizes = {tuple(pixels.shape[1:]) for pixels in decoded}
    if len(sizes) > 1:
        some = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
        raise ValueError(f"the images of {path!r} differ in size ({some}, ...): give size=, to which all are brought")
    images = torch.stack(decoded)
    changes = [f"{'x'.join(map(str, images.shape[1:]))} pixels"] if size is not None or channels is not None else []
    digest = [images.numpy().tobytes(), labels.numpy().tobytes()]
    return ImageSet(images, labels, with_digest(", ".join([origin, *changes]), len(labels), drawn, digest))


_read_again = lru_cache(maxsize=4)(_read)


def sample(dataset: Any, limit: int | None) -> tuple[Any, str]:
    """``limit`` rows drawn with seed 0, in the order of the data set; all rows for ``None``. And the words for it."""
    if limit is None or limit >= len(dataset):
        return dataset, ""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit].sort().values
    return dataset.select(rows.tolist()), f" drawn from {len(dataset)}"


def with_digest(origin: str, rows: int, drawn: str, content: Iterable[bytes]) -> str:
    """The full text of a source: where from, how many rows, and a digest by which two results can be known to agree."""
    digest = hashlib.blake2b(digest_size=6)
    for part in content:
        digest.update(part)
    return f"{origin}, {rows} rows{drawn}, digest {digest.hexdigest()}"
