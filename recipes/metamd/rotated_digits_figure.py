"""The learned rule against every baseline on rotated digits, from the results of rotated_digits.yaml: Figure 2 (left) of MetaMD
and a table of paired differences, for each angle and in the mean over the angles.

python recipes/metamd/rotated_digits_figure.py outputs/rotated_digits [FOLDER]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from lightning_metaopt.study.paired import Scores, difference, read_scores
from lightning_metaopt.study.tidy import read_rows

RULE, MEAN = "KroneckerMirror", "mean over angles"
AREA, ACCURACY = "mean training loss", "test accuracy"


def read(folder: Path) -> Scores:
    """Area under the training-loss curve (divided by the number of steps) and accuracy in %, and their means over all angles."""
    found = {key: values for key, values in read_scores(folder).items() if key[2] in (AREA, ACCURACY)}
    for method, metric in dict.fromkeys(key[1:] for key in found):
        angles = [values for key, values in found.items() if key[1:] == (method, metric)]
        seeds = set.intersection(*(set(values) for values in angles))
        found[MEAN, method, metric] = {seed: fmean(values[seed] for values in angles) for seed in sorted(seeds)}
    return found


def table(scores: Scores) -> list[str]:
    """A row for each angle and baseline: the rule's advantage, paired by seed, and what the 95 % interval says of it."""
    lines = ["| held out | against | area: difference | 95 % interval | accuracy, points | 95 % interval |", "| --- " * 6 + "|"]
    for angle in dict.fromkeys(key[0] for key in scores):
        for method in dict.fromkeys(key[1] for key in scores if key[1] != RULE):
            cells = []
            for metric, digits in ((AREA, 4), (ACCURACY, 2)):
                cells += difference(scores[angle, RULE, metric], scores[angle, method, metric]).cells(digits)
            lines.append(f"| {angle} | {method} | {' | '.join(cells)} |")
    return lines


def draw(folder: Path, file: Path) -> None:
    """Training loss over steps, averaged over angles and seeds."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder / "runs.csv"):
        if row["metric"] == "training loss":
            curves[row["method"]][int(row["step"])].append(float(row["value"]))
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, curve in curves.items():
        steps = sorted(curve)
        axes.plot(steps, [fmean(curve[step]) for step in steps], lw=2.2 if method == RULE else 1.4, label=method)
    axes.set(xlabel="step", ylabel="training loss (mean over angles and seeds)", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(file, dpi=130)


def main(arguments: list[str]) -> None:
    """Read, print and draw."""
    folder = Path(arguments[0])
    target = Path(arguments[1]) if len(arguments) > 1 else folder
    target.mkdir(parents=True, exist_ok=True)
    text = "\n".join(table(read(folder)))
    (target / "differences.md").write_text(text + "\n", encoding="utf-8")
    draw(folder, target / "training_loss.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
