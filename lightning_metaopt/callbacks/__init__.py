"""Lightning callbacks; all of them work on unchanged modules."""

from lightning_metaopt.callbacks.averaging import EvaluationWeights, ExponentialMovingAverage, PolynomialDecay
from lightning_metaopt.callbacks.curriculum import Curriculum
from lightning_metaopt.callbacks.gpc import GPCMetaOpt
from lightning_metaopt.callbacks.hypergradient import HypergradientDescent
from lightning_metaopt.callbacks.optimistic import OptimisticMetaGrad
from lightning_metaopt.callbacks.swap import SwapOptimizer

__all__ = [
    "Curriculum",
    "EvaluationWeights",
    "ExponentialMovingAverage",
    "GPCMetaOpt",
    "HypergradientDescent",
    "OptimisticMetaGrad",
    "PolynomialDecay",
    "SwapOptimizer",
]
