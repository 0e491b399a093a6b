"""Data sets: real data through ``datasets``, and what ships in ordinary Python packages beside it."""

from lightning_metaopt.data.datamodule import ImageData
from lightning_metaopt.data.digits import Digits, load_images

__all__ = ["Digits", "ImageData", "load_images"]
