"""An ordinary classifier, as Lightning's users write them: nothing in it knows of learned optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ImageClassifier"]

SGD = partial(torch.optim.SGD, lr=0.1)


@final
class ImageClassifier(LightningModule):
    """Trains ``model`` on batches ``(images, labels)`` with cross-entropy; logs losses and accuracies.

    Args:
        model: maps images ``(n, channels, height, width)`` to ``(n, classes)``.
        optimizer: makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        classes: number of classes.
    """

    def __init__(
        self, model: nn.Module, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = SGD, classes: int = 10
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("training loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._judge(batch, "validation")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._judge(batch, "test")

    def _judge(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log(f"{stage} loss", F.cross_entropy(logits, labels))
        self.log(f"{stage} accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
