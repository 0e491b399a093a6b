"""Task families: distributions over inner problems."""

from lightning_metaopt.tasks.constrained import NonNegativeLeastSquares, SimplexLeastSquares
from lightning_metaopt.tasks.convex import LeastSquares
from lightning_metaopt.tasks.identification import SmoothInterpolation, SystemIdentification
from lightning_metaopt.tasks.images import ImageClassification, ImageSet
from lightning_metaopt.tasks.module import ModuleTask
from lightning_metaopt.tasks.supervised import Supervised

__all__ = [
    "ImageClassification",
    "ImageSet",
    "LeastSquares",
    "ModuleTask",
    "NonNegativeLeastSquares",
    "SimplexLeastSquares",
    "SmoothInterpolation",
    "Supervised",
    "SystemIdentification",
]
