"""The learned rule against every baseline on rotated digits, from the results of rotated_digits.yaml: Figure 2 (left) of MetaMD
and a table of paired differences, for each angle and in the mean over the angles.

python recipes/metamd/rotated_digits_figure.py outputs/rotated_digits [FOLDER]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from lightning_metaopt.study.statistics import paired_t_interval

RULE, MEAN = "KroneckerMirror", "mean over angles"
AREA, ACCURACY = "mean training loss", "test accuracy"

Scores = dict[tuple[str, str, str], dict[int, float]]  # by metric, method and angle: by seed


def read(folder: Path) -> Scores:
    """Area under the training-loss curve (divided by the number of steps) and accuracy in %, and their means over all angles."""
    found: Scores = defaultdict(dict)
    with (folder / "scores.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] in (AREA, ACCURACY):
                factor = 100.0 if row["metric"] == ACCURACY else 1.0
                found[row["metric"], row["method"], row["problem"]][int(row["seed"])] = factor * float(row["value"])
    for metric, method in {key[:2] for key in found}:
        angles = [values for key, values in found.items() if key[:2] == (metric, method)]
        seeds = set.intersection(*(set(values) for values in angles))
        found[metric, method, MEAN] = {seed: fmean(values[seed] for values in angles) for seed in sorted(seeds)}
    return found


def table(scores: Scores) -> list[str]:
    """A row for each angle and baseline: the rule's advantage, paired by seed, and what the 95 % interval says of it."""
    lines = ["| held out | against | area: difference | 95 % interval | accuracy, points | 95 % interval |", "| --- " * 6 + "|"]
    angles = [key[2] for key in scores if key[:2] == (AREA, RULE)]
    for angle in angles:
        for method in dict.fromkeys(key[1] for key in scores if key[1] != RULE):
            cells = []
            for metric, digits in ((AREA, 4), (ACCURACY, 2)):
                rule, other = scores[metric, RULE, angle], scores[metric, method, angle]
                pairs = [(rule[seed], other[seed]) for seed in rule if seed in other]
                low, high = paired_t_interval(*map(list, zip(*pairs, strict=True)))
                difference = fmean(one - two for one, two in pairs)
                cells += [f"{difference:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"]
            lines.append(f"| {angle} | {method} | {' | '.join(cells)} |")
    return lines


def draw(folder: Path, file: Path) -> None:
    """Training loss over steps, averaged over angles and seeds."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (folder / "runs.csv").open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
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
