"""An ordinary classifier, as Lightning's users write them: nothing in it knows of learned optimizers."""

from __future__ import annotations

from functools import partial
from typing import Literal, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_metaopt.modules.schedules import Decayed, OptimizerFactory, ScheduleFactory, configured

__all__ = ["ImageClassifier"]

SGD = partial(torch.optim.SGD, lr=0.1)


@final
class ImageClassifier(LightningModule):
    """Trains ``model`` on batches ``(images, labels)`` with cross-entropy; logs losses and accuracies.

    ``training loss`` is logged at every step, ``training accuracy`` over an epoch, and ``loss`` and ``accuracy`` of
    ``validation`` and ``test`` over all images. Losses of validation and test are without label smoothing.

    Args:
        model: maps images ``(n, channels, height, width)`` to logits ``(n, classes)``.
        optimizer: makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        classes: number of classes.
        schedule: makes a learning rate schedule from the optimizer, for example
            :class:`~lightning_metaopt.modules.WarmupCosine` or one of torch's; ``None`` for a constant learning rate.
        schedule_every: whether the schedule moves on with every ``"step"`` or ``"epoch"``.
        label_smoothing: share of the target that is spread evenly over all classes in training (Szegedy et al. 2016).
        decayed: whether the optimizer's weight decay acts on ``"all"`` parameters, or only on ``"matrices"`` and larger, so that
            biases and normalisations are left out.
        l2: weight of the penalty :math:`\\tfrac{l2}{2}\\|\\theta\\|^2` in the training loss, whatever the optimizer makes of its
            gradient (the weight decay of plain SGD).

    Raises:
        ValueError: for a negative ``l2``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = SGD,
        classes: int = 10,
        schedule: ScheduleFactory | None = None,
        schedule_every: Literal["step", "epoch"] = "step",
        label_smoothing: float = 0.0,
        decayed: Decayed = "all",
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        if not l2 >= 0:
            raise ValueError(f"l2 must not be negative, got {l2}")
        self.model = model
        self.optimizer, self.schedule, self.schedule_every, self.decayed = optimizer, schedule, schedule_every, decayed
        self.label_smoothing, self.l2 = label_smoothing, l2
        # Its checks would wait for the device at every step; cross-entropy refuses labels that are no classes anyway.
        self.training_accuracy, self.validation_accuracy, self.test_accuracy = (
            MulticlassAccuracy(classes, average="micro", validate_args=False) for _ in range(3)
        )
        self.loss = MeanMetric()  # exact on several processes, where Lightning's own mean rounds the number of samples

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.l2:
            weights = [value for value in self.model.parameters() if value.requires_grad]
            loss = loss + self.l2 / 2 * torch.stack([value.square().sum() for value in weights]).sum()
        self.log("training loss", loss, prog_bar=True)
        self.training_accuracy.update(logits, labels)
        self.log("training accuracy", self.training_accuracy, on_step=False, on_epoch=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.loss.reset()  # what it is reset to in the inference mode of a test could not be updated by a validation in fit

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._judge(batch, "validation", self.validation_accuracy)

    def on_test_epoch_start(self) -> None:
        self.loss.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._judge(batch, "test", self.test_accuracy)

    def _judge(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.log(f"{stage} loss", self.loss)
        self.log(f"{stage} accuracy", accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configured(self.model, self.optimizer, self.schedule, self.schedule_every, self.decayed)
