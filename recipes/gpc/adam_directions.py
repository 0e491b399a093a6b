"""GPC on the directions of AdamW in the place of gradients: does it beat tuned AdamW, and does a spike stop it from learning?

    python recipes/gpc/adam_directions.py [FOLDER] [--seeds 0 1 2 3 4]   # 15 minutes on one core
    python recipes/gpc/adam_directions.py FOLDER --tables                # tables and figure of a finished run

Episodes are the small ones of ``on_digits.py``. Twelve configurations of GPC (learning rate of AdamW, meta learning rate, with and
without the limit on meta-gradients) and twelve of AdamW are compared on seed 1000 by the mean loss over episodes 4 to 6. The best
with the limit, the same without it, and the best AdamW then run on the other seeds.
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

FIRST = 4  # the first episode that is judged
NAME = "GPC on AdamW"
GRID: list[dict[str, Any]] = [
    {"lr": lr, "meta_lr": meta, "clip": clip}
    for lr, meta, clip in itertools.product((3e-3, 1e-2, 3e-2), (1e-5, 1e-4), (10.0, None))
]
ADAMW: list[dict[str, Any]] = [
    {"lr": lr, "betas": (0.9, second)} for lr, second in itertools.product((3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1), (0.9, 0.999))
]


def score(found: list[float]) -> float:
    """Mean over episodes; infinite if one diverges."""
    mean = statistics.mean(found)
    return mean if math.isfinite(mean) else math.inf


def study(folder: Path, seeds: list[int], episodes: int, steps: int, count: int) -> None:
    """The search, and the chosen ones on other seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder / "adam_directions.csv")
    judged = range(min(FIRST, episodes), episodes + 1)

    def gpc(options: dict[str, Any], seed: int) -> float:
        record = controlled(NAME, options, seed, episodes, steps, partial(table.add, NAME, str(options), seed))
        return score([statistics.mean(record.losses[(k - 1) * steps : k * steps]) for k in judged])

    def adamw(options: dict[str, Any], seed: int, which: list[int]) -> float:
        found = [summary(plain("AdamW", options, seed, episode, steps)) for episode in which]
        for episode, (final, mean) in zip(which, found, strict=True):
            table.add("AdamW", str(options), seed, episode, final, mean, 0.0, 0.0)
        return score([mean for _, mean in found])

    scores = [gpc(options, TUNING) for options in GRID[:count]]
    limited = [place for place in range(count) if GRID[place]["clip"]]
    best = GRID[min(limited, key=scores.__getitem__)]
    others = [adamw(options, TUNING, list(judged)) for options in ADAMW[:count]]
    for seed in seeds:
        for options in (best, {**best, "clip": None}):
            gpc(options, seed)
        adamw(ADAMW[others.index(min(others))], seed, list(range(1, episodes + 1)))


def tables(folder: Path) -> None:
    """The search, and losses and coefficients by episode."""
    with (folder / "adam_directions.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[bool, dict[tuple[str, str], dict[int, list[tuple[float, float, float]]]]] = {True: {}, False: {}}
    for row in rows:
        place = found[int(row["seed"]) == TUNING].setdefault((row["method"], row["options"]), {})
        place.setdefault(int(row["episode"]), []).append((float(row["mean"]), float(row["final"]), float(row["sum_of_m"])))
    print("| on seed 1000 | options | mean loss, episodes 4 on |\n|---|---|---|")
    for (name, options), episodes in found[True].items():
        means = [values[0][0] for episode, values in episodes.items() if episode >= FIRST or len(episodes) < FIRST]
        print(f"| {name} | {options.strip('{}')} | {statistics.mean(means):.4f} |")
    print("\n| method | episode | mean loss | last 20 losses | sum of M |\n|---|---|---|---|---|")
    for (name, options), episodes in found[False].items():
        for episode, values in episodes.items():
            cells = []
            for part in zip(*values, strict=True):
                spread = f" ± {statistics.stdev(part):.2g}" if len(part) > 1 else ""
                cells.append(f"{statistics.mean(part):.3g}{spread}")
            print(f"| {name}, {options.strip('{}')} | {episode} | {' | '.join(cells)} |")
    _draw(folder, found[False])


def _draw(folder: Path, found: dict[tuple[str, str], dict[int, list[tuple[float, float, float]]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, options), episodes in found.items():
        label = f"{name}, {options.strip('{}')}".replace("'", "")
        seeds = list(zip(*episodes.values(), strict=True))
        means = [statistics.mean(value[0] for value in values) for values in episodes.values()]
        (line,) = left.plot(list(episodes), means, "o-" if name == NAME else "--", ms=3, label=label)
        for runs in seeds:
            left.plot(list(episodes), [value[0] for value in runs], color=line.get_color(), lw=0.5, alpha=0.5)
            if name == NAME:
                right.plot(list(episodes), [value[2] for value in runs], "o-", ms=2, color=line.get_color(), lw=0.9)
    left.set_yscale("log")
    left.set_title("mean loss over the episode (thin: each seed)", fontsize=10)
    right.set_title("sum of M at the end of the episode, each seed", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("episode")
        axis.grid(alpha=0.25)
    left.legend(fontsize=7)
    figure.savefig(folder / "adam_directions.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """All of it."""
    numbers = {"episodes": (6, ""), "steps": (500, "of an episode"), "count": (len(GRID), "configurations of each method")}
    command(arguments, __doc__, "outputs/gpc_adam_directions", study, tables, range(5), numbers)


if __name__ == "__main__":
    main()
