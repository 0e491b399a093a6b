"""The meta-trained rules that are part of the package: there, in the wheel, with their origin, and of use."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lightning_metaopt as lmo
from lightning_metaopt.models import MLP
from lightning_metaopt.storage import SHIPPED, RuleFileError, load_rule, read_header, shipped_rules
from lightning_metaopt.study.evaluation import Candidate
from lightning_metaopt.study.spec import load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart" / "digits.yaml"
HELD_OUT = 75


@pytest.mark.parametrize("name", shipped_rules())
def test_each_says_by_which_command_it_was_made(name):
    header = read_header(name)
    origin = header["provenance"]
    assert isinstance(origin["seed"], int)
    assert {"torch", "python", "lightning_metaopt"} <= origin["versions"].keys()
    command = re.sub(r" --output \S+| --overwrite", "", origin["command"]).split()
    assert command[:2] == ["lightning-metaopt", "meta-train"]
    recipe = load_recipe([str(ROOT / command[2])], text_only=True)
    assert origin["recipe"] == recipe.title
    assert origin["method"] in recipe.methods
    made = " ".join(["lightning-metaopt", *command[1:]])
    makefile = re.sub(r"\$\(BIN\)/| --output \S+| --overwrite", "", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert made in makefile, "make pretrained must be the command that made it"


def test_it_fits_the_network_of_its_recipe_and_has_not_seen_the_held_out_angle():
    rule = load_rule("metamd-digits")
    assert isinstance(rule, lmo.rules.KroneckerMirror)
    source = load_recipe([str(RECIPE)], text_only=True).source
    assert HELD_OUT not in source["family"]["init_args"]["angles"]
    assert source["evaluation"]["init_args"]["data"]["init_args"]["train"]["init_args"]["degrees"] == HELD_OUT
    sizes = source["family"]["init_args"]["model"]["init_args"]["sizes"]
    assert rule.shapes == {name: tuple(p.shape) for name, p in MLP(sizes).named_parameters()}


def test_it_trains_a_network_on_a_rotation_that_it_has_not_seen():
    problem = load_recipe([str(RECIPE)], {"evaluation.init_args.steps": "60"}).problems[""]

    def run(rule=None, rate=1.0):
        candidate = Candidate(rule=lambda: rule) if rule else Candidate(optimizer=lambda params: torch.optim.SGD(params, lr=rate))
        scores = problem.evaluation.run(None, candidate, rule, seed=1000, split="test").scores
        return scores["mean training loss"], scores["test accuracy"]

    loss, accuracy = run(load_rule("metamd-digits"))
    for rate in (0.01, 0.1):
        other, below = run(rate=rate)
        assert loss < 0.7 * other
        assert accuracy > below + 0.05
    assert accuracy > 0.85


def test_a_file_of_that_name_goes_before_and_other_names_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuleFileError, match=r"metamd-digit: there is no such file.*metamd-digits"):
        load_rule("metamd-digit")
    with pytest.raises(RuleFileError, match="no such file"):
        load_rule("../metamd-digits")
    assert isinstance(load_rule(Path("metamd-digits")), lmo.rules.KroneckerMirror)
    lmo.save_rule(lmo.rules.GradientDescent(lr=0.5), "metamd-digits")
    assert isinstance(load_rule("metamd-digits"), lmo.rules.GradientDescent)
    optimizer = lmo.LearnedOptimizer([torch.nn.Parameter(torch.zeros(1))], rule="metamd-digits")
    assert optimizer.rule.describe() == {"lr": 0.5}


def test_a_wheel_has_them(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lightning_metaopt", source / "lightning_metaopt", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [file.name for file in SHIPPED.iterdir()]
    assert {"metamd-digits.safetensors", "ml2o-lasso.safetensors"} <= set(files)
    assert {f"lightning_metaopt/pretrained/{name}" for name in files} <= packed
    assert "lightning_metaopt/py.typed" in packed


def test_the_lasso_rule_adapts_its_scale_to_problems_far_from_those_it_was_trained_on():
    rule = load_rule("ml2o-lasso")
    assert isinstance(rule, lmo.rules.RNNprop)
    options = {"restart_every": 5, "lr": 0.3, "only": ["log_scale"], "objective": "log", "held_out_steps": 500, "figure": min}
    found = lmo.adapt(rule, lmo.tasks.Lasso(std=200.0), steps=5, seed=1000, **options)
    assert found.kept
    assert found.before < 0.3  # from 168 at the start
    assert found.after < 0.6 * found.before
    assert {name for name, value in found.rule.named_parameters() if not torch.equal(value, rule.get_parameter(name))} == {
        "log_scale"
    }
