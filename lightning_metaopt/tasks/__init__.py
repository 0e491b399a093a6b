"""Task families: distributions over inner problems."""

from lightning_metaopt.tasks.conditioned import ConditionedQuadratic
from lightning_metaopt.tasks.constrained import NonNegativeLeastSquares, SimplexLeastSquares
from lightning_metaopt.tasks.convex import LeastSquares
from lightning_metaopt.tasks.domains import ImageDomains
from lightning_metaopt.tasks.identification import SmoothInterpolation, SystemIdentification
from lightning_metaopt.tasks.images import ImageClassification, ImageSet
from lightning_metaopt.tasks.lasso import Lasso, Rosenbrock
from lightning_metaopt.tasks.mixture import Mixture
from lightning_metaopt.tasks.module import ModuleTask
from lightning_metaopt.tasks.modules import ModuleFamily
from lightning_metaopt.tasks.quadratic import ConvexQuadratic
from lightning_metaopt.tasks.repeated import Repeated
from lightning_metaopt.tasks.rotated import RotatedImages, rotate, rotated
from lightning_metaopt.tasks.supervised import Supervised
from lightning_metaopt.tasks.translation import TokenSet, Translation
from lightning_metaopt.tasks.variation import Variation

__all__ = [
    "ConditionedQuadratic",
    "ConvexQuadratic",
    "ImageClassification",
    "ImageDomains",
    "ImageSet",
    "Lasso",
    "LeastSquares",
    "Mixture",
    "ModuleFamily",
    "ModuleTask",
    "NonNegativeLeastSquares",
    "Repeated",
    "Rosenbrock",
    "RotatedImages",
    "SimplexLeastSquares",
    "SmoothInterpolation",
    "Supervised",
    "SystemIdentification",
    "TokenSet",
    "Translation",
    "Variation",
    "rotate",
    "rotated",
]
