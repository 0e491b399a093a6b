"""What adapts, on other seeds: the output scale alone, of plainly and of nested meta-trained rules, and the paper's adaptation.

    python recipes/m_l2o/variant.py [FOLDER]      # writes table.csv, differences.csv, runs.csv and pictures

The rule learns the scale of its output; problems of one episode have a scale of their own, up to ten times the paper's training
problems; and what adapts is the scale alone, in five meta-steps. Transfer Learning is shown with the paper's adaptation (all
meta-parameters, Adam with 0.001) and with the same as M-L2O's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comparison
import ml2o
import search
import torch
from ml2o import adapted, curve, curves, problems
from torch import Tensor

from lightning_metaopt.rule import Rule
from lightning_metaopt.task import TaskFamily
from lightning_metaopt.tasks import Lasso

SIGMAS = (100.0, 200.0)
VARIANT = "output scale adapts"
SMALL, LARGE = search.SCALING[0], search.SCALING[3]  # five steps of Adam with learning rate 0.3 and 1
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "Direct Transfer": ("plain", None),
    "Transfer Learning": ("plain", {}),
    "Transfer Learning, scale by 0.3": ("plain", SMALL),
    "Transfer Learning, scale by 1": ("plain", LARGE),
    "M-L2O, not adapted": ("nested", None),
    "M-L2O, scale by 0.3": ("nested", SMALL),
    "M-L2O, scale by 1": ("nested", LARGE),
}


def figures(rules: Sequence[Rule], family: TaskFamily, runs: Sequence[int], way: dict[str, Any] | None) -> Tensor:
    """Curves ``(meta-seeds, runs, steps)``."""
    drawn = [problems(family, run) for run in runs]
    if way is None:
        return torch.stack([curves(rule, drawn) for rule in rules])
    rows = []
    for rule in rules:
        each = [curve(adapted(rule, family, run, **way), one) for run, one in zip(runs, drawn, strict=True)]
        rows.append(torch.stack(each))
    return torch.stack(rows)


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Meta-train what is not there yet, run all, write tables and pictures."""
    options = ml2o.arguments("The chosen variant of M-L2O", argv)
    rules = {
        kind: [search.trained(Path(options.rules), VARIANT, kind, seed) for seed in options.seeds] for kind in ("plain", "nested")
    }
    found: dict[float, dict[str, Tensor]] = {sigma: {} for sigma in SIGMAS}
    for sigma in sorted(SIGMAS, reverse=True):
        family, rows = Lasso(std=sigma), found[sigma]
        for label, (kind, way) in METHODS.items():
            path = options.folder / "curves" / f"{label}, {sigma:g}.pt"
            rows[label] = comparison.remembered(path, partial(figures, rules[kind], family, options.runs, way))
            print(f"{label}, sigma {sigma:g}: {float(rows[label].amin(2).mean()):.2f}", flush=True)
        drawn = [problems(family, run) for run in options.runs]
        rows["FISTA"] = torch.stack([comparison.proximal(one, ml2o.STEPS, True) for one in drawn])[None]
    against = [label for label, (kind, _) in METHODS.items() if kind == "plain"]
    return comparison.report(options.folder, found, (100.0, 200.0), "LASSO", against)


if __name__ == "__main__":
    print("\n".join(main()))
