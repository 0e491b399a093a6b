"""One method against another, seed by seed: what the scripts beside recipes make their own tables of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from lightning_metaopt.study.statistics import paired_t_interval
from lightning_metaopt.study.tidy import read_rows

__all__ = ["Difference", "Scores", "difference", "read_scores"]

Scores = dict[tuple[str, str, str], dict[int, float]]
"""Figures of runs by problem, method and metric, then by seed."""


def read_scores(folder: Path) -> Scores:
    """All figures in ``scores.csv``; accuracies in %, 0 for a run that diverged, and other figures not-a-number for it.

    Raises:
        RecipeError: if there is no such file.
    """
    found: Scores = defaultdict(dict)
    for row in read_rows(folder / "scores.csv"):
        value = float(row["value"] or "nan")
        if row["metric"].endswith("accuracy"):
            value = 100 * value if math.isfinite(value) else 0.0
        found[row["problem"], row["method"], row["metric"]][int(row["seed"])] = value
    return dict(found)


class Difference(NamedTuple):
    """A mean difference and the 95 % t-interval of it."""

    mean: float
    low: float
    high: float

    def cells(self, digits: int) -> list[str]:
        """For a table: the mean, and the interval.

        >>> Difference(0.5, -0.25, 1.25).cells(2)
        ['+0.50', '-0.25 to +1.25']
        """
        return [f"{self.mean:+.{digits}f}", f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"]


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """How far ``first`` lies above ``second``, paired by seed; seeds that one of them lacks are left out.

    >>> difference({0: 3.0, 1: 5.0}, {0: 1.0, 1: 3.0, 2: 7.0})
    Difference(mean=2.0, low=2.0, high=2.0)
    """
    seeds = [seed for seed in first if seed in second]
    one, other = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    return Difference(fmean(one) - fmean(other), *paired_t_interval(one, other))
