"""Objectives: what of an unrolled episode should be small."""

from lightning_metaopt.objectives.around import Imitation, PerReplica
from lightning_metaopt.objectives.base import Objective, displacement
from lightning_metaopt.objectives.losses import FinalLoss, LogLoss, LogMeanLoss, MeanLoss, SumLoss, ValidationLoss
from lightning_metaopt.objectives.mirror import Mirror, MirrorBound, mirror_of
from lightning_metaopt.objectives.presets import PRESETS, resolve_objective

__all__ = [
    "PRESETS",
    "FinalLoss",
    "Imitation",
    "LogLoss",
    "LogMeanLoss",
    "MeanLoss",
    "Mirror",
    "MirrorBound",
    "Objective",
    "PerReplica",
    "SumLoss",
    "ValidationLoss",
    "displacement",
    "mirror_of",
    "resolve_objective",
]
