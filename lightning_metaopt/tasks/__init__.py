"""Task families: distributions over inner problems."""

from lightning_metaopt.tasks.constrained import NonNegativeLeastSquares, SimplexLeastSquares
from lightning_metaopt.tasks.convex import LeastSquares

__all__ = ["LeastSquares", "NonNegativeLeastSquares", "SimplexLeastSquares"]
