"""The recipes shift what they say, and the script keeps the two rules apart."""

import csv

import pytest
from recipe_script import RECIPES, load_script

from lightning_metaopt.study.spec import load_recipe

FOLDER = RECIPES / "metamd"


def test_the_strength_is_all_that_differs():
    shift, known = str(FOLDER / "weight_decay_shift.yaml"), str(FOLDER / "weight_decay_known.yaml")
    first, second = load_recipe([shift], text_only=True), load_recipe([shift, known], text_only=True)
    for name, problem in first.problems.items():
        module = problem.source["evaluation"]["init_args"]["module"]["init_args"]
        assert module["l2"] == float(name.removeprefix("l2 = "))
        assert second.problems[name].source["evaluation"] == problem.source["evaluation"]
        learned = second.problems[name].source["family"]["init_args"]["module"]["init_args"]
        assert learned["l2"] == 0.001
        assert learned["model"] == module["model"]
    assert first.methods.keys() == second.methods.keys()


def test_rules_of_both_runs_beside_the_baselines_of_one(tmp_path):
    script = load_script("metamd/weight_decay_figure.py")
    for folder, rule in (("shift", [0.2, 0.4]), ("known", [0.1, 0.2])):
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["problem", "method", "seed", "metric", "value"])
            for method, numbers in {"Adam": [0.3, 0.5], "KroneckerMirror": rule}.items():
                for seed, value in enumerate(numbers):
                    writer.writerow(["l2 = 0", method, seed, "mean training loss", value])
                    writer.writerow(["l2 = 0", method, seed, "test accuracy", 1 - value / 10])
    scores = script.read([tmp_path / "shift", tmp_path / "known"])
    rows = [row.split(" | ") for row in script.table(scores)[2:]]
    assert [row[1:3] for row in rows] == [["meta-trained without penalty", "Adam"], ["meta-trained with the strongest", "Adam"]]
    assert [float(row[3]) for row in rows] == pytest.approx([-0.1, -0.25])
    assert [float(row[5]) for row in rows] == pytest.approx([1.0, 2.5])
    script.draw(scores, tmp_path / "area.png")
    assert (tmp_path / "area.png").stat().st_size > 5_000
