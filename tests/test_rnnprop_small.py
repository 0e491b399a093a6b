"""The general rule that ships with the package, in modules that it was not meta-trained on."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import lightning_metaopt as lmo
from lightning_metaopt.data import Digits, ImageData
from lightning_metaopt.models import MLP, SmallNetwork
from lightning_metaopt.modules import ImageClassifier
from lightning_metaopt.study.spec import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "m_l2o" / "rnnprop_small.yaml"


def trained(make, optimizer, callbacks=()):
    seed_everything(1000, verbose=False)
    module = ImageClassifier(make(), optimizer)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=40, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), limit_val_batches=0, **quiet)
    data = ImageData(Digits("train"), Digits("test"), batch_size=64)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return found["test accuracy"], module


@pytest.mark.parametrize(
    "make",
    [
        partial(MLP, [784, 24, 10], activation="tanh"),
        partial(SmallNetwork, pool=1, channels=[6, 8], widths=[24]),
    ],
    ids=["perceptron", "convolutions"],
)
def test_it_trains_what_it_never_saw_and_needs_no_step_size(make):
    adam = partial(torch.optim.Adam, lr=1e-3)
    plain, _ = trained(make, adam)
    found, _ = trained(make, adam, [lmo.SwapOptimizer("rnnprop-small")])
    assert found > 0.8
    assert found > plain + 0.02


def test_safeguarded_it_is_no_worse_than_adam():
    rule = lmo.rules.Safeguarded(lmo.load_rule("rnnprop-small"), lmo.rules.Adam(1e-3))
    make = partial(MLP, [784, 24, 10], activation="tanh")
    adam = partial(torch.optim.Adam, lr=1e-3)
    assert trained(make, adam, [lmo.SwapOptimizer(rule)])[0] > trained(make, adam)[0] - 0.02


def test_the_networks_of_its_meta_training_are_of_several_shapes_and_other_digits():
    family = load_recipe([str(RECIPE)], text_only=True).source["family"]["init_args"]["families"]
    assert len({str(part["init_args"]["model"]["init_args"]) for part in family}) >= 5
    assert {part["init_args"]["data"]["init_args"]["split"] for part in family} == {"meta"}
