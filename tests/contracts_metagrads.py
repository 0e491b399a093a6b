"""The table of meta-gradients under contract, as ``contracts.py`` is of rules. **A new meta-gradient is one row here.**"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from contracts import NETS
from oracles import (
    Reference,
    of_adapted,
    of_displacement,
    of_rollouts,
    of_statistics,
    of_the_objective,
    of_windows,
    with_recorded_gradients,
)

import lightning_metaopt as lmo
from lightning_metaopt import metagrads, rules
from lightning_metaopt.rule import Rule

PERTURBED = partial(rules.GradientPerturbation, history=2, lr=0.1, decay=0.01)
HEAVY_BALL = partial(rules.HeavyBall, lr=0.05, momentum=0.7)


@dataclass(frozen=True)
class MetaGradRow:
    """A meta-gradient under contract.

    Attributes:
        name: of the row.
        make: builds it for a number of inner steps.
        reference: the gradient that it claims to be, in another way.
        precision: relative agreement with the reference, over all meta-parameters together.
        steps: inner steps of one estimate.
        begin: estimates before the one that is tested, so that what is carried is not empty.
        whole: whether the estimate is through the whole trajectory since the episode began; its reference is then
            :func:`oracles.of_the_trajectory`.
        rule: the rule that it is tried on.
        of_objective: whether it is a gradient of the objective at all.
    """

    name: str
    make: Callable[[int], lmo.MetaGradient]
    reference: Reference = of_the_objective
    precision: float = 1e-8
    steps: int = 4
    begin: int = 1
    whole: bool = False
    rule: Callable[[], Rule] = HEAVY_BALL
    of_objective: bool = True


METAGRADS = [
    MetaGradRow("Unrolled", metagrads.Unrolled),
    MetaGradRow("Unrolled, windows", lambda steps: metagrads.Unrolled(steps, window=2), of_windows(2)),
    MetaGradRow("Unrolled, first order", lambda steps: metagrads.Unrolled(steps, first_order=True), with_recorded_gradients),
    MetaGradRow("Unrolled, checkpoints", lambda steps: metagrads.Unrolled(steps, checkpoint=2)),
    MetaGradRow("Unrolled, windows of checkpoints", lambda steps: metagrads.Unrolled(steps, 2, checkpoint=1), of_windows(2)),
    MetaGradRow(
        "Unrolled, first order, checkpoints",
        lambda steps: metagrads.Unrolled(steps, first_order=True, checkpoint=2),
        with_recorded_gradients,
    ),
    MetaGradRow("Unrolled, chunks", lambda steps: metagrads.Unrolled(steps, chunk=2)),
    MetaGradRow("ForwardMode", metagrads.ForwardMode, whole=True, begin=2),
    MetaGradRow("ForwardMode, no carry", lambda steps: metagrads.ForwardMode(steps, carry=False)),
    MetaGradRow(
        "Implicit",
        lambda steps: metagrads.Implicit(steps, solver=metagrads.ConjugateGradient(tolerance=1e-12)),
        of_displacement,
        rule=partial(rules.KroneckerMirror, NETS.shapes, lr=0.1, norm=1.0, momentum=0.7),
    ),
    MetaGradRow("ZerothOrder", lambda steps: metagrads.ZerothOrder(steps, pairs=150, sigma=1e-3), precision=0.35, steps=2),
    MetaGradRow(
        "ZerothOrder, persistent",
        lambda steps: metagrads.ZerothOrder(steps, pairs=150, sigma=1e-3, persistent=True),
        precision=0.35,
        steps=2,
        begin=0,
    ),
    MetaGradRow("Statistics", metagrads.Statistics, of_statistics, rule=partial(rules.ARUBA, NETS.shapes), of_objective=False),
    MetaGradRow(
        "Statistics, first window, chunks",
        lambda steps: metagrads.Statistics(steps, chunk=3),
        of_statistics,
        begin=0,
        rule=partial(rules.ARUBA, NETS.shapes, lr=0.05, zeta=2.0, power=0.5),
        of_objective=False,
    ),
    MetaGradRow("Counterfactual", lambda steps: metagrads.Counterfactual(3), of_rollouts(3), steps=1, begin=6, rule=PERTURBED),
    MetaGradRow(
        "Counterfactual, diagonal",
        lambda steps: metagrads.Counterfactual(1),
        of_rollouts(1),
        steps=1,
        begin=3,
        rule=partial(rules.GradientPerturbation, 2, 0.1, 0.0, "diagonal", NETS.shapes),
    ),
    MetaGradRow(
        "Adapted, same windows",
        lambda steps: metagrads.Adapted(metagrads.Unrolled(steps), rules.GradientDescent(0.5), 2, "same", together=1),
        of_adapted("same", 2, 0.5),
    ),
    MetaGradRow(
        "Adapted, next windows",
        lambda steps: metagrads.Adapted(metagrads.Unrolled(steps), rules.GradientDescent(0.5), 2, "next", together=1),
        of_adapted("next", 2, 0.5),
        steps=2,
    ),
    MetaGradRow("Epochs", lambda steps: metagrads.Epochs(metagrads.Unrolled(steps), 100 * steps)),
]
