"""The recipe leaves out what it tests on."""

from pathlib import Path

import yaml

PATH = Path(__file__).parents[2] / "recipes" / "metamd" / "diverse_digits.yaml"


def test_the_set_that_is_tested_is_neither_trained_nor_tuned_on():
    source = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    assert len(source["problems"]) == 4
    left_out = set()
    for problem in source["problems"].values():
        family, evaluation = problem["family"]["init_args"], problem["evaluation"]["init_args"]
        (name,) = family["leave_out"]
        left_out.add(name)
        path = family["domains"][name]["init_args"]["path"]
        data, tune = evaluation["data"]["init_args"], evaluation["tune_data"]["init_args"]
        assert data["train"]["init_args"] == family["domains"][name]["init_args"]
        assert data["test"]["init_args"]["path"] == path
        assert data["test"]["init_args"]["split"] == "test"
        assert tune["train"]["init_args"]["path"] != path
        assert tune["train"]["init_args"]["split"] == "train"
        assert tune["held_out"] > 0
        assert "test" not in tune
    assert left_out == set(family["domains"])
