import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_metaopt.data import Digits, ImageData
from lightning_metaopt.models import MLP
from lightning_metaopt.modules import ImageClassifier


def test_a_classifier_learns_real_digits_and_its_metrics_are_right():
    seed_everything(0, verbose=False)
    module, data = ImageClassifier(MLP([784, 32, 10])), ImageData(Digits("train"), Digits("test"))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=150, accelerator="cpu", limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = module.eval()(images)
    assert metrics["test accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["test loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test accuracy"] > 0.85
