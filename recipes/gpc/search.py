"""Is there a setting by which GPC on plain SGD is as fast as tuned momentum, within 16 episodes?

    python recipes/gpc/search.py [FOLDER]              # 36 configurations and the best of them again; 35 minutes on one core
    python recipes/gpc/search.py FOLDER --tables       # tables and figure of a finished run

Episodes are the small ones of ``on_digits.py``. All configurations run for 16 episodes on seed 1000 with ``mode="gram"``, which on
these problems learns what ``"exact"`` learns at a third of the cost. The best three by the mean loss over episodes 13 to 16 then
run with ``"exact"`` on other seeds, beside momentum and gradient descent, which have been tuned on seed 1000 over the same
episodes, with as many configurations as GPC has.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from on_digits import TUNING, Table, command, controlled, plain, summary

EPISODES, JUDGED = 16, 4  # how many, and how many of the last are judged
GRID: list[dict[str, Any]] = [
    {"lr": lr, "meta_lr": meta, "normalize": normalize, "rollout": rollout}
    for lr, meta, normalize, rollout in itertools.product((0.1, 0.4, 0.8), (3e-4, 1e-3, 3e-3), (False, True), (2, 5))
]
MOMENTUM: list[dict[str, Any]] = [
    {"lr": lr, "momentum": momentum}
    for lr, momentum in itertools.product((0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8), (0.7, 0.8, 0.9, 0.95))
]
GD: list[dict[str, Any]] = [{"lr": round(0.1 + 0.05 * step, 2)} for step in range(36)]


def judged(table: Table, name: str, options: dict[str, Any], seed: int, episodes: list[int], steps: int) -> float:
    """The mean loss of a baseline over some episodes; infinite if it diverges."""
    found = []
    for episode in episodes:
        final, mean = summary(plain(name, options, seed, episode, steps))
        table.add(name, str(options), seed, episode, final, mean, 0.0, 0.0)
        found.append(_or_infinite(mean))
    return statistics.mean(found)


def _or_infinite(mean: float) -> float:
    return mean if math.isfinite(mean) else math.inf


def study(folder: Path, seeds: list[int], episodes: int, steps: int, count: int) -> None:
    """The search, and the best three again."""
    folder.mkdir(parents=True, exist_ok=True)
    last = list(range(max(1, episodes - JUDGED + 1), episodes + 1))
    table = Table(folder / "search.csv")
    scores: dict[str, list[float]] = {"GPC, gram": []}
    for options in GRID[:count]:
        add = partial(table.add, "GPC, gram", str(options), TUNING)
        record = controlled("GPC", {**options, "mode": "gram"}, TUNING, episodes, steps, add)
        scores["GPC, gram"].append(_or_infinite(statistics.mean(record.losses[-len(last) * steps :])))
    for name, grid in (("momentum", MOMENTUM), ("GD", GD)):
        scores[name] = [judged(table, name, options, TUNING, last, steps) for options in grid[:count]]
    best = sorted(range(count), key=scores["GPC, gram"].__getitem__)[:3]
    final = Table(folder / "final.csv")
    for seed in seeds:
        for place in best:
            options = GRID[place]
            controlled("GPC", options, seed, episodes, steps, partial(final.add, "GPC", str(options), seed))
        for name, grid in (("momentum", MOMENTUM), ("GD", GD)):
            judged(final, name, grid[scores[name].index(min(scores[name]))], seed, list(range(1, episodes + 1)), steps)


def tables(folder: Path) -> None:
    """All configurations, and the finals."""
    with (folder / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["episode"]) for row in rows)
    print("| method | options | mean loss, last episodes | last 20 losses |\n|---|---|---|---|")
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if int(row["episode"]) > last - JUDGED:
            found.setdefault((row["method"], row["options"]), []).append((float(row["mean"]), float(row["final"])))
    ranked = sorted((statistics.mean(v[0] for v in values), key, values) for key, values in found.items())
    shown = [entry for entry in ranked if entry[1][0].startswith("GPC")]
    for name in ("momentum", "GD"):
        shown += [entry for entry in ranked if entry[1][0] == name][:3]
    for mean, (name, options), values in shown:
        print(f"| {name} | {options.strip('{}')} | {mean:.4f} | {statistics.mean(v[1] for v in values):.2g} |")
    with (folder / "final.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        name = f"{row['method']}, {row['options'].strip('{}')}".replace("'", "")
        curves.setdefault(name, {}).setdefault(int(row["episode"]), []).append(float(row["mean"]))
    print("\n| method | mean loss, episode 1 | 4 | 8 | 16 | last episodes |\n|---|---|---|---|---|---|")
    for name, by_episode in curves.items():
        cells = [f"{statistics.mean(by_episode[k]):.4f}" if k in by_episode else "" for k in (1, 4, 8, 16)]
        seeds = [statistics.mean(values) for values in zip(*(by_episode[k] for k in sorted(by_episode)[-JUDGED:]), strict=True)]
        spread = f" ± {statistics.stdev(seeds):.4f}" if len(seeds) > 1 else ""
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(seeds):.4f}{spread} |")
    _draw(folder, curves)


def _draw(folder: Path, curves: dict[str, dict[int, list[float]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, by_episode in curves.items():
        episodes = sorted(by_episode)
        means = [statistics.mean(by_episode[k]) for k in episodes]
        (line,) = axis.plot(episodes, means, "o-" if name.startswith("GPC") else "--", ms=3, lw=1.4, label=name)
        low, high = ([pick(by_episode[k]) for k in episodes] for pick in (min, max))
        axis.fill_between(episodes, low, high, color=line.get_color(), alpha=0.12, lw=0)
    axis.set_yscale("log")
    axis.set_xlabel("episode")
    axis.set_ylabel("mean loss over the episode (band: all seeds)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    figure.savefig(folder / "search.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """All of it."""
    numbers = {"episodes": (EPISODES, ""), "steps": (500, "of an episode"), "count": (len(GRID), "configurations of each method")}
    command(arguments, __doc__, "outputs/gpc_search", study, tables, range(5), numbers)


if __name__ == "__main__":
    main()
