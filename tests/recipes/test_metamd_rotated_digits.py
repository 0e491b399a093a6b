"""The recipe leaves out what it tests on, and the script that compares counts right."""

import csv
import re

import pytest
import yaml
from recipe_script import RECIPES, load_script
from scipy import stats

from lightning_metaopt.study.spec import load_recipe

FOLDER = RECIPES / "metamd"


@pytest.fixture(scope="module")
def script():
    return load_script("metamd/rotated_digits_figure.py")


def test_the_angle_that_is_tested_is_neither_trained_nor_tuned_on():
    source = yaml.safe_load((FOLDER / "rotated_digits.yaml").read_text(encoding="utf-8"))
    for name, problem in source["problems"].items():
        angle = int(name.split()[0])
        family, evaluation = problem["family"]["init_args"], problem["evaluation"]["init_args"]
        assert sorted([angle, *family["angles"]]) == [0, 15, 30, 45, 60, 75]
        assert family["data"]["init_args"]["split"] == "meta"
        sets = {
            (role, part): evaluation[role]["init_args"].get(part) for role in ("tune_data", "data") for part in ("train", "test")
        }
        assert sets["tune_data", "train"]["init_args"]["degrees"] in family["angles"]
        assert sets["tune_data", "train"]["init_args"]["data"]["init_args"]["split"] == "meta"
        assert sets["tune_data", "test"] is None
        for part in ("train", "test"):
            assert sets["data", part]["init_args"]["degrees"] == angle
            assert sets["data", part]["init_args"]["data"]["init_args"]["split"] == part
    load_recipe([str(FOLDER / "rotated_digits.yaml")], text_only=True)


def test_differences_are_paired_by_seed_and_averaged_over_angles(script, tmp_path):
    values = {("0 degrees", "Adam"): [0.4, 0.5, 0.3], ("0 degrees", "KroneckerMirror"): [0.2, 0.4, 0.2]}
    values |= {("15 degrees", "Adam"): [0.6, 0.5, 0.7], ("15 degrees", "KroneckerMirror"): [0.5, 0.5, 0.3]}
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "method", "seed", "metric", "value"])
        for (problem, method), numbers in values.items():
            for seed, value in enumerate(numbers):
                writer.writerow([problem, method, seed, "mean training loss", value])
                writer.writerow([problem, method, seed, "test accuracy", 1 - value / 10])
    rows = script.table(script.read(tmp_path))[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 0 degrees", "| 15 degrees", "| mean over angles"]
    pairs = [-0.15, -0.05, -0.25]
    low, high = stats.t.interval(0.95, 2, loc=-0.15, scale=stats.sem(pairs))
    found = [float(number) for number in re.findall(r"[+-]\d\.\d+", rows[-1])]
    assert found[:3] == pytest.approx([-0.15, low, high], abs=1e-4)
    assert found[3] == pytest.approx(1.5, abs=1e-2)
