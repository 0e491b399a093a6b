"""The recipe of Figure 2 and the script that draws it, cut down to one problem and few trials."""

import csv

import pytest
import yaml
from recipe_script import RECIPES, load_script

from lightning_metaopt.cli import main

FOLDER = RECIPES / "optimistic"


def test_recipe_and_figure(tmp_path, capsys):
    recipe = yaml.safe_load((FOLDER / "quadratic.yaml").read_text(encoding="utf-8"))
    names = ["GD", "Meta-Momentum, optimistic (Cor. 1, w >= 0)", "Meta-AdaGrad (Alg. 1)"]
    recipe["problems"] = {"Q1": recipe["problems"]["Q1"]}
    recipe["problems"]["Q1"]["evaluation"]["init_args"] |= {"steps": 20, "report": [20]}
    recipe["trials"] = 2
    recipe["methods"] = {name: recipe["methods"][name] for name in names}
    for method in recipe["methods"].values():
        (first, values), *others = method["search"].items()
        method["search"] = {first: values[len(values) // 2 :][:2], **{key: rest[:1] for key, rest in others}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    assert main(["run", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out")]) == 0
    lines = load_script("optimistic/quadratic_figure.py").main(tmp_path / "out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "figure2.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "pictures" / "cumulative.csv").open() as file:
        rows = {row["method"]: float(row["Q1"]) for row in csv.DictReader(file)}
    assert list(rows) == names
    assert len(lines) == 2 + len(names)
    # The search minimised the mean over the 21 points of the curve: their sum is 21 times the smallest score.
    with (tmp_path / "out" / "tuning.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file) if row["method"] == names[1]]
    assert rows[names[1]] == pytest.approx(21 * min(scores))
    lowest = min(
        score for _, score in load_script("optimistic/quadratic_figure.py").sensitivity(tmp_path / "out", 21)["Q1", names[1]]
    )
    assert lowest == pytest.approx(rows[names[1]])


def test_every_method_has_the_same_budget():
    recipe = yaml.safe_load((FOLDER / "quadratic.yaml").read_text(encoding="utf-8"))
    for method in recipe["methods"].values():
        count = 1
        for values in method["search"].values():
            count *= len(values)
        assert count == recipe["trials"]
