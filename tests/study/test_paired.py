import csv
import math

import pytest
from scipy import stats

from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.paired import difference, read_scores


def write(folder, rows):
    with (folder / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["problem", "method", "seed", "metric", "value"], *rows])


def test_figures_by_seed_with_accuracies_in_percent(tmp_path):
    rows = [("p", "SGD", 3, "test accuracy", 0.75), ("p", "SGD", 4, "test accuracy", "nan"), ("p", "SGD", 3, "test loss", 0.5)]
    write(tmp_path, [*rows, ("p", "SGD", 4, "test loss", ""), ("q", "SGD", 3, "test loss", 2)])
    found = read_scores(tmp_path)
    assert found["p", "SGD", "test accuracy"] == {3: 75.0, 4: 0.0}
    assert found["p", "SGD", "test loss"][3] == 0.5
    assert math.isnan(found["p", "SGD", "test loss"][4])
    assert found["q", "SGD", "test loss"] == {3: 2.0}
    with pytest.raises(RecipeError, match=r"scores.csv does not exist"):
        read_scores(tmp_path / "elsewhere")


def test_differences_are_paired_by_seed_whatever_the_order():
    first, second = {0: 1.0, 2: 4.0, 1: 2.5}, {7: 9.0, 1: 2.0, 2: 1.0, 0: 1.5}
    interval = stats.ttest_rel([1.0, 2.5, 4.0], [1.5, 2.0, 1.0]).confidence_interval()
    found = difference(first, second)
    assert tuple(found) == pytest.approx((1.0, interval.low, interval.high))
    assert found.cells(1) == ["+1.0", f"{interval.low:+.1f} to {interval.high:+.1f}"]
