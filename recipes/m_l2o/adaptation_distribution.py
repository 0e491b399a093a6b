"""Figure 4 of M-L2O: what to adapt on, and the quantities of its theory beside it.

    python recipes/m_l2o/adaptation_distribution.py [FOLDER] [--rules RULES]

Tested on LASSO with sigma = 100; adapted on the training problems, or on sigma = 10, 25, 50, 100, 200. Beside the figures stand the
differences of tasks: Delta and Delta~ (gradients and Hessians of the mean losses, Assumption 4) at the iterates of a rule, and the
distance of the optimizer's gradients that Proposition 1 bounds and Equation 8 contains. Task 1 is meta-training, 2 adaptation,
3 the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml2o
import torch
from ml2o import FIRST, Interval, adapted, curve, curves, load, problems
from torch import Tensor

from lightning_metaopt.analysis import optimizer_gradient, task_shift
from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.episode import start, unroll
from lightning_metaopt.metagrads import Unrolled
from lightning_metaopt.objectives import SumLoss
from lightning_metaopt.rule import Rule
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.tasks import Lasso

TEST = 100.0
ADAPTATION: dict[str, TaskFamily] = {"training problems": Lasso()} | {f"{s:g}": Lasso(std=float(s)) for s in (10, 25, 50, 100, 200)}
METHODS = {"Transfer Learning": "transfer", "M-L2O, first order": "first-order", "M-L2O, aligned": "aligned"}
ALPHA, POINTS = 1e-3, 5


def figures(options: Any, name: str, family: TaskFamily | None) -> Tensor:
    """Lowest logarithm of the loss on the test problems, (meta-seeds, runs); ``None`` for no adaptation."""
    rows = []
    for seed in options.seeds:
        rule = load(name, seed, options.rules)
        drawn = [problems(Lasso(std=TEST), run) for run in options.runs]
        if family is None:
            rows.append(curves(rule, drawn).amin(1))
        else:
            found = [curve(adapted(rule, family, run), one).min() for run, one in zip(options.runs, drawn, strict=True)]
            rows.append(torch.stack(found))
    return torch.stack(rows)


def theory(rule: Rule, seed: int, size: int = 512) -> dict[str, list[float]]:
    """For every adaptation family: Delta_12, Delta~_12, Delta_23, Delta~_23, and the distances of the optimizer's gradients."""
    tasks = {name: family.draw(seed, size) for name, family in ADAPTATION.items()}
    training, test = tasks["training problems"], Lasso(std=TEST).draw(seed, size)
    with torch.no_grad():  # iterates of the rule on training problems
        iterates = unroll(rule, start(rule, training), ml2o.WINDOW)[0].params["theta"][:POINTS]
    points = {"theta": torch.cat([training.data["start"][:POINTS], iterates])}
    gradients = {name: optimizer_gradient(rule, task, FIRST(), SumLoss()) for name, task in tasks.items()}
    goal = optimizer_gradient(rule, test, FIRST(), SumLoss())
    found = {}
    for name, task in tasks.items():
        before, after = task_shift(training, task, points), task_shift(task, test, points)
        mine, first = gradients[name], gradients["training problems"]
        apart = [float((mine - first).norm()), float((mine - goal).norm())]
        cosine = float(torch.nn.functional.cosine_similarity(mine, goal, dim=0))
        found[name] = [before.gradient, before.hessian, after.gradient, after.hessian, *apart, ALPHA * apart[1], cosine]
    return found


HEAD = ["Delta_12", "Delta~_12", "Delta_23", "Delta~_23", "|grad 1 - grad 2|", "|grad 2 - grad 3|", "alpha times it", "cos(2, 3)"]


def growth(rule: Rule, seed: int, lengths: Sequence[int] = (1, 2, 5, 10, 20)) -> list[list[object]]:
    """Proposition 1: the distance of the optimizer's gradients on training and test problems as the unroll grows."""
    first, second = Lasso().draw(seed, 512), Lasso(std=TEST).draw(seed, 512)
    rows: list[list[object]] = []
    for length in lengths:
        one, other = (optimizer_gradient(rule, task, Unrolled(length, first_order=True), SumLoss()) for task in (first, second))
        rows.append([length, float((one - other).norm()), float(one.norm()), float(other.norm())])
    return rows


def draw(path: Path, rows: dict[str, dict[str, Tensor]], direct: Tensor) -> None:
    """Figures of the rules by what they adapted on: a point for each meta-seed, and intervals over meta-seeds and runs."""
    with axes_into(path) as axes:
        at = range(len(ADAPTATION))
        for shift, (label, by_family) in enumerate(rows.items()):
            ml2o.draw_points(axes, [value + 0.2 * (shift - 1) for value in at], [by_family[name] for name in ADAPTATION], label)
        axes.axhline(float(direct.mean()), color="0.4", ls="--", label="Direct Transfer")
        axes.set_xticks(list(at), list(ADAPTATION), fontsize=8)
        axes.set(xlabel="adapted on (sigma)", ylabel="lowest ln of the mean loss", title=f"LASSO, tested on sigma = {TEST:g}")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write tables and pictures."""
    options = ml2o.arguments("Figure 4 of M-L2O", argv)
    direct = figures(options, "transfer", None)
    rows = {label: {key: figures(options, name, family) for key, family in ADAPTATION.items()} for label, name in METHODS.items()}
    draw(options.folder / "adaptation_distribution.png", rows, direct)
    table = [[label, *(str(Interval.of(values)) for values in by_family.values())] for label, by_family in rows.items()]
    table.append(["Direct Transfer", str(Interval.of(direct)), *[""] * (len(ADAPTATION) - 1)])
    lines = ml2o.write(options.folder / "adaptation_distribution.csv", ["method", *ADAPTATION], table)
    seeds = options.seeds
    measured = [theory(load("aligned", seed, options.rules), seed) for seed in seeds]
    mean = {name: torch.tensor([one[name] for one in measured]).mean(0).tolist() for name in ADAPTATION}
    lines += ["", *ml2o.write(options.folder / "theory.csv", ["adapted on", *HEAD], [[name, *row] for name, row in mean.items()])]
    head = ["T", "|grad 1 - grad 3|", "|grad 1|", "|grad 3|"]
    lines += [
        "",
        *ml2o.write(options.folder / "proposition_1.csv", head, growth(load("aligned", seeds[0], options.rules), seeds[0])),
    ]
    (options.folder / "table.md").write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
