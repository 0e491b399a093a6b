"""Is there an M-L2O that beats transfer learning and direct transfer far from the training problems? Every configuration tried.

    python recipes/m_l2o/search.py [FOLDER]      # about an hour; goes on where it was stopped; writes search.csv

Each variant is meta-trained plainly (Transfer Learning, or Direct Transfer if it does not adapt) and for adaptation (M-L2O), on
the same problems for as many windows; each of the rules then adapts to sigma = 100 and 200 in every way that is listed. Tuning
seeds only: meta-seed 1000 and run 1000. One variant is tried on other seeds by variant.py.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml2o
from ml2o import FIRST, Method

import lightning_metaopt as lmo
from lightning_metaopt.metagrads import Adapted
from lightning_metaopt.rule import Rule
from lightning_metaopt.rules import Adam, GradientDescent
from lightning_metaopt.tasks import Lasso

SEED, RUN, SIGMAS = 1000, 1000, (100.0, 200.0)
COMMON = partial(Lasso, log_scale=(0.0, math.log(10)), common_scale=True)  # entries up to 10
SCALE: dict[str, Any] = {"learn_scale": True}
ONLY: dict[str, Any] = {"only": ["log_scale"]}


@dataclass(frozen=True)
class Variant:
    """Plain meta-training, how M-L2O differs from it, and the ways to adapt at test time (options of ``lmo.adapt``)."""

    plain: Method
    nested: Method
    ways: Sequence[dict[str, Any]] = field(default_factory=list)


def aligned(base: Method, lr: float, steps: int = 5, **options: Any) -> Method:
    """Meta-training at rules that Adam has adapted on the beginning of the same problems, and that go on as adapted."""
    options = {"every": 25, "advance": "adapted"} | options
    return replace(base, metagrad=lambda: Adapted(FIRST(), Adam(lr), steps, "start", True, **options))


WAYS: list[dict[str, Any]] = [
    {"lr": lr, "steps": steps, "restart_every": 5, "objective": objective}
    for objective, lr, steps in [
        ("sum", 1e-3, 5),
        ("sum", 1e-3, 50),
        ("log", 1e-3, 5),
        ("log", 1e-3, 50),
        ("log", 1e-2, 5),
        ("log", 1e-2, 25),
        ("log", 1e-4, 50),
    ]
]
SCALING: list[dict[str, Any]] = [
    {"lr": lr, "steps": steps, "restart_every": restart, "objective": "log", "only": ["log_scale"]}
    for lr, steps, restart in [(0.3, 5, 5), (0.3, 10, 5), (0.3, 25, 5), (1.0, 5, 5), (1.0, 10, 5), (0.3, 25, 1), (0.3, 25, 25)]
]
PAPER, LOG = Method(), Method(objective="log")
WIDE, LEARNED = Method(family=COMMON, objective="log"), Method(family=COMMON, objective="log", rule=SCALE)
VARIANTS = {
    "learned output scale": Variant(LEARNED, aligned(LEARNED, 1e-2), [*SCALING, *WAYS]),
    "output scale adapts": Variant(LEARNED, aligned(LEARNED, 0.3, **ONLY), SCALING),
    "output scale adapts, 10 steps": Variant(LEARNED, aligned(LEARNED, 0.3, 10, **ONLY), SCALING),
    "output scale adapts by 1": Variant(LEARNED, aligned(LEARNED, 1.0, **ONLY), SCALING),
    "as the paper": Variant(PAPER, aligned(PAPER, 1e-3, family=Lasso()), WAYS),
    "alpha 0.1, next window": Variant(
        PAPER, replace(PAPER, metagrad=lambda: Adapted(FIRST(), GradientDescent(0.1), 1, "next", True)), WAYS
    ),
    "log loss": Variant(LOG, aligned(LOG, 1e-3, family=Lasso()), WAYS),
    "scales to 10": Variant(WIDE, aligned(WIDE, 1e-3), WAYS),
    "scales to 10, steps of 0.01": Variant(WIDE, aligned(WIDE, 1e-2), WAYS),
}


def owner(variant: str, kind: str) -> str:
    """The variant under whose name a rule lies: plainly meta-trained ones are shared."""
    if kind == "nested":
        return variant
    return next(name for name, other in VARIANTS.items() if other.plain == VARIANTS[variant].plain)


def trained(folder: Path, variant: str, kind: str, seed: int) -> Rule:
    """The rule of a variant, from its file if it has been meta-trained before."""
    chosen = VARIANTS[variant]
    path = ml2o.rule_file(folder, f"{owner(variant, kind)}, {kind}", seed)
    if not path.exists():
        lmo.save_rule(ml2o.meta_train(chosen.plain if kind == "plain" else chosen.nested, seed), path)
    return lmo.load_rule(path)


def figure(rule: Rule, sigma: float, run: int, way: dict[str, Any] | None) -> float:
    """Lowest logarithm of the mean loss on the test problems of a run."""
    family = Lasso(std=sigma)
    if way is not None:
        rule = ml2o.adapted(rule, family, run, **way)
    return float(ml2o.curve(rule, ml2o.problems(family, run)).min())


def configurations() -> Iterator[tuple[str, str, str, dict[str, Any] | None]]:
    """Variant, kind of meta-training, the way of adapting in words and as options."""
    for name, variant in VARIANTS.items():
        for kind in ("plain", "nested"):
            if owner(name, kind) != name:
                continue
            for way in (None, *variant.ways):
                words = "none" if way is None else ", ".join(f"{key} {value}" for key, value in way.items())
                yield name, kind, words, way


def main(argv: Sequence[str] | None = None) -> None:
    """Try all that has not been tried yet."""
    options = ml2o.arguments("Search for an M-L2O that wins", argv)
    path = options.folder / "search.csv"
    done = set()
    if path.exists():
        with path.open(newline="") as file:
            done = {tuple(row[:3]) for row in csv.reader(file)}
    else:
        path.write_text("variant,meta-training,adaptation,sigma 100,sigma 200\n")
    for name, kind, words, way in configurations():
        if (name, kind, words) in done:
            continue
        rule = trained(options.folder / "rules", name, kind, SEED)
        found = [figure(rule, sigma, RUN, way) for sigma in SIGMAS]
        with path.open("a", newline="") as file:
            csv.writer(file).writerow([name, kind, words, *(f"{value:.3f}" for value in found)])


if __name__ == "__main__":
    main()
