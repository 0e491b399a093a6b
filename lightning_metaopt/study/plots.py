"""The figures of a study, each a list of panels, one for each problem or metric."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lightning_metaopt.study.components import RecipeError
from lightning_metaopt.study.run_metric import higher_is_better, mean
from lightning_metaopt.study.statistics import bootstrap_interval, performance_profile
from lightning_metaopt.study.style import Panel, Style, picture, styles
from lightning_metaopt.study.tidy import Point, StudyData, replace_file

__all__ = ["cost_panels", "curve_panels", "draw_all", "draw_curves", "profile_panels", "sensitivity_panels", "target_panels"]

TENFOLD = 10.0
LEFT_OUT = "Means that leave the frame diverged, or are ten times as bad as the median method at its start."


def draw_curves(rows: Sequence[Mapping[str, str]], path: Path, title: str, learned: Sequence[str] = ()) -> None:
    """Draw ``runs.csv``: one panel for each problem and metric, the mean over seeds as a line, its 95 % interval as a band.

    Ordinary optimizers are dashed, the ``learned`` ones solid. Means that leave the frame diverged, or are ten times as bad as the
    median method at its start.
    """
    points = [
        Point(
            row.get("problem", ""), row["method"], int(row["seed"]), row["metric"], int(row["step"]), float(row["value"]), math.nan
        )
        for row in rows
    ]
    if not points:
        raise RecipeError("there is no curve to draw: every run diverged before its first step")
    looks = styles(list(dict.fromkeys(point.method for point in points)), learned)
    metrics = len({point.metric for point in points})
    replace_file(path, picture(_curve_panels(points, looks), title, looks, columns=min(metrics, 3)))


def draw_all(data: StudyData, output: Path) -> None:
    """Write every figure that the study has something to show in, and remove those of an earlier report that it has not."""
    looks = styles(data.methods, data.learned)
    metrics = len({point.metric for point in data.points})
    figures: list[tuple[str, list[Panel], bool, int]] = [
        ("curves", curve_panels(data, looks), True, min(metrics, 3)),
        ("sensitivity", sensitivity_panels(data, looks), True, 3),
        ("profiles", profile_panels(data, looks), True, 3),
        ("targets", target_panels(data, looks), False, 2),
        ("costs", cost_panels(data, looks), False, 2),
    ]
    for name, panels, legend, columns in figures:
        path = output / f"{name}.png"
        if panels:
            replace_file(path, picture(panels, data.record["title"], looks if legend else {}, columns))
        else:
            path.unlink(missing_ok=True)


def curve_panels(data: StudyData, looks: Mapping[str, Style]) -> list[Panel]:
    """Every curve of every problem: mean over seeds and its bootstrap interval."""
    return _curve_panels(data.points, looks)


def _curve_panels(points: Sequence[Point], looks: Mapping[str, Style]) -> list[Panel]:
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.problem, point.metric].append(point)
    return [
        Panel(
            _title(problem, metric),
            f"Mean over seeds and its 95 % bootstrap interval, by method. {LEFT_OUT}",
            partial(_draw_curves, points=found, looks=looks, metric=metric),
        )
        for (problem, metric), found in groups.items()
    ]


def _title(problem: str, rest: str) -> str:
    return f"{problem}: {rest}" if problem else rest


def _draw_curves(axes: Any, points: Sequence[Point], looks: Mapping[str, Style], metric: str) -> None:
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        values[point.method][point.step].append(point.value)
    means = {}
    for name, steps in values.items():
        found = [
            (step, mean(steps[step]), *bootstrap_interval(steps[step], method="percentile", resamples=999))
            for step in sorted(steps)
        ]
        where, middle, low, high = zip(*found, strict=True)
        means[name] = middle
        axes.plot(where, middle, **looks[name].line())
        axes.fill_between(where, low, high, alpha=0.15, linewidth=0, **looks[name].mark())
    axes.set_xlabel("inner step")
    axes.set_ylabel(metric)
    axes.grid()
    _frame(axes, list(means.values()), higher_is_better(metric))


def _frame(axes: Any, curves: Sequence[Sequence[float]], larger_is_better: bool) -> None:
    # On the bad side diverged curves leave the frame instead of flattening all others; on the good side nothing does.
    finite = [value for curve in curves for value in curve if math.isfinite(value)]
    starts = [abs(curve[0]) for curve in curves if math.isfinite(curve[0])]
    if not finite or not starts:
        return
    start, whole = median(starts), [value for curve in curves if all(map(math.isfinite, curve)) for value in curve]
    if larger_is_better:
        low, high = min([value for value in whole if value >= start / TENFOLD] or finite), max(finite)
    else:
        low, high = min(finite), max([value for value in whole if value <= start * TENFOLD] or finite)
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def sensitivity_panels(data: StudyData, looks: Mapping[str, Style]) -> list[Panel]:
    """The score of every trial against each searched number: the best for each value as a line, all trials as dots.

    Options of the same last name share a panel. Trials that diverged stand as crosses at the upper edge.
    """
    groups: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for trial in data.trials:
        for key, value in json.loads(trial.options).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                groups[trial.problem, key.rsplit(".", 1)[-1]][trial.method].append((float(value), trial.score))
    panels = []
    for (problem, option), found in groups.items():
        varied = {name: trials for name, trials in found.items() if len({value for value, _ in trials}) > 1}
        if any(math.isfinite(score) for trials in varied.values() for _, score in trials):
            text = "Score of every trial, with a line through the best at each value. Crosses: worse than shown, or diverged."
            draw = partial(_draw_sensitivity, found=varied, looks=looks, option=option, score=data.objective(problem))
            panels.append(Panel(_title(problem, f"sensitivity to {option}"), text, draw))
    return panels


def _draw_sensitivity(
    axes: Any, found: Mapping[str, Sequence[tuple[float, float]]], looks: Mapping[str, Style], option: str, score: str
) -> None:
    values = [value for trials in found.values() for value, _ in trials]
    finite = sorted(score for trials in found.values() for _, score in trials if math.isfinite(score))
    bests = [min(score for _, score in trials) for trials in found.values()]
    worst = max(best for best in bests if math.isfinite(best))
    low, high = finite[0], min(finite[-1], max(20 * worst, finite[len(finite) // 2])) if finite[0] > 0 else finite[-1]
    lost: dict[float, list[Style]] = defaultdict(list)
    for name, trials in found.items():
        best = {value: min(score for other, score in trials if other == value) for value in sorted({value for value, _ in trials})}
        line = [(value, score) for value, score in best.items() if math.isfinite(score)]
        axes.plot([value for value, _ in line], [score for _, score in line], **looks[name].line())
        dots = [(value, score) for value, score in trials if math.isfinite(score)]
        axes.plot([value for value, _ in dots], [score for _, score in dots], "o", markersize=3, **looks[name].mark())
        for value, reached in best.items():
            if not reached <= high:
                lost[value].append(looks[name])
    _crosses(axes, lost)
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.3)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    axes.set_xlabel(option)
    axes.set_ylabel(f"{score} (tuning seeds)")
    axes.grid()


def _crosses(axes: Any, lost: Mapping[float, Sequence[Style]]) -> None:
    # Side by side, since many methods diverge at the same value.
    from matplotlib.transforms import ScaledTranslation

    for value, methods in lost.items():
        for index, look in enumerate(methods):
            points = (index - (len(methods) - 1) / 2) * min(5.0, 30.0 / len(methods))
            place = axes.get_xaxis_transform() + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
            axes.plot([value], [0.97], "x", markersize=4, transform=place, **look.mark())


def profile_panels(data: StudyData, looks: Mapping[str, Style]) -> list[Panel]:
    """Performance profiles over all problems and seeds, for each metric that runs to a target."""
    names = [name for name in data.methods if all((problem, name, "diverged") in data.summary for problem in data.problems)]
    panels = []
    for metric, about in data.record["metrics"].items():
        blocks = [block for problem in data.problems for block in data.blocks(problem, metric, names)]
        solved = any(math.isfinite(cost) for block in blocks for cost in block.values())
        if about["censored"] and solved and len(names) > 1:
            text = f"Share of {len(blocks)} runs (problems and seeds) at the target within tau times what the fastest method took."
            draw = partial(_draw_profile, profile=performance_profile(blocks), looks=looks, metric=metric)
            panels.append(Panel(f"performance profile: {metric}", text, draw))
    return panels


def _draw_profile(axes: Any, profile: Mapping[str, Sequence[tuple[float, float]]], looks: Mapping[str, Style], metric: str) -> None:
    end = 1.05 * max(2.0, *(corners[-1][0] for corners in profile.values()))
    for name, corners in profile.items():
        axes.step(
            [*(tau for tau, _ in corners), end], [*(rho for _, rho in corners), corners[-1][1]], where="post", **looks[name].line()
        )
    axes.set_xlim(1, end)
    axes.set_ylim(-0.02, 1.02)
    if end > 10:
        axes.set_xscale("log")
    axes.set_xlabel(f"tau: {metric}, relative to the fastest")
    axes.set_ylabel("share of runs at the target")
    axes.grid()


def target_panels(data: StudyData, looks: Mapping[str, Style]) -> list[Panel]:
    """Steps or seconds to the target of every run, a row for each method; runs that never reached it are counted at the right."""
    panels = []
    for problem in data.problems:
        for metric, target in data.record["problems"][problem]["targets"].items():
            panels += _rows(data, looks, problem, metric, f"{_title(problem, metric)} ({target:.4g})")
    return panels


def cost_panels(data: StudyData, looks: Mapping[str, Style]) -> list[Panel]:
    """Seconds and memory of every run, a row for each method."""
    resources = [
        metric for metric, about in data.record["metrics"].items() if about["unit"] in ("seconds", "MB") and not about["censored"]
    ]
    return [
        panel
        for problem in data.problems
        for metric in resources
        for panel in _rows(data, looks, problem, metric, _title(problem, metric))
    ]


def _rows(data: StudyData, looks: Mapping[str, Style], problem: str, metric: str, title: str) -> list[Panel]:
    values = {name: list(found.values()) for name, found in data.values(problem, metric).items()}
    if not any(math.isfinite(value) for found in values.values() for value in found):
        return []
    censored = data.record["metrics"][metric]["censored"]
    text = "A dot for each run, a bar for the median."
    text += " In brackets: how many of the runs reached the target, where not all did." if censored else ""
    draw = partial(_draw_rows, values=values, looks=looks, metric=metric, censored=censored)
    return [Panel(title, text, draw, 0.22 + 0.052 * len(values))]


def _draw_rows(axes: Any, values: Mapping[str, Sequence[float]], looks: Mapping[str, Style], metric: str, censored: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    middle = {name: median(math.inf if math.isnan(value) else value for value in found) for name, found in values.items()}
    missed = {name: sum(not math.isfinite(value) for value in found) for name, found in values.items()}
    order = sorted(values, key=lambda name: (middle[name], missed[name], name.lower()), reverse=True)
    for row, name in enumerate(order):
        finite = [value for value in values[name] if math.isfinite(value)]
        if math.isfinite(middle[name]):
            axes.barh(row, middle[name], color=looks[name].color, alpha=0.3, height=0.7)
        axes.plot(finite, [row] * len(finite), "o", color=looks[name].color, markersize=4, alpha=0.8)
        if censored and len(finite) < len(values[name]):
            count = f"({len(finite)}/{len(values[name])})"
            axes.text(1.01, row, count, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(metric)
    axes.grid(axis="x")
