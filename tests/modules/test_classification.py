from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from module_cases import QUIET, fit, images

from lightning_metaopt.data import Digits, ImageData
from lightning_metaopt.models import MLP, LeNet
from lightning_metaopt.modules import ImageClassifier, InverseSquareRoot, WarmupCosine
from lightning_metaopt.study.components import build


def test_a_classifier_learns_real_digits_and_its_metrics_are_right():
    seed_everything(0, verbose=False)
    module, data = ImageClassifier(MLP([784, 32, 10])), ImageData(Digits("train"), Digits("test"))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=150, accelerator="cpu", limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    ((images, labels),) = data.test_dataloader()
    with torch.no_grad():
        logits = module.eval()(images)
    assert metrics["test accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["test loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test accuracy"] > 0.85


@pytest.mark.filterwarnings("ignore:.*self.log.*trainer")
def test_the_penalty_is_in_the_training_loss_and_nowhere_else():
    torch.manual_seed(0)
    net, (every, targets) = LeNet(), images((1, 28, 28)).tensors
    inputs, labels = every[:8], targets[:8]
    net.head[1].weight.requires_grad_(False)
    plain, held = ImageClassifier(net), ImageClassifier(net, l2=0.3)
    loss, more = (module.training_step((inputs, labels), 0) for module in (plain, held))
    squares = sum(value.detach().square().sum() for value in net.parameters() if value.requires_grad)
    assert more.item() - loss.item() == pytest.approx(0.15 * squares.item(), rel=1e-4)
    for module in (plain, held):
        module.validation_step((inputs, labels), 0)
    assert held.loss.compute() == plain.loss.compute()
    with pytest.raises(ValueError, match="l2 must not be negative"):
        ImageClassifier(net, l2=-1.0)


def test_metrics_of_all_stages_are_right():
    torch.manual_seed(0)
    data = images((1, 28, 28))
    module = ImageClassifier(LeNet(), partial(torch.optim.SGD, lr=0.0), label_smoothing=0.2)
    every, labels = data.tensors
    logits = module(every).detach()
    found = fit(module, data, len(data.train_dataloader()), limit_val_batches=1.0)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    metrics = found.trainer.callback_metrics
    assert metrics["training accuracy"].item() == pytest.approx(accuracy)
    assert metrics["validation accuracy"].item() == pytest.approx(accuracy)
    assert metrics["validation loss"].item() == pytest.approx(loss, rel=1e-5)
    logarithms = logits[:8].log_softmax(1)
    smoothed = 0.8 * logarithms.gather(1, labels[:8, None])[:, 0] + 0.2 * logarithms.mean(1)
    assert found.losses[0] == pytest.approx(-smoothed.mean().item(), rel=1e-5)


def test_training_goes_on_after_a_test():
    module, data = ImageClassifier(LeNet()), images((1, 28, 28))
    for _ in range(2):
        Trainer(**QUIET).test(module, datamodule=data, verbose=False)
        metrics = fit(module, data, 4, limit_val_batches=1.0).trainer.callback_metrics
    alone = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)[0]
    assert {name: metrics[name].item() for name in alone} == pytest.approx(alone)


@pytest.mark.parametrize(("every", "expected"), [("step", [1, 0.1, 0.01, 1e-3, 1e-4, 1e-5]), ("epoch", [1, 1, 1, 1, 0.1, 0.1])])
def test_the_schedule_moves_on_as_asked(every, expected):
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.1)
    module = ImageClassifier(LeNet(), partial(torch.optim.SGD, lr=1.0), schedule=schedule, schedule_every=every)
    assert fit(module, images((1, 28, 28)), 6).rates == pytest.approx(expected)


def test_everything_can_be_said_in_text():
    spec = {
        "class_path": "lightning_metaopt.modules.ImageClassifier",
        "init_args": {
            "model": {"class_path": "lightning_metaopt.models.VGG16", "init_args": {"width": 2, "hidden": 8}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
            "schedule": {"class_path": "lightning_metaopt.modules.WarmupCosine", "init_args": {"steps": 10, "warmup": 2}},
            "label_smoothing": 0.1,
            "decayed": "matrices",
        },
    }
    configuration = build(LightningModule, spec, "module").configure_optimizers()
    assert isinstance(configuration["lr_scheduler"]["scheduler"], WarmupCosine)
    assert [group["weight_decay"] for group in configuration["optimizer"].param_groups] == [0.1, 0.0]
    transformer = {
        "class_path": "lightning_metaopt.models.Transformer",
        "init_args": {"vocabulary": 20, "width": 8, "heads": 2, "layers": 1, "hidden": 8, "norm": "pre"},
    }
    translator = {"class_path": "lightning_metaopt.modules.Translator", "init_args": {"model": transformer}}
    module = build(LightningModule, translator, "module")
    assert isinstance(module.configure_optimizers()["lr_scheduler"]["scheduler"], InverseSquareRoot)
    translator["init_args"]["schedule"] = None
    assert isinstance(build(LightningModule, translator, "module").configure_optimizers(), torch.optim.Adam)
