"""Figure 2 of "Optimistic Meta-Gradients" from the results of ``quadratic.yaml``, and its figures as a table.

python recipes/optimistic/quadratic_figure.py outputs/quadratic [FOLDER]
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

BASELINES = ("GD", "HeavyBall", "Nesterov", "AdaGrad")
STEP_SIZES = (
    "optimizer.init_args.rule.init_args.lr",
    "optimizer.init_args.lr",
)  # the paper's "learning rate": the first that is there


def curves(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Loss after every step, by problem and method."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with (folder / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            if row["metric"] == "validation loss":
                found[row["problem"], row["method"]].append(float(row["value"]))
    return found


def sensitivity(folder: Path, points: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Cumulative loss over the learning rate, the best over all other options, by problem and method."""
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    with (folder / "tuning.csv").open() as file:
        for row in csv.DictReader(file):
            options = json.loads(row["options"])
            rate = next(float(options[key]) for key in STEP_SIZES if key in options)
            score = float(row["score"]) * points if row["score"] else math.inf
            best = found[row["problem"], row["method"]]
            best[rate] = min(best.get(rate, math.inf), score if math.isfinite(score) else math.inf)
    return {key: sorted(best.items()) for key, best in found.items()}


def main(folder: Path, out: Path) -> list[str]:
    """Draw ``figure2.png`` and write ``cumulative.csv``; the lines of the table."""
    from matplotlib.figure import Figure

    losses = curves(folder)
    steps = len(next(iter(losses.values())))
    rates = sensitivity(folder, steps)
    problems, methods = (list(dict.fromkeys(key[place] for key in losses)) for place in (0, 1))
    figure = Figure(figsize=(4 * len(problems), 7.5), layout="constrained")
    axes = figure.subplots(2, len(problems), squeeze=False)
    for column, problem in enumerate(problems):
        top, bottom = axes[:, column]
        least = sum(losses[problem, "GD"])
        for number, method in enumerate(methods):
            look = {"color": f"C{number % 10}", "lw": 1.2, "ls": "--" if method in BASELINES else ("-" if number < 10 else "-.")}
            top.plot([max(value, 1e-12) for value in losses[problem, method]], **look, label=method)
            bottom.plot(*zip(*rates[problem, method], strict=True), **look)
        top.set(yscale="log", title=problem, xlabel="step")
        bottom.set(xscale="log", yscale="log", xlabel="learning rate (or its start)", ylim=(least / 4, least * 20))
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("loss, best options")
    axes[1, 0].set_ylabel("cumulative loss")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=9)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "figure2.png", dpi=90)

    lines = [
        f"| method | {' | '.join(problems)} | geometric mean | last loss, geometric mean |",
        "| --- " * (len(problems) + 3) + "|",
    ]
    with (out / "cumulative.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *problems, "geometric mean", "last loss"])
        for method in methods:
            sums = [sum(losses[problem, method]) for problem in problems]
            lasts = [losses[problem, method][-1] for problem in problems]
            figures = [*sums, mean(sums), mean(lasts)]
            writer.writerow([method, *figures])
            lines.append(f"| {method} | {' | '.join(f'{value:.0f}' for value in figures[:-1])} | {figures[-1]:.1e} |")
    return lines


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / len(values))


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print("\n".join(main(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source)))
