"""Short names of objectives."""

from __future__ import annotations

from lightning_metaopt.objectives.base import Objective
from lightning_metaopt.objectives.losses import FinalLoss, LogLoss, LogMeanLoss, MeanLoss, SumLoss, ValidationLoss
from lightning_metaopt.objectives.mirror import MirrorBound

__all__ = ["PRESETS", "resolve_objective"]

PRESETS: dict[str, type[Objective]] = {
    "final": FinalLoss,
    "sum": SumLoss,
    "mean": MeanLoss,
    "log": LogLoss,
    "log-mean": LogMeanLoss,
    "validation": ValidationLoss,
    "bound": MirrorBound,
}


def resolve_objective(objective: Objective | str) -> Objective:
    """An objective from its short name: ``"final"``, ``"sum"``, ``"mean"``, ``"log"``, ``"log-mean"``,
    ``"validation"`` or ``"bound"``.

    >>> type(resolve_objective("mean")).__name__
    'MeanLoss'
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in PRESETS:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(PRESETS)} or pass an Objective")
    return PRESETS[objective]()
