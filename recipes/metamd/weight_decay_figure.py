"""Area under the training-loss curve over the strength of weight decay (Figure 9 of MetaMD), from the results of
weight_decay_shift.yaml and of the same with weight_decay_known.yaml laid over it, and the rules' paired differences to the others.

python recipes/metamd/weight_decay_figure.py outputs/weight_decay_shift outputs/weight_decay_known [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from lightning_metaopt.study.paired import Scores, difference, read_scores

RULE, AREA, ACCURACY = "KroneckerMirror", "mean training loss", "test accuracy"
NAMES = ("meta-trained without penalty", "meta-trained with the strongest")


def read(folders: list[Path]) -> Scores:
    """Area (divided by the number of steps) and accuracy in % of the baselines and of both rules."""
    found: Scores = {}
    for folder, name in zip(folders, NAMES, strict=True):
        for (problem, method, metric), values in read_scores(folder).items():
            if metric in (AREA, ACCURACY):
                found[problem, name if method == RULE else method, metric] = values
    return found


def table(scores: Scores) -> list[str]:
    """A row for each strength, rule and baseline: the rule's difference, paired by seed, with its 95 % interval."""
    lines = ["| strength | rule | against | area | 95 % interval | accuracy, points | 95 % interval |", "| --- " * 7 + "|"]
    baselines = [method for method in dict.fromkeys(key[1] for key in scores) if method not in NAMES]
    for problem in dict.fromkeys(key[0] for key in scores):
        for rule in NAMES:
            for method in baselines:
                cells = []
                for metric, digits in ((AREA, 3), (ACCURACY, 2)):
                    cells += difference(scores[problem, rule, metric], scores[problem, method, metric]).cells(digits)
                lines.append(f"| {problem} | {rule} | {method} | {' | '.join(cells)} |")
    return lines


def draw(scores: Scores, file: Path) -> None:
    """Every run as a point, means as lines."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(key[0] for key in scores))
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(key[1] for key in scores):
        runs = [list(scores[problem, method, AREA].values()) for problem in problems]
        (line,) = axes.plot([fmean(values) for values in runs], lw=2.2 if method in NAMES else 1.4, label=method)
        for place, values in enumerate(runs):
            axes.plot([place] * len(values), values, ".", ms=5, alpha=0.5, color=line.get_color())
    axes.set(xlabel="weight decay", ylabel="mean training loss, penalty included", yscale="log")
    axes.set_xticks(range(len(problems)), [problem.removeprefix("l2 = ") for problem in problems])
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def main(arguments: list[str]) -> None:
    """Read, print and draw."""
    folders = [Path(name) for name in arguments[:2]]
    target = Path(arguments[2]) if len(arguments) > 2 else folders[0]
    target.mkdir(parents=True, exist_ok=True)
    scores = read(folders)
    text = "\n".join(table(scores))
    (target / "differences.md").write_text(text + "\n", encoding="utf-8")
    draw(scores, target / "area.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
