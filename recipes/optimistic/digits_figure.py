"""Every optimizer with and without OptimisticMetaGrad, from the results of a digits recipe: a figure, and tables of differences.

python recipes/optimistic/digits_figure.py outputs/digits [FOLDER]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import fmean, stdev

from lightning_metaopt.study.paired import Scores, difference, read_scores

ADDED = " + "  # between the name of an optimizer and what is added to it
LOSS, ACCURACY = "mean training loss", "test accuracy"


def shown(values: list[float], digits: int) -> str:
    """Mean ± standard deviation, or that some diverged."""
    if not all(map(math.isfinite, values)) or max(values) > 1e3:
        return "diverged"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def table(scores: Scores) -> list[str]:
    """A row for each optimizer, what was added to it, and problem: figures, and the difference that it makes in accuracy."""
    lines = [
        f"| learning rate | optimizer | {LOSS} | last training loss | {ACCURACY}, % | difference, points | 95 % interval |",
        "| --- " * 7 + "|",
    ]
    for problem, method, metric in scores:
        if metric != ACCURACY:
            continue
        values = scores[problem, method, ACCURACY]
        cells = [shown(list(scores[problem, method, name].values()), 3) for name in (LOSS, "last training loss")]
        cells.append(shown(list(values.values()), 2))
        alone = scores.get((problem, method.split(ADDED)[0], ACCURACY))
        if ADDED in method and alone:
            cells += difference(values, alone).cells(2)
        else:
            cells += ["", ""]
        lines.append(f"| {problem} | {method} | {' | '.join(cells)} |")
    return lines


def draw(scores: Scores, file: Path) -> None:
    """Accuracy and loss over the problems, which are multiples of a learning rate; one column for each optimizer."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(problem for problem, _, _ in scores))
    methods = [
        name for name in dict.fromkeys(method for _, method, _ in scores) if all((at, name, LOSS) in scores for at in problems)
    ]
    bases = [name for name in methods if ADDED not in name]
    figure = Figure(figsize=(4.2 * len(bases), 8.0), layout="constrained")
    axes = figure.subplots(2, len(bases), squeeze=False, sharex=True, sharey="row")
    for column, base in enumerate(bases):
        for number, method in enumerate(name for name in methods if name.split(ADDED)[0] == base):
            look = {"color": f"C{number}", "marker": "o", "ms": 4, "lw": 1.4, "ls": "-" if number else "--"}
            for row, metric in enumerate((ACCURACY, LOSS)):
                every = [list(scores[problem, method, metric].values()) for problem in problems]
                heights = [fmean(values) if all(map(math.isfinite, values)) else math.inf for values in every]
                axes[row, column].plot(range(len(problems)), [min(height, 100.0) for height in heights], label=method, **look)
        axes[0, column].set_title(base)
        axes[1, column].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))  # clear of the curves
        axes[1, column].set_xticks(range(len(problems)), problems)
        axes[1, column].set_xlabel("learning rate")
    axes[0, 0].set_ylabel(f"{ACCURACY}, %")
    axes[1, 0].set(ylabel=LOSS, yscale="log", ylim=(None, 4))
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=90)


def main(folder: Path, out: Path) -> list[str]:
    """Draw ``digits.png``, where there are several problems, and write ``differences.md``; the lines of the table."""
    scores = read_scores(folder)
    out.mkdir(parents=True, exist_ok=True)
    if len({problem for problem, _, _ in scores}) > 1:
        draw(scores, out / "digits.png")
    lines = table(scores)
    (out / "differences.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return lines


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print("\n".join(main(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source)))
