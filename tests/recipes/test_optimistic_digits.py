"""The recipes on digits compare like with like, and the script that draws them counts right."""

import csv

import pytest
import yaml
from recipe_script import RECIPES, load_script
from scipy import stats

FOLDER = RECIPES / "optimistic"


@pytest.mark.parametrize("name", ["digits", "digits_long", "digits_resnet"])
def test_with_and_without_differ_in_the_callback_alone(name):
    methods = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["methods"]
    added = {method: options for method, options in methods.items() if " + " in method}
    assert len(added) >= 3
    for method, options in added.items():
        alone = methods[method.split(" + ")[0]]
        assert {**options, "callbacks": None, "note": None} == {**alone, "callbacks": None, "note": None}
        assert options["callbacks"]
        assert "callbacks" not in alone


@pytest.mark.parametrize("name", ["digits", "digits_resnet"])
def test_learning_rates_are_multiples_of_the_tuned_ones(name):
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    factors = {"0.01x": 0.01, "0.1x": 0.1, "tuned": 1.0, "10x": 10.0, "100x": 100.0}
    for options in recipe["methods"].values():
        rates = {problem: others["optimizer.init_args.lr"] for problem, others in options["problems"].items()}
        for problem, rate in rates.items():
            assert rate == pytest.approx(factors[problem] * rates["tuned"])


def test_differences(tmp_path):
    accuracies = {"SGD": [0.90, 0.92, 0.91], "SGD + more": [0.91, 0.925, 0.93]}
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "method", "seed", "metric", "value"])
        for problem in ("tuned", "10x"):
            for method, values in accuracies.items():
                for seed, value in enumerate(values):
                    bad = problem == "10x" and method == "SGD"
                    writer.writerow([problem, method, seed, "test accuracy", value])
                    for metric in ("mean training loss", "last training loss"):
                        writer.writerow([problem, method, seed, metric, "nan" if bad else 0.5 + seed])
    lines = load_script("optimistic/digits_figure.py").main(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in cells] == [["tuned", "SGD"], ["tuned", "SGD + more"], ["10x", "SGD"], ["10x", "SGD + more"]]
    assert cells[0][2:5] == ["1.500 ± 1.000", "1.500 ± 1.000", "91.00 ± 1.00"]
    assert cells[2][2] == "diverged"
    interval = stats.ttest_rel([91, 92.5, 93], [90, 92, 91]).confidence_interval()
    assert cells[1][5:] == ["+1.17", f"{interval.low:+.2f} to {interval.high:+.2f}"]
