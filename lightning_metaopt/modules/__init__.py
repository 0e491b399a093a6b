"""LightningModules for ordinary training."""

from lightning_metaopt.modules.classification import ImageClassifier

__all__ = ["ImageClassifier"]
