"""Pictures of results."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_curves"]


def draw_curves(rows: Sequence[Mapping[str, str]], path: Path, title: str, learned: Sequence[str] = ()) -> None:
    """Draw ``runs.csv``: one panel for each metric, the mean over seeds as a line, their range as a band.

    Ordinary optimizers are dashed, the ``learned`` ones solid. Curves that leave the frame have diverged.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(1.2 + 5.6 * len(metrics), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        curves = _curves([row for row in rows if row["metric"] == metric])
        for index, (name, points) in enumerate(curves.items()):
            color = colormaps["tab20"](((index * 2) % 20 + index // 10) / 20 + 0.01)
            style, width = ("-", 2.0) if name in learned else ("--", 1.4)
            (handles[name],) = axes.plot(*_columns(points, 1), style, color=color, linewidth=width, label=name)
            steps, low = _columns(points, 0)
            axes.fill_between(steps, low, _columns(points, 2)[1], color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel("inner step")
        axes.set_ylabel(metric)
        _frame(axes, curves)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


Point = tuple[int, float, float, float]


def _curves(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Point]]:
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["method"]][int(row["step"])].append(float(row["value"]))
    return {
        name: [(step, min(found), statistics.fmean(found), max(found)) for step, found in sorted(steps.items())]
        for name, steps in values.items()
    }


def _columns(points: Sequence[Point], which: int) -> tuple[list[int], list[float]]:
    return [point[0] for point in points], [point[1 + which] for point in points]


def _frame(axes: Any, curves: Mapping[str, Sequence[Point]]) -> None:
    means = [point[2] for points in curves.values() for point in points if math.isfinite(point[2])]
    if means and min(means) > 0 and max(means) > 5 * min(means):
        start = max(points[0][2] for points in curves.values())
        axes.set_yscale("log")
        axes.set_ylim(min(means) / 1.2, min(max(means), 10 * start) * 1.2)
