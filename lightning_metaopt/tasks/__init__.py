"""Task families: distributions over inner problems."""

from lightning_metaopt.tasks.convex import LeastSquares

__all__ = ["LeastSquares"]
