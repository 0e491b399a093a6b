"""Figure A5b of M-L2O: between a rule adapted on training problems and one adapted on test problems.

    python recipes/m_l2o/interpolation.py [FOLDER] [--rules RULES]

Weights of the rule: w times those adapted on the training mixture plus (1 - w) times those adapted on sigma = 100, tested there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import ml2o
import torch
from ml2o import Interval, adapted, curve, load, problems

from lightning_metaopt.analysis.figure import axes_into
from lightning_metaopt.rule import Rule
from lightning_metaopt.tasks import Lasso

TEST = Lasso(std=100.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = {"Transfer Learning": "transfer", "M-L2O, first order": "first-order", "M-L2O, aligned": "aligned"}


def between(first: Rule, second: Rule, weight: float) -> Rule:
    """``weight`` of the first rule and the rest of the second, parameter by parameter."""
    found = copy.deepcopy(first)
    with torch.no_grad():
        for value, other in zip(found.parameters(), second.parameters(), strict=True):
            value.mul_(weight).add_(other, alpha=1 - weight)
    return found


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write table and picture."""
    options = ml2o.arguments("Figure A5b of M-L2O", argv)
    rows: list[list[object]] = []
    with axes_into(options.folder / "interpolation.png") as axes:
        for shift, (label, name) in enumerate(METHODS.items()):
            figures = torch.empty(len(WEIGHTS), len(options.seeds), len(options.runs))
            for i, seed in enumerate(options.seeds):
                for j, run in enumerate(options.runs):
                    rule = load(name, seed, options.rules)
                    ends = adapted(rule, Lasso(), run), adapted(rule, TEST, run)
                    for k, weight in enumerate(WEIGHTS):
                        figures[k, i, j] = curve(between(*ends, weight), problems(TEST, run)).min()
            rows.append([label, *(str(Interval.of(values)) for values in figures)])
            ml2o.draw_points(axes, [weight + 0.03 * (shift - 1) for weight in WEIGHTS], list(figures), label)
        axes.set(xlabel="weight of the rule adapted on training problems", ylabel="lowest ln of the mean loss")
        axes.set_title("LASSO, tested on sigma = 100")
    lines = ml2o.write(options.folder / "interpolation.csv", ["method", *(f"{weight:g}" for weight in WEIGHTS)], rows)
    (options.folder / "table.md").write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
