"""The example on Lightning's own Transformer, with a small one in its place."""

import re

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.demos import transformer
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from recipe_script import RECIPES, load_script

import lightning_metaopt as lmo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*num_workers", "ignore:.*tensorboardX", "ignore:.*logging interval", "ignore:.*nested_tensor"
)


class Small(LightningTransformer):
    def __init__(self):
        super().__init__(vocab_size=2)
        self.model = Transformer(vocab_size=128, ninp=8, nhead=2, nhid=8, nlayers=1, dropout=0.1)


@pytest.fixture(scope="module")
def recipe():
    return load_script("own_module/transformer.py")


@pytest.fixture(scope="module")
def data(recipe):
    names = (*recipe.TRAINED_ON, recipe.LEFT_OUT)
    return {name: recipe.SourceText(name, length=4, batch_size=4, pieces=60) for name in names}


def test_the_data_are_the_source_letter_by_letter(recipe):
    data = recipe.SourceText("json", length=10, batch_size=3, pieces=50)
    assert isinstance(data, LightningDataModule)
    data.setup("fit")
    assert data.inputs.shape == data.targets.shape == (50, 10)
    assert bytes(data.inputs.flatten()[:3].tolist()) == b'r""'  # of json/__init__.py
    assert torch.equal(data.inputs.flatten()[1:], data.targets.flatten()[:-1])
    batch = next(iter(data.train_dataloader()))
    assert [part.shape for part in batch] == [(3, 10), (3, 10)]


def test_a_rule_is_meta_trained_for_the_module_and_trains_it(recipe, data, capsys):
    assert recipe.LEFT_OUT not in recipe.TRAINED_ON
    assert recipe.TUNED_ON in recipe.TRAINED_ON
    rule = recipe.meta_train(Small(), [data[name] for name in recipe.TRAINED_ON], 4, 0)
    assert isinstance(rule, lmo.rules.KroneckerMirror)
    start = lmo.rules.KroneckerMirror(rule.shapes, lr=0.02, momentum=0.8, seed=0)
    moved = [name for name, value in rule.named_parameters() if not torch.equal(value, start.get_parameter(name))]
    assert len(moved) > 0.9 * len(list(start.parameters()))
    losses = [recipe.train(Small, data[recipe.LEFT_OUT], 0, 12, None, lmo.SwapOptimizer(rule)) for _ in range(2)]
    assert losses[0] == losses[1]
    still = recipe.train(Small, data[recipe.LEFT_OUT], 0, 12, lambda params: torch.optim.SGD(params, lr=0.0))
    assert losses[0] < still


def test_the_table_has_every_optimizer(recipe, data, monkeypatch):
    monkeypatch.setattr(recipe, "RATES", {"SGD": (torch.optim.SGD, (0.01, 0.1))})
    lines = recipe.compare(Small, data, 1, 3, range(2))
    assert len(lines) == 2 + 3
    assert lines[3].startswith(("| SGD, lr 0.1 of 2 |", "| SGD, lr 0.01 of 2 |"))
    assert lines[2].startswith("| its own SGD, lr 0.1 |")


def test_the_ten_lines_of_the_page_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformer, "LightningTransformer", lambda vocab_size: Small())
    (block,) = re.findall(r"```python\n(.*?)```", (RECIPES / "own_module" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {"domains": [data["json"], data["email"]]}
    exec(block.replace("steps_per_epoch=48", "steps_per_epoch=3"), names)
    saved = lmo.load_rule("my_transformer.safetensors")
    assert saved.shapes == {name: tuple(value.shape) for name, value in Small().named_parameters()}
    assert all(torch.equal(one, other) for one, other in zip(saved.parameters(), names["rule"].parameters(), strict=True))
