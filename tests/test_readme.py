import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_metaopt as lmo
from lightning_metaopt.study.spec import load_recipe

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def block(marker):
    (found,) = [text for text in BLOCKS if marker in text]
    return found


@pytest.fixture
def rule_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lmo.save_rule(lmo.rules.GradientDescent(lr=0.1), "my_rule.safetensors")


@pytest.mark.filterwarnings("ignore:.*logger")
def test_meta_training_as_in_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("lmo.MetaLoop("), names)
    saved = lmo.load_rule("my_rule.safetensors")
    for one, other in zip(saved.parameters(), names["rule"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert names["learner"].history[-1]["val_loss"] < names["learner"].history[0]["val_loss"]


@pytest.mark.filterwarnings("ignore:.*tensorboardX")
def test_swapping_as_in_the_readme(rule_file):
    names = {}
    exec(block("SwapOptimizer("), names)
    assert any(isinstance(callback, lmo.SwapOptimizer) for callback in names["trainer"].callbacks)
    exec(block("def configure_optimizers"), names | {"lmo": lmo}, names)
    optimizer = names["configure_optimizers"](BoringModel())
    assert isinstance(optimizer, lmo.LearnedOptimizer)
    assert optimizer.rule.describe()["lr"] == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:.*tensorboardX", "ignore:.*logger", "ignore:.*num_workers")
def test_learning_step_sizes_as_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("OptimisticMetaGrad("), names)
    trainer, module = names["trainer"], BoringModel()
    trainer.fit(module)
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, lmo.OptimisticMetaGrad)]
    (engine,) = callback.engines
    assert engine.steps == 5 * 64
    assert all((factor != 1).any() for factor in engine.factors().values())


def test_every_python_block_is_tested():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_run(path):
    text = path.read_text(encoding="utf-8")
    elsewhere = ("paper_images", "ILSVRC", "mnist_10k", "opencv_digits", "ding_en_de", "wmt")  # data that are not here
    far_away = any(name in text for name in elsewhere)
    # A recipe that is laid over another one says in its first lines how both are run.
    together = re.search(r"^#\s+lightning-metaopt run ((?:recipes/\S+\.yaml ){2,})", text, flags=re.M)
    files = [str(ROOT / name) for name in together.group(1).split()] if together else [str(path)]
    assert str(path) in files
    recipe = load_recipe(files, text_only=far_away)
    assert len(recipe.seeds) * len(recipe.problems) >= (3 if far_away else 5)
    ordinary = [method for method in recipe.methods.values() if method.train is None]
    assert ordinary
    if recipe.sampler == "grid":
        assert all(len(method.space.grid()) == recipe.trials for method in ordinary if method.search)


def test_the_pictures_and_pages_that_the_readme_shows_exist():
    for page in ROOT.glob("**/README.md"):
        if ".venv" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
