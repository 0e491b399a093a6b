"""Figure 1 on real digits: a perceptron is trained on one batch again and again, and the steps learn from episode to episode.

    python recipes/gpc/mnist.py [FOLDER] [--episodes 16] [--seeds 0 1 2]                # about 20 minutes on one core
    python recipes/gpc/mnist.py FOLDER --tables                                         # tables and figure of a finished run

Episodes are those of ``on_digits.py``, with ``--small`` the small ones. GPC is ``GPCMetaOpt`` in a ``Trainer``, on SGD (lr 0.1) and
on AdamW; options of the baselines and of GPC on AdamW are chosen on seed 1000, by the mean loss over an episode.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from on_digits import BASELINES, LAST, TUNING, Record, Table, command, controlled, plain, summary

CONTROLLED: dict[str, list[dict[str, Any]]] = {
    "GPC": [{"meta_lr": 1e-4}, {"meta_lr": 1e-3}],
    "GPC on AdamW": [{"lr": lr, "meta_lr": meta} for lr in (0.003, 0.01) for meta in (1e-5, 1e-4)],
}


def episodes_of(table: Table, name: str, options: dict[str, Any], seed: int, count: int, steps: int) -> Record:
    """A run of GPC, in the table."""
    return controlled(name, options, seed, count, steps, partial(table.add, name, str(options), seed))


def study(folder: Path, seeds: list[int], episodes: int, steps: int) -> None:
    """Choose options on the tuning seed, and run all methods on the others."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder / "mnist_episodes.csv")
    chosen: dict[str, dict[str, Any]] = {}
    for name, grid in BASELINES.items():
        scores = [_baseline(table, name, options, TUNING, 1, steps) for options in grid]
        chosen[name] = grid[scores.index(min(scores))]
    name, grid = "GPC on AdamW", CONTROLLED["GPC on AdamW"]
    scores = [statistics.mean(episodes_of(table, name, o, TUNING, min(2, episodes), steps).losses[-steps:]) for o in grid]
    chosen[name] = grid[scores.index(min(scores))]
    paper, faster = CONTROLLED["GPC"]  # both are shown
    for seed in seeds:
        for base in BASELINES:
            for episode in sorted({1, 4, 7, 16} & set(range(1, episodes + 1))):
                _baseline(table, base, chosen[base], seed, episode, steps)
        first = seed == seeds[0]
        for method, options, count in (
            (name, chosen[name], min(5, episodes)),
            ("GPC", paper, episodes),
            ("GPC", faster, min(4, episodes)),
        ):
            record = episodes_of(table, method, options, seed, count, steps)
            if first:
                _keep(folder, method, options, record)


def _baseline(table: Table, name: str, options: dict[str, Any], seed: int, episode: int, steps: int) -> float:
    begin = time.process_time()
    found = summary(plain(name, options, seed, episode, steps))
    table.add(name, str(options), seed, episode, *found, 0.0, time.process_time() - begin)
    return found[1] if found[1] == found[1] else float("inf")


def _keep(folder: Path, name: str, options: dict[str, Any], record: Record) -> None:
    label = "adamw" if "AdamW" in name else f"{options['meta_lr']:g}"
    with (folder / f"mnist_profiles_{label}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"{x:.5g}" for x in profile] for profile in record.profiles])


def tables(folder: Path) -> None:
    """Means over seeds, by episode, and the figure."""
    with (folder / "mnist_episodes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) != TUNING]
    groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["method"], row["options"]][int(row["episode"])].append((float(row["final"]), float(row["mean"])))
    print("| method | episode | last 20 losses | mean loss | seeds |\n|---|---|---|---|---|")
    for (name, options), found in groups.items():
        for episode, values in sorted(found.items()):
            cells = []
            for part in zip(*values, strict=True):
                spread = f" ± {statistics.stdev(part):.2g}" if len(part) > 1 else ""
                cells.append(f"{statistics.mean(part):.3g}{spread}")
            print(f"| {name} {options} | {episode} | {cells[0]} | {cells[1]} | {len(values)} |")
    _draw(folder, groups)


def _draw(folder: Path, groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]]) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    colors = iter(colormaps["tab20"].colors)
    for (name, options), found in groups.items():
        color, steady = next(colors), name in BASELINES
        label = f"{name}, tuned" if steady else f"{name}, {options.strip('{}').replace(chr(39), '')}"
        for axis, which in ((left, 0), (middle, 1)):
            means = {k: statistics.mean(value[which] for value in values) for k, values in sorted(found.items())}
            if steady:
                axis.axhline(statistics.geometric_mean(means.values()), color=color, linestyle="--", lw=1.2, label=label)
            else:
                axis.plot(list(means), list(means.values()), "o-", ms=3, lw=1.4, color=color, label=label)
    for axis, title in ((left, f"mean of the last {LAST} losses"), (middle, "mean loss over the episode")):
        axis.set_yscale("log")
        axis.set_xlabel("episode")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    with (folder / "mnist_profiles_0.0001.csv").open() as file:
        profiles = [[float(x) for x in row] for row in csv.reader(file)]
    for k in sorted({0, 1, 3, 7, len(profiles) - 1} & set(range(len(profiles)))):
        color = colormaps["viridis"](0.9 * (1 - k / max(1, len(profiles) - 1)))
        right.plot(range(2, len(profiles[k]) + 1), profiles[k][1:], "o-", ms=2.5, lw=1.1, color=color, label=f"episode {k + 1}")
    newest = ", ".join(f"{profiles[k][0]:.3f}" for k in (0, len(profiles) - 1))
    right.set_title(f"profile of GPC, meta_lr 0.0001 (lag 1, not drawn: {newest})", fontsize=9)
    right.set_xlabel("lag")
    right.axhline(0, color="0.5", lw=0.8, ls=":")
    right.grid(alpha=0.25)
    right.legend(fontsize=7)
    figure.savefig(folder / "mnist.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """All of it."""
    numbers = {
        "episodes": (16, "with the paper's options; GPC with others has fewer"),
        "steps": (500, "of an episode"),
    }
    command(arguments, __doc__, "outputs/gpc_mnist", study, tables, range(3), numbers, small=False)


if __name__ == "__main__":
    main()
