"""In distribution and at short budgets: a meta-trained RNNprop with a learned output scale against tuned optimizers.

    python recipes/m_l2o/short_budgets.py [FOLDER]
    python recipes/m_l2o/short_budgets.py [FOLDER] --choose     # the settings that the rule's was chosen from

LASSO and quadratics of the training mixture, new problems. Every ordinary optimizer is tuned for each budget by itself: of twelve
learning rates the best after so many steps on other problems. ISTA, and FISTA once more, know each problem's 1/L, as no other
method does. The rules are meta-trained on episodes of 100 steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import ml2o
import torch
from ml2o import Interval, Method, Problems, curve, curves, problems
from torch import Tensor

import lightning_metaopt as lmo
from lightning_metaopt.rule import Rule
from lightning_metaopt.tasks import Lasso

BUDGETS = (20, 50, 100, 200, 500, 1000)
FAMILIES = {"LASSO": Lasso(), "quadratics": Lasso(penalty=0.0)}
LEARNED = "RNNprop, learned output scale"
FIXED = "RNNprop, 0.01 tanh, of lasso.py"
METHOD = Method(objective="log", rule={"scale": 0.5, "learn_scale": True}, lr=3e-3, annealed=True)
WINDOWS = 6000
# What ``--choose`` tries on the tuning seed, every combination.
OBJECTIVES, LRS, LENGTHS = ("log", "sum"), (1e-3, 3e-3), (2000, 6000)
# Curves of an optimizer on some problems by its learning rate, and the learning rates that are tried.
TUNED: dict[str, tuple[Callable[[float, Problems], Tensor], list[float]]] = {
    f"{name}, tuned": (lambda rate, drawn, make=make: curve(make(rate), drawn, max(BUDGETS)), comparison.grid(0.003, 3.0))
    for name, (make, _) in comparison.CLASSICAL.items()
} | {"FISTA, tuned": (lambda rate, drawn: comparison.proximal(drawn, max(BUDGETS), True, rate), comparison.grid(0.003, 10.0))}


def trained(folder: Path, seeds: Sequence[int]) -> list[Rule]:
    """The rules, from their files if they have been meta-trained before; all at once if not."""
    paths = [ml2o.rule_file(folder, "short-budgets", seed) for seed in seeds]
    if not all(path.exists() for path in paths):
        ml2o.PROFILES["budgets"] = ((100, WINDOWS),)
        for path, rule in zip(paths, ml2o.meta_train_together(METHOD, seeds, "budgets"), strict=True):
            lmo.save_rule(rule, path, {"recipe": "m_l2o/short_budgets", "seeds": list(seeds)})
    return [lmo.load_rule(path) for path in paths]


def choose(folder: Path, seed: int = comparison.TUNING_SEED) -> list[str]:
    """Every setting, meta-trained and run on the problems of the tuning seed: logarithms of mean losses after each budget."""
    drawn, rows = problems(FAMILIES["LASSO"], seed), []
    for objective, lr, windows in itertools.product(OBJECTIVES, LRS, LENGTHS):
        ml2o.PROFILES["budgets"] = ((100, windows),)
        rule = ml2o.meta_train(replace(METHOD, objective=objective, lr=lr), seed, "budgets")
        rows.append([objective, lr, windows, *at_budgets(curve(rule, drawn, max(BUDGETS))).tolist()])
        print(rows[-1], flush=True)
    return ml2o.write(folder / "settings.csv", ["objective", "learning rate", "windows", *map(str, BUDGETS)], rows)


def ordinary(family: Lasso, options: Any) -> dict[str, Tensor]:
    """Figures ``(1, runs, budgets)`` of every ordinary optimizer, its learning rate the best of twelve for each budget."""
    drawn, tuning = [problems(family, run) for run in options.runs], problems(family, comparison.TUNING_SEED)
    found = {}
    for name, (after, rates) in TUNED.items():
        tried = [after(rate, tuning) for rate in rates]
        best = [min(range(len(rates)), key=lambda index: float(tried[index][budget - 1])) for budget in BUDGETS]
        needed = {index: torch.stack([after(rates[index], one) for one in drawn]) for index in set(best)}
        figures = [needed[index][:, budget - 1] for index, budget in zip(best, BUDGETS, strict=True)]
        found[name] = torch.stack(figures, 1)[None]
    for name, fast in (("ISTA, each problem's 1/L", False), ("FISTA, each problem's 1/L", True)):
        found[name] = torch.stack([at_budgets(comparison.proximal(one, max(BUDGETS), fast)) for one in drawn])[None]
    return found


def at_budgets(found: Tensor) -> Tensor:
    """The figures after each budget's steps."""
    return found[..., [budget - 1 for budget in BUDGETS]]


def cells(values: Tensor) -> list[str]:
    """Intervals of figures ``(meta-seeds, runs, budgets)``."""
    return [str(Interval.of(values[:, :, index])) for index in range(len(BUDGETS))]


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run all and write tables and pictures."""
    options = ml2o.arguments("Short budgets, in distribution", argv, choose="run the settings that the rule's was chosen from")
    if options.choose:
        return choose(options.folder)
    lines: list[str] = []
    for problem, family in FAMILIES.items():
        drawn = [problems(family, run) for run in options.runs]
        rules = {LEARNED: trained(options.rules, options.seeds)}
        rules[FIXED] = [ml2o.load("transfer", seed, options.rules) for seed in options.seeds]
        found = {label: torch.stack([at_budgets(curves(rule, drawn)) for rule in each]) for label, each in rules.items()}
        found |= ordinary(family, options)
        rows = [[name, *cells(values)] for name, values in found.items()]
        mine = found[LEARNED]
        rows += [[f"{LEARNED} minus {name}", *cells(mine - values)] for name, values in found.items() if name != LEARNED]
        lines += [
            f"{problem}:",
            "",
            *ml2o.write(options.folder / f"{problem.lower()}.csv", ["method", *map(str, BUDGETS)], rows),
            "",
        ]
    (options.folder / "table.md").write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
